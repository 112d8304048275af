"""Log-probabilities of chosen tokens from logits: one read in forward; one read and one write in backward."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashpo.kernels.token_stats import ENTROPY, LN2, LOG_Z, LOG_Z_REST, LOWEST, fold, log2_prob, store_stats
from flashpo.ops._check import check_range


@triton.jit(do_not_specialize=["T", "N", "ignore_index"], do_not_specialize_on_alignment=["index"])
def forward_kernel(
    logits,  # (B, T, V)
    index,  # (N,) with N = B T
    out,  # (4 or 7, N)
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
    n = row + tl.arange(0, 1)  # tensors of one row, so that tiles of one row and of many share their code
    N = N.to(tl.int64)
    target = tl.load(index + n)
    if tl.load(index + row) == ignore_index:
        for r in tl.static_range(7 if SIDE else 4):
            tl.store(out + N * r + n, tl.zeros((1,), tl.float32))
        return
    base = logits + (row // T) * stride_b + (row % T) * stride_t
    top = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    weighted, sq_sum, y_sum, before = total, total, total, top
    scales = tl.full((1,), 1.0, tl.float32) * scale
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(base + cols, mask=cols < V, other=float("-inf")).to(tl.float32)[None, :]
        top, total, weighted, sq_sum, y_sum, before = fold(
            top, total, weighted, sq_sum, y_sum, before, x, scales, cols, target, V, SIDE
        )
    x_target = tl.load(base + target).to(tl.float32)
    relative = (x_target - tl.maximum(top, LOWEST)) * scale
    is_top1 = (x_target >= top) & (x_target > before)
    store_stats(out, n, n < N, N, top * scale, total, weighted, relative, sq_sum, y_sum, is_top1, mean_scale, SIDE)


# Per-token arguments may be rows of one tensor, whose alignment varies with their length.
@triton.jit(
    do_not_specialize=["T", "N", "ignore_index"],
    do_not_specialize_on_alignment=["index", "d_logprob", "d_entropy"],
)
def backward_kernel(
    logits,
    index,
    rows,  # (4 or 7, N), as returned by forward
    d_logprob,  # (N,) or None
    d_entropy,  # (N,) or None
    d_logits,  # (B, T, V); may be the logits themselves, as each program reads only the elements that it writes
    T,
    N,
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
    x = tl.load(logits + (row // T) * stride_b + (row % T) * stride_t + cols, mask=cols < V, other=0.0)
    at = rows + row
    N = N.to(tl.int64)
    logp = log2_prob(x.to(tl.float32), scale, tl.load(at + N * LOG_Z), tl.load(at + N * LOG_Z_REST))
    p = tl.exp2(logp)
    d = tl.zeros((BLOCK,), tl.float32)
    if d_logprob is not None:
        d += tl.load(d_logprob + row) * ((cols == target).to(tl.float32) - p)
    if d_entropy is not None:
        d -= tl.load(d_entropy + row) * p * (logp * LN2 + tl.load(at + N * ENTROPY))
    tl.store(out, (d * inverse_temperature).to(d_logits.dtype.element_ty), mask=cols < V)


def block_and_warps(V: int, longest: int) -> tuple[int, int]:
    """At least 16 elements per thread, so that each thread has a few 16-byte loads in flight."""
    block = max(128, min(triton.next_power_of_2(V), longest))
    return block, max(1, min(block // 512, 16))


def _rows(*tensors: Tensor) -> tuple[int, ...]:
    """T and each tensor's (stride_b, stride_t). Evenly spaced rows count as one batch, so no stride depends on a
    length."""
    B, T, _ = tensors[0].shape
    if all(x.stride(0) == T * x.stride(1) for x in tensors):
        return B * T, *(stride for x in tensors for stride in (0, x.stride(1)))
    return T, *(stride for x in tensors for stride in x.stride()[:2])


def forward(logits: Tensor, index: Tensor, temperature: float, ignore_index: int, side: bool) -> Tensor:
    N, V = len(index), logits.shape[-1]
    check_range("index", index, V, ignore_index)
    rows = logits.new_empty((7 if side else 4, N), dtype=torch.float32)
    if N > 0:
        if logits.stride(-1) != 1:
            logits = logits.contiguous()
        T, stride_b, stride_t = _rows(logits)
        block, warps = block_and_warps(V, 8192)
        with torch.cuda.device_of(logits):
            forward_kernel[(N,)](
                logits,
                index.contiguous(),
                rows,
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
    return rows


def backward(
    d_logits: Tensor,
    logits: Tensor,
    index: Tensor,
    temperature: float,
    ignore_index: int,
    rows: Tensor,
    d_logprob: Tensor | None,
    d_entropy: Tensor | None,
) -> Tensor:
    """Write d_logits, whose last stride is 1. It may be `logits`."""
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
                rows.contiguous(),
                None if d_logprob is None else d_logprob.contiguous(),
                None if d_entropy is None else d_entropy.contiguous(),
                d_logits,
                T,
                N,
                V,
                *strides,
                math.log2(math.e) / temperature,
                1.0 / temperature,
                ignore_index,
                BLOCK=block,
                num_warps=warps,
            )
    return d_logits
