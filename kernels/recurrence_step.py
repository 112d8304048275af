"""One token of a recurrence for each row: a program holds the state of one head, or a block of its columns."""

import torch
import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 4096  # of a state that one program holds


@triton.jit(do_not_specialize=["scale"])
def step_kernel(
    state,  # (rows, heads, DK, DV) in one of two layouts
    q,  # (rows, key_heads, DK)
    k,
    v,  # (rows, heads, DV)
    decay,  # (rows, heads), or (rows, heads, DK)
    beta,  # (rows, heads) or None
    out,  # (rows, heads, DV)
    scale,
    group: tl.constexpr,  # heads / key_heads
    STRIDE_K: tl.constexpr,
    STRIDE_V: tl.constexpr,
    DECAY_OF_FEATURES: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)  # of all rows
    key_head = head // group
    i, j = tl.arange(0, BLOCK_K), tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    there = (i < DK)[:, None] & (j < DV)[None, :]
    at = state + head * DK * DV + i[:, None] * STRIDE_K + j[None, :] * STRIDE_V
    s = tl.load(at, mask=there, other=0.0)
    if DECAY_OF_FEATURES:
        s *= tl.exp(tl.load(decay + head * DK + i, mask=i < DK, other=0.0))[:, None]
    else:
        s *= tl.exp(tl.load(decay + head))
    key = tl.load(k + key_head * DK + i, mask=i < DK, other=0.0)
    u = tl.load(v + head * DV + j, mask=j < DV, other=0.0)
    if beta is not None:
        u = tl.load(beta + head) * (u - tl.sum(s * key[:, None], 0))
    s += key[:, None] * u[None, :]
    tl.store(at, s, mask=there)
    query = tl.load(q + key_head * DK + i, mask=i < DK, other=0.0)
    tl.store(out + head * DV + j, scale * tl.sum(s * query[:, None], 0), mask=j < DV)


def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None, scale: float) -> Tensor:
    rows, heads, DK, DV = state.shape
    out = v.new_empty(v.shape)
    if out.numel() == 0:
        return out
    BLOCK_K = triton.next_power_of_2(DK)
    BLOCK_V = min(triton.next_power_of_2(DV), max(NUMBERS // BLOCK_K, 16))
    with torch.cuda.device_of(state):
        step_kernel[(rows * heads, triton.cdiv(DV, BLOCK_V))](
            state,
            q.contiguous(),
            k.contiguous(),
            v.contiguous(),
            decay.contiguous(),
            None if beta is None else beta.contiguous(),
            out,
            scale,
            group=heads // q.shape[1],
            STRIDE_K=state.stride(2),
            STRIDE_V=state.stride(3),
            DECAY_OF_FEATURES=decay.dim() == 3,
            DK=DK,
            DV=DV,
            BLOCK_K=BLOCK_K,
            BLOCK_V=BLOCK_V,
            num_warps=4,
            sanitize_overflow=False,
        )
    return out
