"""tree_attention, backward: one kernel goes over the queries for each tile of keys, one over the keys for each of
queries.

Each kernel writes its gradients once, summed in a fixed order, so that the result is the same in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashpo.kernels.linear_logprob import shared_memory
from flashpo.kernels.token_stats import LOG2E
from flashpo.kernels.tree_attention import block_dim, cap, load_tokens
from flashpo.kernels.tree_tiles import lists, visible
from flashpo.ops import _masked_attention as masked

# head dimension -> (tokens of a program, tokens of a step, stages, warps), best first
KEYS_16_BIT = {  # two gradient sums in registers leave room only for short steps
    64: ((64, 64, 3, 4), (64, 64, 2, 4), (64, 32, 1, 4)),
    128: ((64, 32, 2, 4), (64, 32, 1, 4)),
    256: ((64, 32, 2, 8), (32, 32, 2, 4), (32, 16, 1, 4)),
}
QUERIES_16_BIT = {
    64: ((64, 64, 2, 4), (64, 32, 1, 4)),
    128: ((64, 64, 2, 4), (64, 32, 2, 4), (64, 32, 1, 4)),
    256: ((64, 16, 2, 4), (32, 16, 1, 4)),
}
TILES_32_BIT = {
    64: ((32, 32, 2, 4), (32, 16, 1, 4)),
    128: ((32, 16, 2, 4), (16, 16, 1, 4)),
    256: ((16, 16, 1, 4),),
}


def tile(
    table: dict[int, tuple[tuple[int, int, int, int], ...]], dtype: torch.dtype, dim: int, shared_memory: int
) -> tuple[int, int, dict[str, int]]:
    """(tokens per program, tokens per step, launch options) of the best tile that fits. It must hold its own operands,
    two operands in stages, and the probabilities with their gradient. `table` is for 16 bits; fp32 has its own."""
    table = TILES_32_BIT if dtype == torch.float32 else table
    operands = 2 if shared_memory > 200 * 1024 else 1  # before Hopper, tensor cores read one of them from registers
    for own, step, stages, warps in table[max(dim, 64)]:
        elements = (operands * own + 2 * stages * step) * dim + 2 * own * step
        if elements * dtype.itemsize <= shared_memory - 1024:
            return own, step, {"num_stages": stages, "num_warps": warps}
    raise ValueError(f"no tile of heads of {dim} {dtype} fits in {shared_memory} bytes of shared memory")


@triton.jit(do_not_specialize=["total"])
def delta_kernel(
    out,  # (N, H, DV)
    d_out,  # (N, H, DV), strided
    delta,  # (N, H)
    total,  # N H
    heads,
    stride_dn,
    stride_dh,
    DV: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_DV)
    inside = (row[:, None] < total) & (d[None, :] < DV)
    of_d_out = (row // heads * stride_dn + row % heads * stride_dh)[:, None]
    x = tl.load(out + row[:, None] * DV + d[None, :], mask=inside, other=0.0).to(tl.float32)
    y = tl.load(d_out + of_d_out + d[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(delta + row, tl.sum(x * y, 1), mask=row < total)


@triton.jit
def gradient(s, dp, lse, delta, slope, seen):
    """(p, d score) of a tile whose scores are for powers of 2. seen may be None."""
    p = tl.exp2(s - lse)
    if seen is not None:
        p = tl.where(seen, p, 0.0)
    return p, p * (dp - delta) * slope


@triton.jit
def keys_step(
    dk,
    dv,
    keys,
    values,
    q,
    d_out,
    lse,
    delta,
    position,
    begin,
    j,
    end_j,
    position_j,
    N,
    heads,
    stride_qn,
    stride_dn,
    scale,
    window,
    softcap,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Add the share of the queries from `begin`. Tiles are keys by queries."""
    queries = load_tokens(q, begin, N, stride_qn, BLOCK_Q, D, BLOCK_D)
    upstream = load_tokens(d_out, begin, N, stride_dn, BLOCK_Q, DV, BLOCK_DV)
    i = begin + tl.arange(0, BLOCK_Q)
    at = i.to(tl.int64) * heads
    lse_i = tl.load(lse + at, mask=i < N, other=0.0) * LOG2E
    delta_i = tl.load(delta + at, mask=i < N, other=0.0)
    s, slope = cap(tl.dot(keys, tl.trans(queries), input_precision="ieee"), scale, softcap)
    seen = None
    if MASKED:
        position_i = tl.load(position + i, mask=i < N, other=0) if window is not None else i
        seen = visible(i[None, :], j[:, None], end_j[:, None], position_i[None, :], position_j[:, None], window)
    dp = tl.dot(values, tl.trans(upstream), input_precision="ieee")
    p, ds = gradient(s, dp, lse_i[None, :], delta_i[None, :], slope, seen)
    # In fp32 the sum of a tile is computed first: adding a prompt's thousands of queries one by one would lose more.
    if queries.dtype == tl.float32:
        dv += tl.dot(p, upstream, input_precision="ieee")
        dk += tl.dot(ds, queries, input_precision="ieee")
    else:
        dv = tl.dot(p.to(upstream.dtype), upstream, dv, input_precision="ieee")
        dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["N", "columns", "window"])
