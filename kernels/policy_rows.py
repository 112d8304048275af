"""Statistics of a policy loss as rows: each program writes one, and the last program adds them up in order.

In these partial rows, column LOSS holds the entropy for a bonus that is aggregated like the loss, and minima are
negated, so that every column is either a sum or a maximum.
"""

import torch
import triton
import triton.language as tl

from flashpo.ops.policy_stats import LOG_RATIO_BINS, LOG_RATIO_EDGES, NAMES
from flashpo.ops.policy_stats import SUMS as _SUMS

# The columns, in the order of NAMES
(
    LOSS, POLICY_LOSS, TOKENS, SEQUENCES, LIVE_SEQUENCES, ENTROPY, KL_SUM, APPROX_KL, RATIOS, RATIO_SUM, RATIO_SQUARED,
    CLIP_LOW, CLIP_HIGH, BELOW, ABOVE, CAPPED, SATURATED, WEIGHTS, WEIGHT, WEIGHT_SQUARED, OFF_POLICY_SEQUENCES,
    HIGH_ENTROPY_TOKENS, HIGH_ENTROPY, PHIS, PHI, RATIO_MIN, RATIO_MAX, CLIP_LOW_MIN, CLIP_HIGH_MAX, WEIGHT_MIN,
    WEIGHT_MAX,
) = (tl.constexpr(i) for i, name in enumerate(NAMES) if name not in LOG_RATIO_BINS)  # fmt: skip
BINS: tl.constexpr = tl.constexpr(NAMES.index(LOG_RATIO_BINS[0]))  # the first bin
EDGES: tl.constexpr = tl.constexpr(LOG_RATIO_EDGES)
EDGES_A_SIDE: tl.constexpr = tl.constexpr(len(LOG_RATIO_EDGES))
SUMS: tl.constexpr = tl.constexpr(len(_SUMS))
COLUMNS: tl.constexpr = tl.constexpr(len(NAMES))
WIDTH: tl.constexpr = tl.constexpr(64)  # columns of a row in memory
TINY: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def stack(columns):
    """Stack C = 2^c columns (R,) to (R, C)."""
    HALF: tl.constexpr = len(columns) // 2
    pairs = (tl.join(columns[0], columns[HALF]),)
    for i in tl.static_range(1, HALF):
        pairs += (tl.join(columns[i], columns[i + HALF]),)  # type: ignore[assignment]
    if HALF == 1:
        ROWS: tl.constexpr = columns[0].shape[0]
        return tl.reshape(pairs[0], (ROWS, pairs[0].numel // ROWS))
    else:
        return stack(pairs)


@triton.jit
def column(x, name):
    """One column of rows (R, WIDTH), or of one row (WIDTH,)."""
    return tl.sum(tl.where(tl.arange(0, WIDTH) == name, x, 0.0), len(x.shape) - 1)


@triton.jit
def bin_column(log_w):
    """The column in which log-ratios like log_w are counted."""
    beyond = tl.zeros(log_w.shape, tl.int32)
    for i in tl.static_range(EDGES_A_SIDE):
        beyond += (tl.abs(log_w) >= EDGES[i]).to(tl.int32)
    return tl.where(log_w < 0, -beyond, beyond) + (BINS + EDGES_A_SIDE)


@triton.jit
def add(rows, more):
    return tl.where(tl.arange(0, WIDTH) < SUMS, rows + more, tl.maximum(rows, more))


@triton.jit
def finish(
    partials,
    loss_out,
    stats,
    factors,
    num_items,
    numbers,
    S,
    PARTS,
    AGGREGATION: tl.constexpr,
    EMPTY_SEQUENCES: tl.constexpr,
    ENTROPY_MEAN: tl.constexpr,
):
    """Compute statistics and factors from all partial rows, added up in order."""
    ROWS: tl.constexpr = 64
    k = tl.arange(0, WIDTH)
    nothing = tl.where(k < SUMS, 0.0, float("-inf")) + tl.zeros((ROWS, WIDTH), tl.float32)
    totals = nothing
    for first in range(0, S, ROWS):
        s = first + tl.arange(0, ROWS)
        row = s.to(tl.int64) * PARTS
        sequence = nothing
        for part in tl.range(PARTS, loop_unroll_factor=4):
            at = partials + (row + part)[:, None] * WIDTH + k[None, :]
            sequence = add(
                sequence, tl.load(at, mask=(s < S)[:, None] & (k < COLUMNS), other=nothing, cache_modifier=".cg")
            )
        counts = column(sequence, RATIOS)[:, None]
        counted = counts > 0
        counts = tl.maximum(counts, 1.0)
        lowest = tl.where(counted, -column(sequence, CLIP_LOW)[:, None] / counts, float("-inf"))
        highest = tl.where(counted, column(sequence, CLIP_HIGH)[:, None] / counts, float("-inf"))
        live = (column(sequence, TOKENS) > 0).to(tl.float32)[:, None]
        sequence = tl.where(k == CLIP_LOW_MIN, lowest, sequence)
        sequence = tl.where(k == CLIP_HIGH_MAX, highest, sequence)
        sequence = tl.where(k == LIVE_SEQUENCES, live, sequence)
        totals = add(totals, sequence)
    total = tl.where(k < SUMS, tl.sum(totals, 0), tl.max(totals, 0))
    total = tl.where((k == RATIO_MIN) | (k == CLIP_LOW_MIN) | (k == WEIGHT_MIN), -total, total)

    if num_items is not None:
        items = tl.maximum(tl.load(num_items), TINY)
    else:
        if AGGREGATION == "token_mean" or AGGREGATION == "local_token_mean":
            items = column(total, TOKENS)
        elif AGGREGATION == "token_sum":
            items = 1.0
        elif EMPTY_SEQUENCES == "excluded":
            items = column(total, LIVE_SEQUENCES)
        else:
            items = column(total, SEQUENCES)
        items = tl.maximum(items, 1.0)
    policy_loss = column(total, POLICY_LOSS) / items / numbers.max_length
    loss = policy_loss
    tl.store(factors, numbers.scale / items / numbers.max_length)
    if ENTROPY_MEAN == "tokens":
        kept = tl.maximum(column(total, HIGH_ENTROPY_TOKENS), 1.0)
        loss -= numbers.entropy_coef * column(total, HIGH_ENTROPY) / kept
        tl.store(factors + 1, -numbers.scale * numbers.entropy_coef / kept)
    elif ENTROPY_MEAN == "loss":
        loss -= numbers.entropy_coef * column(total, LOSS) / items / numbers.max_length
        tl.store(factors + 1, -numbers.scale * numbers.entropy_coef / items / numbers.max_length)
    total = tl.where(k == POLICY_LOSS, policy_loss, total)
    total = tl.where(k == LOSS, numbers.scale * loss, total)
    tl.store(stats + k, total, mask=k < COLUMNS)
    tl.store(loss_out, numbers.scale * loss)
