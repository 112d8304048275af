"""The operators of a decoder layer against transformers' own modules, and against float64."""

import pytest
import torch
from accuracy import assert_as_accurate
from inputs import DTYPES, sanitized
from torch.nn import functional as F
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

import flashpo
from flashpo import kv_append
from flashpo.ops.decode_layer import add_rms_norm, gated_activation, rope_append

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SIZES = [(1, 1), (3, 16), (5, 97), (33, 1030)]


@sanitized
@dtypes
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize(("rows", "features"), SIZES)
def test_norm(backend, dtype, rows, features, unit_offset, poisoned):
    norm = (Gemma2RMSNorm if unit_offset else LlamaRMSNorm)(features, eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x, residual = (3 * torch.randn(rows, features).to(dtype) for _ in range(2))
    with torch.no_grad(), flashpo.backend(backend):
        for given in (residual, None):
            out, total = add_rms_norm(x, given, norm.weight, eps=1e-5, unit_offset=unit_offset)
            wanted = x if given is None else x + given
            assert torch.equal(total, wanted)
            assert_as_accurate(out, norm.double()(wanted.double()), norm.to(dtype)(wanted))


@sanitized
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("features", [32, 27])
@pytest.mark.parametrize("wide", ["weight", "residual", "weight and residual"])
def test_norm_of_mixed_dtypes(backend, dtype, unit_offset, features, wide, poisoned):
    """What is not fp32 has x's dtype. Bit for bit what the reference gives, but for the order of a sum in fp32."""
    x, residual = 3 * torch.randn(2, 7, features)
    weight = torch.randn(features)
    residual = residual if "residual" in wide else residual.to(dtype)
    weight = weight if "weight" in wide else weight.to(dtype)
    for given in (residual, None):
        with flashpo.backend("torch"):
            expected = add_rms_norm(x.to(dtype), given, weight, eps=1e-5, unit_offset=unit_offset)
        with flashpo.backend(backend):
            out, total = add_rms_norm(x.to(dtype), given, weight, eps=1e-5, unit_offset=unit_offset)
        assert (out.dtype, total.dtype) == (expected[0].dtype, expected[1].dtype)
        assert torch.equal(total, expected[1])
        torch.testing.assert_close(out, expected[0], rtol=torch.finfo(dtype).eps, atol=0)


@sanitized
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("wide", ["angles", "weights", "angles and weights"])
@pytest.mark.parametrize(("features", "turned"), [(32, 32), (27, 10)])
def test_rope_of_mixed_dtypes(backend, dtype, unit_offset, wide, features, turned, poisoned):
    rows, heads = 5, 3
    q, k, v = torch.randn(3, rows, heads * features).to(dtype)
    weights = torch.randn(2, features).to(torch.float32 if "weights" in wide else dtype)
    angles = turns(rows, turned, torch.float32 if "angles" in wide else dtype)
    results = []
    for name in ("torch", backend):
        caches = torch.zeros(1, heads, features, 64, dtype=dtype), torch.zeros(1, heads, 64, features, dtype=dtype)
        for of_q, of_k in ((None, None), weights):
            options = dict(q_weight=of_q, k_weight=of_k, unit_offset=unit_offset)
            with flashpo.backend(name):
                results.append((rope_append(q, k, v, *angles, *caches, torch.arange(rows), **options), *caches))
                caches = tuple(x.clone() for x in caches)
    for expected, got in zip(results[:2], results[2:]):
        for x, y in zip(got, expected):
            assert x.dtype == dtype
            # a sum of two products: as exact as its terms are
            torch.testing.assert_close(x, y, rtol=torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@sanitized
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(backend, dtype):
    """Products in 16 bit, all else in fp32: bit for bit what transformers' modules give, rounded where a product is."""
    rows, heads, features = 5, 3, 32
    norm, of_head = LlamaRMSNorm(heads * features), LlamaRMSNorm(features)
    for module in (norm, of_head):
        torch.nn.init.normal_(module.weight)
    x, q, k, v = torch.randn(4, rows, heads * features).to(dtype)
    residual, (cos, sin) = torch.randn(rows, heads * features), turns(rows, features, torch.float32)
    caches = torch.zeros(1, heads, features, 64, dtype=dtype), torch.zeros(1, heads, 64, features, dtype=dtype)
    with torch.no_grad():
        expected = norm(x + residual).to(dtype)
        turned = (of_head(y.unflatten(1, (heads, features)))[:, :, None] for y in (q, k))
        turned = [y[:, :, 0].to(dtype) for y in apply_rotary_pos_emb(*turned, cos[:, None], sin[:, None])]
        with flashpo.backend(backend):
            out, total = add_rms_norm(x, residual, norm.weight, eps=norm.variance_epsilon)
            weights = dict(q_weight=of_head.weight, k_weight=of_head.weight, eps=of_head.variance_epsilon)
            query = rope_append(q, k, v, cos, sin, *caches, torch.arange(rows), **weights)
    assert torch.equal(total, x + residual)
    assert out.dtype == query.dtype == dtype
    for ours, theirs in ((out, expected), (query, turned[0]), (caches[0][0, :, :, :rows].permute(2, 0, 1), turned[1])):
        torch.testing.assert_close(ours, theirs, rtol=torch.finfo(dtype).eps, atol=0)  # an fp32 sum in another order
    assert torch.equal(caches[1][0, :, :rows].transpose(0, 1), v.unflatten(1, (heads, features)))


def turns(rows, features, dtype):
    angles = torch.rand(rows, features // 2) * 100
    angles = torch.cat([angles, angles], 1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@sanitized
@dtypes
@pytest.mark.parametrize("norm", [None, "llama", "gemma"])
@pytest.mark.parametrize(("heads", "kv_heads", "features", "turned"), [(4, 2, 64, 64), (3, 1, 24, 10), (2, 2, 80, 80)])
def test_rope(backend, dtype, heads, kv_heads, features, turned, norm, poisoned):
    rows, blocks = 7, 4
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * features).to(dtype)  # parts of one product: strided rows
    cos, sin = turns(rows, turned, dtype)
    slot = torch.randperm(blocks * 64)[:rows]
    slot[2] = -1
    options = {}
    norms = [torch.nn.Identity(), torch.nn.Identity()]
    if norm is not None:
        norms = [(LlamaRMSNorm if norm == "llama" else Gemma2RMSNorm)(features, eps=1e-6).to(dtype) for _ in "qk"]
        for module in norms:
            torch.nn.init.normal_(module.weight)
        options = dict(q_weight=norms[0].weight, k_weight=norms[1].weight, unit_offset=norm == "gemma")

    def plain(wide):
        q, k, v = qkv.to(wide).unflatten(1, (-1, features)).split([heads, kv_heads, kv_heads], 1)
        q, k = (module.to(wide)(x)[:, :, None] for module, x in zip(norms, (q, k)))
        out = apply_rotary_pos_emb(q[..., :turned], k[..., :turned], cos.to(wide)[:, None], sin.to(wide)[:, None])
        q, k = (torch.cat([a, b[..., turned:]], -1)[:, :, 0] for a, b in zip(out, (q, k)))
        return q, k, v

    with torch.no_grad():
        exact, baseline = plain(torch.float64), plain(dtype)
        caches = (
            torch.full((blocks, kv_heads, features, 64), 7.0).to(dtype),
            torch.full((blocks, kv_heads, 64, features), 7.0).to(dtype),
        )
        expected = [x.clone() for x in caches]
        kv_append(baseline[1].contiguous(), baseline[2].contiguous(), *expected, slot)
        with flashpo.backend(backend):
            parts = qkv.split([heads * features, kv_heads * features, kv_heads * features], 1)
            q = rope_append(*parts, cos, sin, *caches, slot, **options)
    assert_as_accurate(q, exact[0], baseline[0])
    live = slot >= 0
    written = caches[0][slot[live] // 64, :, :, slot[live] % 64]
    assert_as_accurate(written, exact[1][live], baseline[1][live])
    assert torch.equal(caches[1], expected[1])
    assert torch.equal(caches[0] == 7, expected[0] == 7)


@sanitized
@dtypes
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "features"), SIZES)
def test_gated(backend, dtype, rows, features, activation, poisoned):
    x = (4 * torch.randn(rows, 2 * features)).to(dtype)
    x[0, 0] = -200
    function = F.silu if activation == "silu" else (lambda g: F.gelu(g, approximate="tanh"))
    gate, up = x.chunk(2, 1)
    with flashpo.backend(backend):
        out = gated_activation(gate, up, activation=activation)
    assert_as_accurate(out, function(gate.double()) * up.double(), function(gate) * up)


@pytest.mark.native
def test_errors():
    x, weight = torch.randn(2, 8), torch.randn(8)
    with pytest.raises(ValueError, match="residual must be"):
        add_rms_norm(x, x[:1], weight, eps=1e-5)
    with pytest.raises(ValueError, match="weight must be"):
        add_rms_norm(x, x, weight.bfloat16(), eps=1e-5)
    with pytest.raises(ValueError, match="residual must be"):
        add_rms_norm(x.half(), x.bfloat16(), weight, eps=1e-5)
    with pytest.raises(ValueError, match="up must be"):
        gated_activation(x, x[:, :5])
    with pytest.raises(ValueError, match="activation must be one of"):
        gated_activation(x, x, activation="relu")
    cache = torch.zeros(2, 1, 4, 64), torch.zeros(2, 1, 64, 4)
    angle, slot = torch.zeros(2, 4), torch.zeros(2, dtype=torch.long)
    q, k, v = torch.randn(2, 8), torch.randn(2, 4), torch.randn(2, 4)
    with pytest.raises(ValueError, match="q must be"):
        rope_append(q[:, :7], k, v, angle, angle, *cache, slot)
    with pytest.raises(ValueError, match="v must be"):
        rope_append(q, k, q, angle, angle, *cache, slot)
    with pytest.raises(ValueError, match="cos must be"):
        rope_append(q, k, v, angle[:, :3], angle[:, :3], *cache, slot)
    with pytest.raises(ValueError, match="both or neither"):
        rope_append(q, k, v, angle, angle, *cache, slot, q_weight=torch.ones(4))
    with pytest.raises(ValueError, match="slot holds values beyond"):
        rope_append(q, k, v, angle, angle, *cache, slot + 128)