def keys_kernel(
    q,
    k,
    v,
    end,
    position,
    lse,
    delta,
    d_out,
    lists,  # the tiles of queries for each tile of keys
    counts,
    dk,  # (N, Hkv, D)
    dv,  # (N, Hkv, DV)
    N,
    columns,
    stride_qn,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    stride_dn,
    stride_dh,
    scale,
    window,
    softcap,
    REPEAT: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    row, kv_head, kv_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    heads = kv_heads * REPEAT
    begin = row * BLOCK_K
    j = begin + tl.arange(0, BLOCK_K)
    end_j = tl.load(end + j, mask=j < N, other=0)
    position_j = tl.load(position + j, mask=j < N, other=0) if window is not None else j
    keys = load_tokens(k + kv_head.to(tl.int64) * stride_kh, begin, N, stride_kn, BLOCK_K, D, BLOCK_D)
    values = load_tokens(v + kv_head.to(tl.int64) * stride_vh, begin, N, stride_vn, BLOCK_K, DV, BLOCK_DV)
    acc_k = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_K, BLOCK_DV), tl.float32)
    lists += row.to(tl.int64) * columns
    full, others = tl.load(counts + 2 * row), tl.load(counts + 2 * row + 1)
    for head in range(kv_head * REPEAT, (kv_head + 1) * REPEAT):
        q_head, d_head = q + tl.cast(head, tl.int64) * stride_qh, d_out + tl.cast(head, tl.int64) * stride_dh
        for t in range(full):
            acc_k, acc_v = keys_step(
                acc_k, acc_v, keys, values, q_head, d_head, lse + head, delta + head, position,
                tl.load(lists + t) * BLOCK_Q, j, end_j, position_j, N, heads, stride_qn, stride_dn, scale, window,
                softcap, False, D, DV, BLOCK_Q, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
        for t in range(others):
            acc_k, acc_v = keys_step(
                acc_k, acc_v, keys, values, q_head, d_head, lse + head, delta + head, position,
                tl.load(lists + columns - 1 - t) * BLOCK_Q, j, end_j, position_j, N, heads, stride_qn, stride_dn, scale,
                window, softcap, True, D, DV, BLOCK_Q, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
    at = (j.to(tl.int64) * kv_heads + kv_head)[:, None]
    d, inside = tl.arange(0, BLOCK_D)[None, :], j[:, None] < N
    tl.store(dk + at * D + d, (acc_k * scale).to(dk.dtype.element_ty), mask=inside & (d < D))
    d = tl.arange(0, BLOCK_DV)[None, :]
    tl.store(dv + at * DV + d, acc_v.to(dv.dtype.element_ty), mask=inside & (d < DV))


@triton.jit
def queries_step(
    dq,
    queries,
    upstream,
    k,
    v,
    lse_i,
    delta_i,
    end,
    position,
    begin,
    i,
    position_i,
    N,
    stride_kn,
    stride_vn,
    scale,
    window,
    softcap,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Add the share of the keys from `begin`. Tiles are queries by keys."""
    keys = load_tokens(k, begin, N, stride_kn, BLOCK_K, D, BLOCK_D)
    values = load_tokens(v, begin, N, stride_vn, BLOCK_K, DV, BLOCK_DV)
    s, slope = cap(tl.dot(queries, tl.trans(keys), input_precision="ieee"), scale, softcap)
    seen = None
    if MASKED:
        j = begin + tl.arange(0, BLOCK_K)
        end_j = tl.load(end + j, mask=j < N, other=0)
        position_j = tl.load(position + j, mask=j < N, other=0) if window is not None else j
        seen = visible(i[:, None], j[None, :], end_j[None, :], position_i[:, None], position_j[None, :], window)
    dp = tl.dot(upstream, tl.trans(values), input_precision="ieee")
    _, ds = gradient(s, dp, lse_i[:, None], delta_i[:, None], slope, seen)
    return tl.dot(ds.to(keys.dtype), keys, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["N", "columns", "window"])
def queries_kernel(
    q,
    k,
    v,
    end,
    position,
    lse,
    delta,
    d_out,
    lists,  # the tiles of keys for each tile of queries
    counts,
    dq,  # (N, Hq, D)
    N,
    columns,
    stride_qn,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    stride_dn,
    stride_dh,
    scale,
    window,
    softcap,
    REPEAT: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    row = tl.num_programs(0) - 1 - tl.program_id(0)  # the last tokens have the longest lists
    head, heads = tl.program_id(1), tl.num_programs(1)
    k += (head // REPEAT).to(tl.int64) * stride_kh
    v += (head // REPEAT).to(tl.int64) * stride_vh
    begin = row * BLOCK_Q
    i = begin + tl.arange(0, BLOCK_Q)
    at = i.to(tl.int64) * heads + head
    position_i = tl.load(position + i, mask=i < N, other=0) if window is not None else i
    queries = load_tokens(q + head.to(tl.int64) * stride_qh, begin, N, stride_qn, BLOCK_Q, D, BLOCK_D)
    upstream = load_tokens(d_out + head.to(tl.int64) * stride_dh, begin, N, stride_dn, BLOCK_Q, DV, BLOCK_DV)
    lse_i = tl.load(lse + at, mask=i < N, other=0.0) * LOG2E
    delta_i = tl.load(delta + at, mask=i < N, other=0.0)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    lists += row.to(tl.int64) * columns
    for t in range(tl.load(counts + 2 * row)):
        acc = queries_step(
            acc, queries, upstream, k, v, lse_i, delta_i, end, position, tl.load(lists + t) * BLOCK_K, i, position_i, N,
            stride_kn, stride_vn, scale, window, softcap, False, D, DV, BLOCK_K, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    for t in range(tl.load(counts + 2 * row + 1)):
        acc = queries_step(
            acc, queries, upstream, k, v, lse_i, delta_i, end, position, tl.load(lists + columns - 1 - t) * BLOCK_K, i,
            position_i, N, stride_kn, stride_vn, scale, window, softcap, True, D, DV, BLOCK_K, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (i[:, None] < N) & (d < D)
    tl.store(dq + at[:, None] * D + d, (acc * scale).to(dq.dtype.element_ty), mask=inside)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    end: Tensor,
    position: Tensor,
    scale: float,
    window: int,
    softcap: float,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (N, heads, dim), kv_heads, v_dim = q.shape, k.shape[1], v.shape[2]
    delta = torch.empty_like(lse)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if N == 0:
        return dq, dk, dv, masked.sink_gradient(sinks, lse, delta)
    q, k, v, d_out = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v, d_out))
    end, position, out, lse = (x.contiguous() for x in (end, position, out, lse))
    heads_of = {"D": dim, "DV": v_dim, "BLOCK_D": block_dim(dim), "BLOCK_DV": block_dim(v_dim)}
    widest = max(heads_of["BLOCK_D"], heads_of["BLOCK_DV"])
    limit = shared_memory(q.device)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *d_out.stride()[:2])
    options = scale, window or None, softcap or None
    heads_of["REPEAT"] = heads // kv_heads
    with torch.cuda.device_of(q):
        delta_kernel[(triton.cdiv(N * heads, 32),)](
            out, d_out, delta, N * heads, heads, *d_out.stride()[:2], DV=v_dim, BLOCK=32, BLOCK_DV=heads_of["BLOCK_DV"]
        )
        inputs = q, k, v, end, position, lse, delta, d_out
        for kernel, of_keys, programs, table, results in (
            (keys_kernel, True, kv_heads, KEYS_16_BIT, (dk, dv)),
            (queries_kernel, False, heads, QUERIES_16_BIT, (dq,)),
        ):
            own, step, launch = tile(table, q.dtype, widest, limit)
            blocks = {"BLOCK_K": own, "BLOCK_Q": step} if of_keys else {"BLOCK_Q": own, "BLOCK_K": step}
            tiles, counts = lists(end, position, window or None, own, step, rows_are_keys=of_keys)
            kernel[(len(tiles), programs)](
                *inputs,
                tiles,
                counts,
                *results,
                N,
                tiles.shape[1],
                *strides,
                *options,
                **blocks,
                **heads_of,
                **launch,
            )
    return dq, dk, dv, masked.sink_gradient(sinks, lse, delta)
