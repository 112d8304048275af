"""Writing keys and values of new tokens into the paged KV cache of one layer.

A block holds 64 consecutive tokens. For one head it is a tile: keys are transposed, (D, 64), so that the 64 keys are
contiguous for each feature; values are (64, Dv).
"""

import torch
from torch import Tensor

from flashpo._op import native, op
from flashpo.ops._check import KERNEL_DTYPES, check_device, check_dtype, check_float, check_tensor, check_that
from flashpo.ops._layout import dense_rows

BLOCK = 64  # tokens


def check_caches(k_cache: Tensor, v_cache: Tensor) -> None:
    """Check caches (blocks, Hkv, D, 64) and (blocks, Hkv, 64, Dv): of one dtype, contiguous."""
    check_float("k_cache", k_cache)
    check_float("v_cache", v_cache)
    if k_cache.dim() != 4 or k_cache.shape[3] != BLOCK:
        raise ValueError(f"k_cache must be (blocks, Hkv, D, {BLOCK}), got {tuple(k_cache.shape)}")
    blocks, heads = k_cache.shape[:2]
    if v_cache.dim() != 4 or v_cache.shape[:3] != (blocks, heads, BLOCK):
        raise ValueError(f"v_cache must be ({blocks}, {heads}, {BLOCK}, Dv), got {tuple(v_cache.shape)}")
    if v_cache.dtype != k_cache.dtype:
        raise TypeError(f"v_cache must be {k_cache.dtype} as k_cache is, got {v_cache.dtype}")
    check_device("v_cache", v_cache, "k_cache", k_cache)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not cache.is_contiguous():
            raise ValueError(f"{name} must be contiguous")


def kv_append(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot: Tensor) -> None:
    """Write token n's keys k[n] and values v[n] into slot[n] of the caches.

    k_cache[slot // 64, :, :, slot % 64] = k      v_cache[slot // 64, :, slot % 64, :] = v

    Args:
        k: (N, Hkv, D) in the caches' dtype: the tokens of a decode step or of a prefill.
        v: (N, Hkv, Dv), likewise.
        k_cache: (blocks, Hkv, D, 64) float32, bfloat16 or float16 (float64: reference only), contiguous; written to.
        v_cache: (blocks, Hkv, 64, Dv), likewise.
        slot: (N,) int64, block * 64 + offset. A token with a negative slot is skipped. The slots of a call are
            distinct, except where it does not matter which token remains: by convention nobody reads block 0.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices disagree; k or v requires grad outside of torch.no_grad(); a
            slot is beyond the cache (on CUDA: an asynchronous device assertion).
    """
    check_caches(k_cache, v_cache)
    check_dtype("slot", slot, torch.int64)
    if slot.dim() != 1:
        raise ValueError(f"slot must be (N,), got {tuple(slot.shape)}")
    for name, x, cache_name, cache, features in (("k", k, "k_cache", k_cache, 2), ("v", v, "v_cache", v_cache, 3)):
        check_tensor(name, x)
        if x.dtype != cache.dtype:
            raise TypeError(f"{name} must be {cache.dtype} as {cache_name} is, got {x.dtype}")
        wanted = (slot.shape[0], cache.shape[1], cache.shape[features])
        if x.shape != wanted:
            raise ValueError(f"{name} must be {wanted}, got {tuple(x.shape)}")
        check_device(name, x, cache_name, cache)
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires grad, but kv_append has no gradient: call it under torch.no_grad()")
    check_device("slot", slot, "k_cache", k_cache)
    kv_append_(k, v, k_cache, v_cache, slot)


@op(mutates=("k_cache", "v_cache"))
def kv_append_(
    k: Tensor,  # (N, Hkv, D)
    v: Tensor,  # (N, Hkv, Dv)
    k_cache: Tensor,
    v_cache: Tensor,
    slot: Tensor,  # (N,)
) -> None:
    check_that((slot < k_cache.shape[0] * BLOCK).all(), "slot holds values beyond the cache")
    live = slot >= 0
    block, offset = slot[live] // BLOCK, slot[live] % BLOCK
    k_cache[block, :, :, offset] = k[live]
    v_cache[block, :, offset] = v[live]


@kv_append_.fake
def _(*args):
    return None


@kv_append_.backend("native")  # csrc/cpu/kv_append.cpp
def _(k, v, k_cache, v_cache, slot):
    if k.device.type != "cpu" or k.dtype not in KERNEL_DTYPES:
        return NotImplemented
    native.kv_append(dense_rows(k), dense_rows(v), k_cache, v_cache, slot.contiguous(), torch.get_num_threads())


@kv_append_.backend("triton")  # kernels/kv_append.py
def _(k, *rest):
    if k.dtype not in KERNEL_DTYPES:
        return NotImplemented
    from flashpo.kernels.kv_append import append

    append(k, *rest)
