"""Partial sums over a vocabulary, folded tile by tile and joined part by part: `flashpo.ops.token_stats` in Triton.

Everything is fp32 and in bits: y = z log2(e). A partial is a pointer to (R, N) floats, R = 8 with side outputs, else 4.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
LN2: tl.constexpr = tl.constexpr(math.log(2.0))
# The lower bound for differences of logits: 0 * -inf would be NaN, but 0 * LOWEST is 0.
LOWEST: tl.constexpr = tl.constexpr(-1e30)
REF, SUM, WSUM, TARGET, SQSUM, YSUM, BEFORE, MAX = (tl.constexpr(row) for row in range(8))
LOGPROB, ENTROPY, LOG_Z, LOG_Z_REST = (tl.constexpr(row) for row in range(4))


@triton.jit
def fold(top, total, weighted, sq_sum, y_sum, before, x, scale, cols, target, vocab, SIDE: tl.constexpr):
    """Add the tile x (R, C) of columns `cols` to the sums (R,); y = x scale (R,). x is -inf where cols >= vocab.

    `top` and `before` are the largest x so far, not in bits: (x - top) scale is exactly 0 for the largest x. With
    x scale - top scale, a compiler could make a fused multiply-add, which rounds otherwise.
    """
    raised = tl.maximum(top, tl.max(x, 1))
    base = tl.maximum(raised, LOWEST)  # finite even if all logits so far are -inf
    shifted = tl.maximum((x - base[:, None]) * scale[:, None], LOWEST)
    e = tl.exp2(shifted)
    shift = tl.maximum((top - base) * scale, LOWEST)
    rescale = tl.exp2(shift)
    weighted = (weighted + shift * total) * rescale + tl.sum(e * shifted, 1)
    total = total * rescale + tl.sum(e, 1)
    if SIDE:
        sq_sum = sq_sum * rescale * rescale + tl.sum(e * e, 1)
        y_sum += tl.sum(tl.where(cols[None, :] < vocab, x, 0.0), 1) * scale
        before = tl.maximum(before, tl.max(tl.where(cols[None, :] < target[:, None], x, float("-inf")), 1))
    return raised, total, weighted, sq_sum, y_sum, before


@triton.jit
def log2_prob(x, scale, log_z, log_z_rest):
    """log2 of the softmax, from the rows of `store_stats`; finite for -inf. The first maximum also prevents the fusion
    of x scale - log_z, which must be exactly 0 for the largest logit: log_z is that rounded product."""
    y = tl.maximum(x * scale, LOWEST)
    return tl.maximum((y - tl.maximum(log_z, LOWEST)) - log_z_rest, LOWEST)


@triton.jit
def join(partials, n, inside, N, S, SIDE: tl.constexpr):
    """Rows REF ... MAX of the partial that joins S parts (S, R, N), at tokens n. Parts are added in their order."""
    R: tl.constexpr = 8 if SIDE else 4
    ref = tl.full(n.shape, float("-inf"), tl.float32)
    for s in range(S):
        ref = tl.maximum(ref, tl.load(partials + N * R * s + n, mask=inside, other=0.0))
    base = tl.maximum(ref, LOWEST)
    total = tl.zeros(n.shape, tl.float32)
    weighted, sq_sum, y_sum = total, total, total
    target = tl.full(n.shape, float("-inf"), tl.float32)
    before, top = target, target
    for s in range(S):
        part = partials + N * R * s + n
        shift = tl.maximum(tl.load(part, mask=inside, other=0.0) - base, LOWEST)
        scale = tl.exp2(shift)
        part_total = tl.load(part + N * SUM, mask=inside, other=1.0)
        total += part_total * scale
        weighted += (tl.load(part + N * WSUM, mask=inside, other=0.0) + shift * part_total) * scale
        target = tl.maximum(target, tl.load(part + N * TARGET, mask=inside, other=0.0) + shift)
        if SIDE:
            sq_sum += tl.load(part + N * SQSUM, mask=inside, other=1.0) * scale * scale
            y_sum += tl.load(part + N * YSUM, mask=inside, other=0.0)
            before = tl.maximum(before, tl.load(part + N * BEFORE, mask=inside, other=0.0) + shift)
            top = tl.maximum(top, tl.load(part + N * MAX, mask=inside, other=0.0) + shift)
    return ref, total, weighted, target, sq_sum, y_sum, before, top


@triton.jit
def store_partial(out, n, inside, N, ref, total, weighted, target, sq_sum, y_sum, before, top, SIDE: tl.constexpr):
    tl.store(out + n, ref, mask=inside)
    tl.store(out + N * SUM + n, total, mask=inside)
    tl.store(out + N * WSUM + n, weighted, mask=inside)
    tl.store(out + N * TARGET + n, target, mask=inside)
    if SIDE:
        tl.store(out + N * SQSUM + n, sq_sum, mask=inside)
        tl.store(out + N * YSUM + n, y_sum, mask=inside)
        tl.store(out + N * BEFORE + n, before, mask=inside)
        tl.store(out + N * MAX + n, top, mask=inside)


@triton.jit
def store_stats(
    out, n, inside, N, ref, total, weighted, target, sq_sum, y_sum, is_top1, mean_scale, SIDE: tl.constexpr
):
    """Store the rows LOGPROB ... LOG_Z_REST and the side outputs of whole tokens into `out` (4 or 7, N)."""
    bits = tl.log2(total)
    tl.store(out + N * LOGPROB + n, (target - bits) * LN2, mask=inside)
    tl.store(out + N * ENTROPY + n, (bits - weighted / total) * LN2, mask=inside)
    tl.store(out + N * LOG_Z + n, ref, mask=inside)
    tl.store(out + N * LOG_Z_REST + n, bits, mask=inside)
    if SIDE:
        tl.store(out + N * 4 + n, (tl.log2(sq_sum) - 2 * bits) * LN2, mask=inside)
        tl.store(out + N * 5 + n, y_sum * mean_scale, mask=inside)
        tl.store(out + N * 6 + n, is_top1.to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["N", "S"])
def merge_partials_kernel(partials, out, N, S, mean_scale, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    N = N.to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    ref, total, weighted, target, sq_sum, y_sum, before, top = join(partials, n, inside, N, S, SIDE)
    is_top1 = (target >= top) & (target > before)
    store_stats(out, n, inside, N, ref, total, weighted, target, sq_sum, y_sum, is_top1, mean_scale, SIDE)


def merge_partials(partials: Tensor, vocab: int) -> Tensor:
    S, R, N = partials.shape
    rows = partials.new_empty((7 if R == 8 else 4, N))
    if N > 0:
        with torch.cuda.device_of(partials):
            merge_partials_kernel[(triton.cdiv(N, 128),)](
                partials.contiguous(), rows, N, S, math.log(2.0) / vocab, SIDE=R == 8, BLOCK=128
            )
    return rows
