"""Log-probabilities of chosen tokens straight from logits: one read forward, one read and one write backward."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashpo.kernels.token_stats import LN2, LOG2E, LOWEST, fold, store_stats
from flashpo.ops._check import check_range


@triton.jit(do_not_specialize=["T", "N", "ignore_index"], do_not_specialize_on_alignment=["index"])
def forward_kernel(
    logits,  # (B, T, V)
    index,  # (N,) with N = B T
    out,  # (3 or 6, N)
    T,
    N,
    V,
    stride_b,
    stride_t,
    scale,  # log2(e) / temperature
    mean_scale,
    ignore_index,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    n = row + tl.arange(0, 1)  # rows of one, so that tiles of one row and of many share their code
    N = N.to(tl.int64)
    target = tl.load(index + n)
    if tl.load(index + row) == ignore_index:
        for r in tl.static_range(6 if SIDE else 3):
            tl.store(out + N * r + n, tl.zeros((1,), tl.float32))
        return
    base = logits + (row // T) * stride_b + (row % T) * stride_t
    ref = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    weighted, sq_sum, y_sum, before = total, total, total, ref
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        y = tl.load(base + cols, mask=cols < V, other=float("-inf")).to(tl.float32)[None, :] * scale
        ref, total, weighted, sq_sum, y_sum, before = fold(
            ref, total, weighted, sq_sum, y_sum, before, y, cols, target, V, SIDE
        )
    y_target = tl.load(base + target).to(tl.float32) * scale
    store_stats(out, n, n < N, N, ref, total, weighted, y_target, sq_sum, y_sum, before, ref, mean_scale, SIDE)


# per-token arguments may be rows of one tensor, whose alignment varies with their length
@triton.jit(
    do_not_specialize=["T", "ignore_index"],
    do_not_specialize_on_alignment=["index", "lse", "entropy", "d_logprob", "d_entropy"],
)
def backward_kernel(
    logits,
    index,
    lse,
    entropy,
    d_logprob,  # (N,) or None
    d_entropy,  # (N,) or None
    d_logits,  # (B, T, V): may be the logits themselves, every element is read by the program that writes it
    T,
    V,
    stride_b,
    stride_t,
    d_stride_b,
    d_stride_t,
    scale,
    inverse_temperature,
    ignore_index,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    out = d_logits + (row // T) * d_stride_b + (row % T) * d_stride_t + cols
    target = tl.load(index + row)
    if target == ignore_index:
        tl.store(out, tl.zeros((BLOCK,), d_logits.dtype.element_ty), mask=cols < V)
        return
    y = tl.load(logits + (row // T) * stride_b + (row % T) * stride_t + cols, mask=cols < V, other=0.0)
    logp = tl.maximum(y.to(tl.float32) * scale - tl.load(lse + row) * LOG2E, LOWEST)  # bits
    p = tl.exp2(logp)
    d = tl.zeros((BLOCK,), tl.float32)
    if d_logprob is not None:
        d += tl.load(d_logprob + row) * ((cols == target).to(tl.float32) - p)
    if d_entropy is not None:
        d -= tl.load(d_entropy + row) * p * (logp * LN2 + tl.load(entropy + row))
    tl.store(out, (d * inverse_temperature).to(d_logits.dtype.element_ty), mask=cols < V)


def block_and_warps(V: int, longest: int) -> tuple[int, int]:
    """At least 16 elements a thread, so that each has a few 16-byte loads in flight."""
    block = max(128, min(triton.next_power_of_2(V), longest))
    return block, max(1, min(block // 512, 16))


def _rows(*tensors: Tensor) -> tuple[int, ...]:
    """T and each tensor's (stride_b, stride_t); evenly spaced rows make one batch: no stride depends on a length."""
    B, T, _ = tensors[0].shape
    if all(x.stride(0) == T * x.stride(1) for x in tensors):
        return B * T, *(stride for x in tensors for stride in (0, x.stride(1)))
    return T, *(stride for x in tensors for stride in x.stride()[:2])


def forward(
    logits: Tensor, index: Tensor, temperature: float, ignore_index: int, side: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, V = len(index), logits.shape[-1]
    check_range("index", index, V, ignore_index)
    out = logits.new_empty((6 if side else 3, N), dtype=torch.float32)
    if N > 0:
        if logits.stride(-1) != 1:
            logits = logits.contiguous()
        T, stride_b, stride_t = _rows(logits)
        block, warps = block_and_warps(V, 8192)
        with torch.cuda.device_of(logits):
            forward_kernel[(N,)](
                logits,
                index.contiguous(),
                out,
                T,
                N,
                V,
                stride_b,
                stride_t,
                math.log2(math.e) / temperature,
                math.log(2.0) / V,
                ignore_index,
                SIDE=side,
                BLOCK=block,
                num_warps=warps,
            )
    return out[0], out[1], out[2], out[3:]


def backward(
    logits: Tensor,
    index: Tensor,
    temperature: float,
    ignore_index: int,
    lse: Tensor,
    entropy: Tensor,
    d_logprob: Tensor | None,
    d_entropy: Tensor | None,
    d_logits: Tensor,
) -> Tensor:
    """Writes d_logits, which has a unit last stride and may be `logits`."""
    N, V = len(index), logits.shape[-1]
    if N > 0:
        if logits.stride(-1) != 1:
            logits = logits.contiguous()
        T, *strides = _rows(logits, d_logits)
        block, warps = block_and_warps(V, 4096)
        with torch.cuda.device_of(logits):
            backward_kernel[(N, triton.cdiv(V, block))](
                logits,
                index.contiguous(),
                lse.contiguous(),
                entropy.contiguous(),
                None if d_logprob is None else d_logprob.contiguous(),
                None if d_entropy is None else d_entropy.contiguous(),
                d_logits,
                T,
                V,
                *strides,
                math.log2(math.e) / temperature,
                1.0 / temperature,
                ignore_index,
                BLOCK=block,
                num_warps=warps,
            )
    return d_logits
