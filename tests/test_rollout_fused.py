"""The fused forward of prefills and decode steps equals the modules' own, and is not used where it would differ."""

import copy

import pytest
import torch
from accuracy import assert_as_accurate
from rollout_models import FAMILIES, forward_logprobs, model, prompts, with_ligers_layers

import flashpo
from flashpo.bench.tiny_models import tiny_model
from flashpo.ops.packed_linear import packs
from flashpo.rollout import RolloutEngine, SamplingParams
from flashpo.rollout.fused import FusedBackbone, fused_backbone
from flashpo.rollout.weights import ShadowLinear

TEMPERATURE = 0.8
FUSED = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")


@pytest.fixture
def calls(monkeypatch):
    seen = []
    original = FusedBackbone.__call__
    monkeypatch.setattr(FusedBackbone, "__call__", lambda self, step: seen.append(step) or original(self, step))
    return seen


def rollouts(net, weights, monkeypatch=None, autocast=None):
    if monkeypatch is not None:
        monkeypatch.setattr("flashpo.rollout.engine.fused_backbone", lambda *args: None)
    engine = RolloutEngine(net, weights=weights, fallback="error", check=False, autocast=autocast)
    return engine.generate(prompts(5, 70, 131), SamplingParams(n=3, max_new_tokens=40, temperature=TEMPERATURE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [f for f in FUSED if f in FAMILIES])
@pytest.mark.parametrize("weights", ["alias", "shadow"])
def test_the_same_as_the_modules(weights, family, dtype, calls, monkeypatch):
    net = model(family).to(dtype)
    try:
        flashpo.stats(reset=True)
        ours = rollouts(net, weights)
        whole = sum(flashpo.stats().get("decode_layers_", {}).values())
        packed = weights == "shadow" and packs(net.lm_head.weight) and family != "qwen3_moe"
        assert whole == (ours.stats.steps if packed else 0)
        assert len(calls) == 1 + ours.stats.steps > 1, "one prefill and the steps"
        theirs = rollouts(net, weights, monkeypatch)
    finally:
        net.float()
    assert len(calls) == 1 + ours.stats.steps
    if dtype == torch.float32:
        assert ours.completion_ids == theirs.completion_ids
        net = copy.deepcopy(net).double()
        sequences = zip(ours.prompt_ids, ours.completion_ids)
        exact = torch.stack([forward_logprobs(net, *sequence, TEMPERATURE) for sequence in sequences])
        assert_as_accurate(torch.tensor(ours.logprobs), exact, torch.tensor(theirs.logprobs))
        return
    assert_alike(ours, theirs)


def assert_alike(ours, theirs):
    """Up to where another token was drawn."""
    for a, b, x, y in zip(ours.logprobs, theirs.logprobs, ours.completion_ids, theirs.completion_ids):
        alike = next((i for i, (u, v) in enumerate(zip(x, y)) if u != v), len(x))
        torch.testing.assert_close(torch.tensor(a[:alike]), torch.tensor(b[:alike]), rtol=0, atol=0.1)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_same_as_the_modules_under_autocast(packed, family, calls, monkeypatch):
    if not packed:  # as on a GPU
        monkeypatch.setattr("flashpo.rollout.weights.packed_linear", lambda *args: None)
    products = []
    original = ShadowLinear.__call__
    monkeypatch.setattr(
        ShadowLinear, "__call__", lambda self, x: products.append(len(self.weight)) or original(self, x)
    )
    net = model(family)
    ours = rollouts(net, "auto", None, torch.bfloat16)
    if not packed:
        alone = {m.out_features for m in net.modules() if isinstance(m, torch.nn.Linear)}
        together = sum(rows not in alone for rows in products)
        assert together == 2 * len(net.base_model.layers) * (1 + ours.stats.steps), "q, k and v, and gate and up"
    assert len(calls) == 1 + ours.stats.steps
    assert_alike(ours, rollouts(net, "auto", monkeypatch, torch.bfloat16))


def test_ligers_forms_of_the_same_layers_are_fused_too(monkeypatch):
    net = with_ligers_layers(copy.deepcopy(model("qwen3")), monkeypatch)
    assert fused_backbone(net.base_model, torch.float32) is not None
    net.base_model.norm.forward = lambda x: x
    assert fused_backbone(net.base_model, torch.float32) is None


def test_other_shapes_hooks_and_routers_under_autocast_are_left_to_the_modules():
    net = model("qwen3")
    backbone = net.base_model
    assert fused_backbone(backbone, torch.float32) is not None
    routed = tiny_model("qwen3_moe").base_model
    assert fused_backbone(routed, torch.float32) is not None
    assert fused_backbone(routed, torch.bfloat16) is None, "the residual stream is fp32"
    for module in (backbone.layers[0], backbone.norm, backbone.layers[1].self_attn.q_norm):
        hook = module.register_forward_hook(lambda *args: None)
        assert fused_backbone(backbone, torch.float32) is None
        hook.remove()
    assert fused_backbone(backbone, torch.float32) is not None
    assert fused_backbone(model("gemma2").base_model, torch.float32) is None
