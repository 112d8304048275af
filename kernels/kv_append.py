"""Writing keys and values of new tokens into their slots of the paged KV cache; one program per token and head."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK: tl.constexpr = tl.constexpr(64)  # tokens in a block of the cache


@triton.jit
def place(slots, n, limit, head, heads: tl.constexpr):
    """Where a head of token n goes: the first token index of its tile, the offset in the tile, and whether to write
    it."""
    slot = tl.load(slots + n)
    tl.device_assert(slot < limit, "slot holds values beyond the cache")
    return (slot // BLOCK * heads + head) * BLOCK, slot % BLOCK, (slot >= 0) & (slot < limit)


@triton.jit(do_not_specialize=["limit"], do_not_specialize_on_alignment=["slots"])
def append_kernel(
    k,  # (N, heads, D)
    v,  # (N, heads, DV)
    k_cache,  # (blocks, heads, D, 64)
    v_cache,  # (blocks, heads, 64, DV)
    slots,  # (N,)
    limit,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    heads: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    n, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    tile, offset, live = place(slots, n, limit, head, heads)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    key = tl.load(k + n * stride_k + head * stride_k_head + d, mask=d < D)
    tl.store(k_cache + tile * D + d * BLOCK + offset, key, mask=live & (d < D))
    value = tl.load(v + n * stride_v + head * stride_v_head + dv, mask=dv < DV)
    tl.store(v_cache + (tile + offset) * DV + dv, value, mask=live & (dv < DV))


def append(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot: Tensor) -> None:
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    blocks, heads, D = k_cache.shape[:3]
    DV = v_cache.shape[3]
    if len(slot) == 0:
        return
    with torch.cuda.device_of(k):
        append_kernel[(len(slot) * heads,)](
            k,
            v,
            k_cache,
            v_cache,
            slot.contiguous(),
            blocks * BLOCK.value,
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            heads=heads,
            D=D,
            DV=DV,
            BLOCK_D=triton.next_power_of_2(D),
            BLOCK_DV=triton.next_power_of_2(DV),
            num_warps=1,
            debug=True,  # keeps the device assertion
            sanitize_overflow=False,
        )
