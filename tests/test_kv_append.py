"""kv_append against indexing. Every slot of the caches is compared, whether it was written or not."""

import pytest
import torch
from inputs import DTYPES, backends, sanitized

import flashpo
from flashpo import kv_append

every_backend = pytest.mark.parametrize("backend", backends())
SLOTS = {
    "a decode step": [70, 3 * 64 + 63, 64, 500],
    "parked and skipped rows": [5, -1, 130, -1, 6, -7],
    "a prefill": [*range(2 * 64, 3 * 64), *range(5 * 64, 5 * 64 + 37), *range(7 * 64 + 3, 8 * 64)],
    "backwards": list(range(200, 100, -1)),
    "nothing": [],
}


def cache(tokens, heads, features, value_features, dtype):
    k, v = torch.randn(tokens, heads, features).to(dtype), torch.randn(tokens, heads, value_features).to(dtype)
    k_cache = torch.randn(8, heads, features, 64).to(dtype)
    v_cache = torch.randn(8, heads, 64, value_features).to(dtype)
    return k, v, k_cache, v_cache


def expected(k, v, k_cache, v_cache, slot):
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    for n, s in enumerate(slot.tolist()):
        if s >= 0:
            k_cache[s // 64, :, :, s % 64] = k[n]
            v_cache[s // 64, :, s % 64] = v[n]
    return k_cache, v_cache


@sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64, 64), (4, 80, 128), (3, 5, 1), (2, 256, 13)], ids=str)
@pytest.mark.parametrize("slots", SLOTS)
def test_slots(backend, dtype, shape, slots):
    slot = torch.tensor(SLOTS[slots], dtype=torch.int64)
    k, v, k_cache, v_cache = cache(len(slot), *shape, dtype)
    wanted = expected(k, v, k_cache, v_cache, slot)
    flashpo.stats(reset=True)
    with flashpo.backend(backend):
        kv_append(k, v, k_cache, v_cache, slot)
    assert flashpo.stats() == {"kv_append_": {backend: 1}}
    assert torch.equal(k_cache, wanted[0])
    assert torch.equal(v_cache, wanted[1])


@sanitized
def test_strided_inputs(backend):
    """Views of a fused projection, as models have them: (B, heads, 1, D) of (B, 1, heads * D)."""
    slot = torch.tensor([64, 130, -1, 300])
    _, _, k_cache, v_cache = cache(0, 2, 16, 16, torch.float32)
    k, v = torch.randn(4, 1, 4, 16).transpose(1, 2).squeeze(2).split(2, 1)
    keys_first = torch.randn(16, 2, 4).permute(2, 1, 0)
    for x, y in ((k, v), (keys_first, v), (k, keys_first)):
        wanted = expected(x, y, k_cache, v_cache, slot)
        with flashpo.backend(backend):
            kv_append(x, y, k_cache, v_cache, slot[:, None].expand(-1, 2)[:, 0])
        assert torch.equal(k_cache, wanted[0])
        assert torch.equal(v_cache, wanted[1])


@sanitized
def test_bad_arguments_raise(backend):
    if backend == "triton":
        pytest.skip("device assertions end the process")
    k, v, k_cache, v_cache = cache(2, 2, 16, 8, torch.float32)
    slot = torch.tensor([3, 8 * 64])
    with flashpo.backend(backend), pytest.raises(ValueError, match="slot"):
        kv_append(k, v, k_cache, v_cache, slot)
    slot = torch.tensor([3, 4])
    good = {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "slot": slot}
    for name, bad, error in (
        ("k", k[:1], ValueError), ("k", k.double(), TypeError), ("v", v[..., :7], ValueError),
        ("v_cache", v_cache[:7], ValueError), ("v_cache", v_cache.half(), TypeError),
        ("k_cache", k_cache[..., :32], ValueError), ("k_cache", k_cache.long(), TypeError),
        ("k_cache", k_cache.transpose(0, 1).contiguous().transpose(0, 1), ValueError),
        ("slot", slot.int(), TypeError), ("slot", slot[None], ValueError),
    ):  # fmt: skip
        with pytest.raises(error, match=f"^{name} "):
            kv_append(**{**good, name: bad})
    with pytest.raises(ValueError, match="no_grad"):
        kv_append(**{**good, "k": k.clone().requires_grad_()})


@every_backend
def test_compiles_into_one_graph(backend, graphs, counting):
    compiled = torch.compile(kv_append, backend=counting, fullgraph=True, dynamic=True)
    with flashpo.backend(backend):
        for slots in ("a decode step", "a prefill"):
            slot = torch.tensor(SLOTS[slots])
            k, v, k_cache, v_cache = cache(len(slot), 2, 16, 8, torch.float32)
            wanted = expected(k, v, k_cache, v_cache, slot)
            compiled(k, v, k_cache, v_cache, slot)
            assert torch.equal(k_cache, wanted[0])
            assert torch.equal(v_cache, wanted[1])
    assert len(graphs) == 1
