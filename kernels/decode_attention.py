"""Decode attention on tensor cores: a program computes some queries of one key head over a share of the rows' blocks.

Nothing is planned on the host; a program finds the segments that its rows read in the tables. Blocks before a row's own
segment (the one that contains the row's position) are probably read by neighbouring rows too, so one program computes
them for several rows. For the own segments there is one program per row, because a program for several rows would go
through their short segments one after the other.

Blocks of either kind are distributed over the splits by their index in the sequence: block i belongs to split i mod
SPLITS, wherever its segment begins. So the sums of a row and their order depend only on the segments that this row
reads. Rows that do not read a block keep their sums unchanged.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashpo.kernels.linear_logprob import shared_memory
from flashpo.kernels.token_stats import LN2, LOG2E

BLOCK: tl.constexpr = tl.constexpr(64)  # tokens in a block of the cache
SPLITS = 8, 2  # for the blocks before a row's own segment, and for those of its own segment; powers of two
SEGMENTS = 128  # the number of segments whose ranges are examined at once
LOWEST: tl.constexpr = tl.constexpr(-3e38)  # the maximum over no products
NOWHERE: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def logit(x, scale, softcap):
    """Turn products into the numbers whose differences are taken: logits with a softcap, otherwise the products."""
    if softcap is not None:
        t = tl.exp2(tl.abs(x) * (-2 * LOG2E * scale / softcap))
        x = tl.where(x < 0, -softcap, softcap) * ((1 - t) / (1 + t))
    return x


@triton.jit
def attend(
    q,
    k_cache,
    v_cache,
    ranges,
    starts,
    lengths,
    block_table,
    positions,
    sums,
    parts,
    B,
    S,
    M,
    cache_blocks,
    window,
    scale,
    softcap,
    first,
    head,
    split,
    part,
    OWN: tl.constexpr,  # whether to take the rows' own segments, which contain their positions; otherwise all others
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    heads: tl.constexpr,
    rep: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    WINDOWED: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Attention of ROWS rows from `first` over one split of their own or of their other segments."""
    i = tl.arange(0, BLOCK_Q)
    row = first + i // rep
    inside = (i < ROWS * rep) & (row < B)
    query = row.to(tl.int64) * (heads * rep) + head * rep + i % rep
    d, dv, key = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK)
    queries = tl.load(q + query[:, None] * D + d[None, :], mask=inside[:, None] & (d[None, :] < D), other=0.0)
    position = tl.load(positions + row, mask=inside, other=0)
    unit = LOG2E if softcap is not None else scale * LOG2E

    m = tl.full((BLOCK_Q,), LOWEST, tl.float32)
    l = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_DV), tl.float32)
    for begin_segment in range(0, S, SEGMENTS):
        segment = begin_segment + tl.arange(0, SEGMENTS)
        begin = tl.load(ranges + 2 * segment, mask=segment < S, other=0)
        end = tl.load(ranges + 2 * segment + 1, mask=segment < S, other=0)
        behind = tl.load(starts + segment, mask=segment < S, other=0)
        behind += tl.load(lengths + segment, mask=segment < S, other=0)
        hit = (begin < end) & (begin < first + ROWS) & (first < end)
        if OWN:
            hit &= behind > tl.load(positions + first)
        else:  # a segment read by several rows may be own to one of them and not to another
            of_first = tl.load(positions + begin, mask=hit & (begin >= 0) & (begin < B), other=0)
            hit &= (end - begin > 1) | (behind <= of_first)
        s = tl.min(tl.where(hit, segment, NOWHERE))
        while s < S:
            begin_row, end_row = tl.load(ranges + 2 * s), tl.load(ranges + 2 * s + 1)
            start, length = tl.load(starts + s), tl.load(lengths + s)
            reads = inside & (begin_row <= row) & (row < end_row) & ((start + length > position) == OWN)
            bad = (begin_row < 0) | (end_row > B) | (length < 0) | (length > M * BLOCK)
            l = tl.where(reads & bad, float("nan"), l)
            length = tl.where(bad, 0, length)
            low = 0
            if WINDOWED:
                low = tl.min(tl.where(reads, position, NOWHERE)) - window + 1 - start
                low = tl.maximum(low, 0)
            block = (split - (start >> 6)) & (SPLITS - 1)
            block += tl.cdiv(tl.maximum(low // BLOCK - block, 0), SPLITS) * SPLITS
            for j in range(block, tl.cdiv(length, BLOCK), SPLITS):
                at = j * BLOCK + key
                live = (at < length) & (at >= low)
                found = tl.load(block_table + s.to(tl.int64) * M + j)
                known = (found >= 0) & (found < cache_blocks)
                tile = (tl.where(known, found, 0).to(tl.int64) * heads + head) * BLOCK
                # Keys of one feature are contiguous, and a mask along them would split each load into single elements.
                # Past the row's last token a block still has memory; `seen` discards what is there, NaN too.
                keys = tl.load(k_cache + tile * D + d[:, None] * BLOCK + key[None, :], mask=d[:, None] < D, other=0.0)
                values = tl.load(
                    v_cache + tile * DV + key[:, None] * DV + dv[None, :],
                    mask=live[:, None] & (dv[None, :] < DV),
                    other=0.0,
                )
                x = logit(tl.dot(queries, keys, input_precision="ieee"), scale, softcap)
                seen = reads[:, None] & live[None, :]
                if WINDOWED:
                    seen = seen & (start + at[None, :] > position[:, None] - window)
                x = tl.where(seen, tl.where(known, x, float("nan")), float("-inf"))
                top = tl.maximum(m, tl.max(x, 1))
                p = tl.exp2((x - top[:, None]) * unit)
                factor = tl.exp2((m - top) * unit)
                more = tl.dot(p.to(values.dtype), values, input_precision="ieee")
                # NaN in blocks that only other rows read must not reach this row
                acc = tl.where(reads[:, None], acc * factor[:, None] + more, acc)
                l = l * factor + tl.sum(p, 1)
                m = top
            s = tl.min(tl.where(hit & (segment > s), segment, NOWHERE))

    queries_in_all = B.to(tl.int64) * (heads * rep)
    at_part = part * queries_in_all + query
    tl.store(sums + at_part, m, mask=inside)
    tl.store(sums + at_part + PARTS * queries_in_all, l, mask=inside)
    some = inside & (l != 0)
    tl.store(parts + at_part[:, None] * DV + dv[None, :], acc, mask=some[:, None] & (dv[None, :] < DV))


@triton.jit(do_not_specialize=["B", "S", "M", "cache_blocks", "window"])
def split_kernel(
    q,  # (B, heads rep, D)
    k_cache,  # (blocks, heads, D, 64)
    v_cache,  # (blocks, heads, 64, DV)
    ranges,  # (S, 2): the range of rows
    starts,  # (S,)
    lengths,  # (S,)
    block_table,  # (S, M)
    positions,  # (B,)
    sums,  # (2, PARTS, B, heads rep): m, the largest x, and l, the sum of 2^((x - m) unit)
    parts,  # (PARTS, B, heads rep, DV): weighted sums of the values, where l is not 0
    B,
    S,
    M,
    cache_blocks,
    window,
    scale,
    softcap,
    heads: tl.constexpr,
    rep: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    WINDOWED: tl.constexpr,
    BEFORE: tl.constexpr,  # the number of splits for the blocks before, and for the own segment
    OWN: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    PARTS: tl.constexpr = BEFORE + OWN
    ROWS: tl.constexpr = BLOCK_Q // rep
    before = tl.cdiv(B, ROWS) * heads * BEFORE  # number of programs
    i = tl.program_id(0)
    if i < before:
        head, split = i // BEFORE % heads, i % BEFORE
        attend(
            q, k_cache, v_cache, ranges, starts, lengths, block_table, positions, sums, parts, B, S, M, cache_blocks,
            window, scale, softcap, i // (BEFORE * heads) * ROWS, head, split, split, False, ROWS, BEFORE, PARTS,
            BLOCK_Q, heads, rep, D, DV, WINDOWED, SEGMENTS, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    else:
        i -= before
        head, split = i // OWN % heads, i % OWN
        attend(
            q, k_cache, v_cache, ranges, starts, lengths, block_table, positions, sums, parts, B, S, M, cache_blocks,
            window, scale, softcap, i // (OWN * heads), head, split, BEFORE + split, True, 1, OWN, PARTS,
            BLOCK_ROW, heads, rep, D, DV, WINDOWED, SEGMENTS, BLOCK_D, BLOCK_DV,
        )  # fmt: skip


@triton.jit(do_not_specialize=["queries"])
def merge_kernel(
    sums,
    parts,
    sinks,  # (heads rep,) fp32 or None
    out,  # (B, heads rep, DV)
    lse,  # (B, heads rep)
    queries,  # B heads rep
    query_heads,
    scale,
    CAPPED: tl.constexpr,
    DV: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    query = tl.program_id(0).to(tl.int64)
    part_of, dv = tl.arange(0, BLOCK_PARTS), tl.arange(0, BLOCK_DV)
    at = part_of.to(tl.int64) * queries + query
    m = tl.load(sums + at, mask=part_of < PARTS, other=LOWEST)
    l = tl.load(sums + at + PARTS * queries.to(tl.int64), mask=part_of < PARTS, other=0.0)
    some = l != 0  # also true for NaN
    top = tl.max(tl.where(some, m, LOWEST), 0)
    factor = tl.where(some, tl.exp2((m - top) * (LOG2E if CAPPED else scale * LOG2E)), 0.0)
    part = tl.load(parts + at[:, None] * DV + dv[None, :], mask=some[:, None] & (dv[None, :] < DV), other=0.0)
    acc, total = tl.sum(part * factor[:, None], 0), tl.sum(tl.where(some, l * factor, 0.0), 0)
    top = top if CAPPED else top * scale
    none = total == 0
    if sinks is not None:
        sink = tl.load(sinks + query % query_heads)
        highest = tl.where(none, sink, tl.maximum(top, sink))
        kept = tl.where(none, 0.0, tl.exp2((top - highest) * LOG2E))
        total = total * kept + tl.where(sink > float("-inf"), tl.exp2((sink - highest) * LOG2E), 0.0)
        acc *= kept
        top = highest
    tl.store(lse + query, tl.where(total == 0, float("-inf"), top + tl.log2(total) * LN2))
    acc = tl.where(none, 0.0, acc / total)
    tl.store(out + query * DV + dv, acc.to(out.dtype.element_ty), mask=dv < DV)


def tile(rep: int, features: int, value_features: int, itemsize: int, shared: int) -> dict[str, int]:
    """A tile of about 8 rows (a usual group) per program, in whole tensor-core tiles. It has fewer rows if the queries
    and weights leave no room for a tile of the cache. Where there is room for two tiles of keys and of values, the next
    ones are copied while these are multiplied."""
    block_d, block_dv = (max(triton.next_power_of_2(n), 16) for n in (features, value_features))
    fewest = max(triton.next_power_of_2(rep), 16)
    block_q = max(min(triton.next_power_of_2(8 * rep), 64), fewest)

    def room(block_q):
        return shared - 4096 - block_q * (block_d + BLOCK.value) * itemsize

    while block_q > fewest and room(block_q) < BLOCK.value * max(block_d, block_dv) * itemsize:
        block_q //= 2
    blocks = {"BLOCK_Q": block_q, "BLOCK_ROW": fewest, "BLOCK_D": block_d, "BLOCK_DV": block_dv}
    if itemsize > 2:  # fp32 is multiplied without tensor cores, and registers limit it
        return {**blocks, "num_stages": 1, "num_warps": max(2, min(block_q // 16, 8))}
    ahead = room(block_q) >= 2 * BLOCK.value * (block_d + block_dv) * itemsize
    return {**blocks, "num_stages": 2 if ahead else 1, "num_warps": max(4, min(block_q // 16, 8))}


def forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Tensor,
    start: Tensor,
    length: Tensor,
    blocks: Tensor,
    position: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    B, query_heads, D = q.shape
    S, M = blocks.shape
    cache_blocks, heads, DV = *k_cache.shape[:2], v_cache.shape[3]
    out = q.new_empty((B, query_heads, DV))
    lse = q.new_empty((B, query_heads), dtype=torch.float32)
    if B == 0:
        return out, lse
    count = sum(SPLITS)
    sums, parts = lse.new_empty((2, count, B, query_heads)), lse.new_empty((count, B, query_heads, DV))
    rep = query_heads // heads
    tiles = tile(rep, D, DV, q.itemsize, shared_memory(q.device))
    cap = softcap if softcap != 0 else None
    programs = (triton.cdiv(B, tiles["BLOCK_Q"] // rep) * SPLITS[0] + B * SPLITS[1]) * heads
    tables = (x.contiguous() for x in (rows, start, length, blocks, position))
    with torch.cuda.device_of(q):
        split_kernel[(programs,)](
            q.contiguous(),
            k_cache,
            v_cache,
            *tables,
            sums,
            parts,
            B,
            S,
            M,
            cache_blocks,
            window,
            scale,
            cap,
            heads=heads,
            rep=rep,
            D=D,
            DV=DV,
            WINDOWED=window > 0,
            BEFORE=SPLITS[0],
            OWN=SPLITS[1],
            SEGMENTS=SEGMENTS,
            **tiles,
        )
        merge_kernel[(B * query_heads,)](
            sums,
            parts,
            sinks,
            out,
            lse,
            B * query_heads,
            query_heads,
            scale,
            CAPPED=cap is not None,
            DV=DV,
            PARTS=count,
            BLOCK_PARTS=triton.next_power_of_2(count),
            BLOCK_DV=tiles["BLOCK_DV"],
            num_warps=1,
        )
    return out, lse
