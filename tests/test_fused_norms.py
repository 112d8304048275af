"""Transformers' norms as one operator each, where torch has a kernel: every family computes the same function."""

import copy

import pytest
import torch
from accuracy import assert_as_accurate
from packing_models import CONFIGS, backward, batch, make, packed
from test_packing_models import TEMPERATURE, assert_equal, assert_same_gradients
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from flashpo.packing import norms
from flashpo.packing.norms import fuse_norms, original_norms
from flashpo.packing.scoring import prepare
from flashpo.rollout.fused import fused_backbone

NORMS = {"llama": LlamaRMSNorm, "gemma": Gemma2RMSNorm, "olmo": Olmo2RMSNorm}
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "autocast": (torch.bfloat16, torch.float32),  # a projection's result under fp32 weights
    "fp32 stream": (torch.float32, torch.bfloat16),
}
WITHOUT = ("cohere", "phi", "nemotron", "stablelm", "phimoe")  # LayerNorm


@pytest.fixture
def everywhere(monkeypatch):
    """On CPUs, too, where torch makes it of the same operators as transformers."""
    monkeypatch.setattr(norms, "_pays", lambda x: True)


def fused(module: torch.nn.Module) -> list[str]:
    return [name for name, x in module.named_modules() if norms._fused(x)]


def run(norm, x, upstream):
    x = x.clone().requires_grad_()
    y = norm(x)
    return y, *torch.autograd.grad(y, (x, norm.weight), upstream.to(y.dtype))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_function_and_gradients(device, kind, dtypes, everywhere):
    dtype, weight_dtype = DTYPES[dtypes]
    norm = NORMS[kind](48, eps=1e-3)
    torch.nn.init.uniform_(norm.weight, 0.5, 2)
    norm.to(device, weight_dtype)
    ours = copy.deepcopy(norm)
    fuse_norms(ours)
    assert fused(ours) == [""]
    x, upstream = torch.randn(2, 5, 7, 48, device=device).bfloat16()
    x = 0.05 * x.to(dtype)
    theirs = run(norm, x, upstream)
    z, w = x.double().requires_grad_(), norm.weight.double().detach().requires_grad_()
    y = z * (z.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * (w + (kind == "gemma"))
    exact = y, *torch.autograd.grad(y, (z, w), upstream.double())
    for mine, true, torchs in zip(run(ours, x, upstream), exact, theirs):
        assert mine.dtype == torchs.dtype
        assert_as_accurate(mine, true.detach(), torchs)


@pytest.mark.parametrize("kind", CONFIGS)
def test_family(kind, everywhere):
    model, b = make(kind, torch.float32), batch()
    every = [name for name, x in model.named_modules() if type(x).__name__.endswith("Norm")]
    expected = [] if kind in WITHOUT else every
    ours = packed(model, b, TEMPERATURE)
    assert fused(model) == expected
    d_ours = backward(model, b, ours)
    with original_norms(model):
        assert fused(model) == []
        theirs = packed(model, b, TEMPERATURE)
        d_theirs = backward(model, b, theirs)
    assert_equal(ours[:2], theirs[:2], 1e-5)
    assert_same_gradients(d_ours, d_theirs, 3e-5)
    assert fused(model) == expected


def test_their_own_where_torch_has_no_kernel(monkeypatch):
    monkeypatch.setattr(norms, "rms_norm", lambda *_: pytest.fail("on a CPU"))
    norm = LlamaRMSNorm(8)
    norm._flashpo_norm = norms.Formula(1e-6, 0.0, True)
    norm.forward = norms.fused_norm_forward.__get__(norm)
    assert norm(torch.ones(8)).shape == (8,)


def test_what_is_not_that_formula_stays():
    class Shifted(LlamaRMSNorm):
        __module__ = LlamaRMSNorm.__module__

        def forward(self, x):
            return super().forward(x) + 1

    class Elsewhere(LlamaRMSNorm):
        def forward(self, x):
            pytest.fail("called")

    wrapped = LlamaRMSNorm(8)
    wrapped.forward = own = lambda x: x
    modules = torch.nn.ModuleList([Shifted(8), Elsewhere(8), wrapped, Qwen3NextRMSNormGated(8), torch.nn.RMSNorm(8)])
    fuse_norms(modules)
    assert fused(modules) == []
    assert wrapped.forward is own


def test_hooks_copies_and_seeds(everywhere):
    norm = LlamaRMSNorm(8)
    state = torch.get_rng_state()
    fuse_norms(norm)
    assert torch.equal(torch.get_rng_state(), state)
    seen = []
    norm.register_forward_hook(lambda *_: seen.append(1))
    other = copy.deepcopy(norm)
    torch.nn.init.constant_(other.weight, 3.0)
    x = torch.randn(4, 8)
    torch.testing.assert_close(other(x), 3 * norm(x))
    assert len(seen) == 2


def test_rollouts_still_fuse_the_layers():
    model = make("qwen3", torch.float32)
    prepare(model)
    assert fused(model)
    assert fused_backbone(model.model, torch.float32) is not None
