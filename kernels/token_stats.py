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
# -inf times a weight of 0 would be NaN, this is 0: differences of logits end here
LOWEST: tl.constexpr = tl.constexpr(-1e30)
REF, SUM, WSUM, TARGET, SQSUM, YSUM, BEFORE, MAX = (tl.constexpr(row) for row in range(8))


@triton.jit
def fold(ref, total, weighted, sq_sum, y_sum, before, y, cols, target, vocab, SIDE: tl.constexpr):
    """Add the tile y (R, C) of columns `cols` to the sums (R,) so far; y is -inf where cols >= vocab."""
    top = tl.maximum(ref, tl.max(y, 1))
    base = tl.maximum(top, LOWEST)  # finite even if all logits so far are -inf
    shifted = tl.maximum(y - base[:, None], LOWEST)
    e = tl.exp2(shifted)
    shift = tl.maximum(ref - base, LOWEST)
    scale = tl.exp2(shift)
    weighted = (weighted + shift * total) * scale + tl.sum(e * shifted, 1)
    total = total * scale + tl.sum(e, 1)
    if SIDE:
        sq_sum = sq_sum * scale * scale + tl.sum(e * e, 1)
        y_sum += tl.sum(tl.where(cols[None, :] < vocab, y, 0.0), 1)
        before = tl.maximum(before, tl.max(tl.where(cols[None, :] < target[:, None], y, float("-inf")), 1))
    return top, total, weighted, sq_sum, y_sum, before


@triton.jit
def join(partials, n, inside, N, S, SIDE: tl.constexpr):
    """Rows REF ... MAX of the partial of S parts, partials (S, R, N), at tokens n; parts are added in their order."""
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
        target = tl.maximum(target, tl.load(part + N * TARGET, mask=inside, other=0.0))
        if SIDE:
            sq_sum += tl.load(part + N * SQSUM, mask=inside, other=1.0) * scale * scale
            y_sum += tl.load(part + N * YSUM, mask=inside, other=0.0)
            before = tl.maximum(before, tl.load(part + N * BEFORE, mask=inside, other=0.0))
            top = tl.maximum(top, tl.load(part + N * MAX, mask=inside, other=0.0))
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
    out, n, inside, N, ref, total, weighted, target, sq_sum, y_sum, before, top, mean_scale, SIDE: tl.constexpr
):
    """logprob, entropy, lse and the side outputs of whole rows, into `out` (3 or 6, N)."""
    bits = tl.log2(total)
    tl.store(out + n, ((target - ref) - bits) * LN2, mask=inside)
    tl.store(out + N + n, (bits - weighted / total) * LN2, mask=inside)
    tl.store(out + N * 2 + n, (ref + bits) * LN2, mask=inside)
    if SIDE:
        tl.store(out + N * 3 + n, (tl.log2(sq_sum) - 2 * bits) * LN2, mask=inside)
        tl.store(out + N * 4 + n, y_sum * mean_scale, mask=inside)
        tl.store(out + N * 5 + n, ((target >= top) & (target > before)).to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["N", "S"])
def merge_partials_kernel(partials, out, N, S, mean_scale, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    N = N.to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    ref, total, weighted, target, sq_sum, y_sum, before, top = join(partials, n, inside, N, S, SIDE)
    store_stats(out, n, inside, N, ref, total, weighted, target, sq_sum, y_sum, before, top, mean_scale, SIDE)


def merge_partials(partials: Tensor, vocab: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    S, R, N = partials.shape
    out = partials.new_empty((6 if R == 8 else 3, N))
    if N > 0:
        with torch.cuda.device_of(partials):
            merge_partials_kernel[(triton.cdiv(N, 128),)](
                partials.contiguous(), out, N, S, math.log(2.0) / vocab, SIDE=R == 8, BLOCK=128
            )
    return out[0], out[1], out[2], out[3:]
