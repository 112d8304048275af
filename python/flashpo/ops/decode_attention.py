"""Attention of one new token per row over a paged KV cache in which rows share common segments.

y_j = scale q . k_j, then softcap tanh(y_j / softcap)      p = softmax over the row's keys and its head's sink
out = sum_j p_j v_j      lse = log(sum_j exp(y_j) + exp(sink))

A segment is a stretch of consecutive tokens, stored in blocks of the cache and read by a range of rows. The keys of a
row are the tokens of all segments whose ranges contain the row: the shared prompt, inner nodes of the prefix tree, and
the row's own tokens. A segment that several rows read is loaded once and multiplied by the queries of all these rows
(Juravsky et al. 2024, "Hydragen", arXiv 2402.05099). The partial results are joined by their log-sum-exps.
"""

import torch
from torch import Tensor

from flashpo._op import native, op
from flashpo.ops._check import (
    KERNEL_DTYPES,
    check_device,
    check_dtype,
    check_float,
    check_int,
    check_positive,
    check_tensor,
    check_that,
)
from flashpo.ops._layout import dense_rows
from flashpo.ops._wide import wide_dtype
from flashpo.ops.kv_append import BLOCK, check_caches


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Tensor,
    start: Tensor,
    length: Tensor,
    blocks: Tensor,
    position: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of B rows, with one query token each, over S segments of a paged cache.

    A row reads all segments whose range of rows contains it. The formulas are at the top of
    flashpo/ops/decode_attention.py.

    Args:
        q: (B, Hq, D) in the caches' dtype. Hq is a multiple of Hkv; query head h reads key head h // (Hq / Hkv).
        k_cache: (blocks, Hkv, D, 64) float32, bfloat16 or float16 (float64: reference only), contiguous, as `kv_append`
            writes it. The keys and values of the query tokens themselves are already in the caches.
        v_cache: (blocks, Hkv, 64, Dv) in the same dtype.
        rows: (S, 2) int32: each segment is read by the rows [begin, end). begin == end marks an unused entry.
        start: (S,) int32: the position of the segment's first token.
        length: (S,) int32: the number of tokens in the segment, at most 64 M.
        blocks: (S, M) int32: the blocks that hold the segment. Entries after its last block are not read.
        position: (B,) int32: the position of each query's token.
        scale: the factor of q . k, a positive number.
        window: a row reads only keys whose position is above its own position - window. 0 means all keys.
        softcap: a positive number, or 0 for none.
        sinks: (Hq,) of any float dtype: one more logit for each head, which has no value. None means no sinks.

    Returns:
        (out, lse): out is (B, Hq, Dv) in q's dtype, lse is (B, Hq) in fp32 (fp64 for fp64), in nats. For a row without
        keys, out is 0 and lse is -inf, or its head's sink if there are sinks. Sums are taken in fp32. The result of a
        kernel for a row depends, bitwise, only on the segments that this row reads.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices disagree; an argument is out of its range; q requires grad
            outside of torch.no_grad(); a table points outside the cache or the batch. On CUDA nothing waits for the
            tables: the rows that read such an entry become NaN instead.
    """
    check_caches(k_cache, v_cache)
    for name, x in (("q", q), ("rows", rows), ("blocks", blocks)):
        check_tensor(name, x)
    check_positive("scale", scale)
    check_int("window", window, 0)
    if softcap != 0:
        check_positive("softcap", softcap)
    if q.requires_grad and torch.is_grad_enabled():
        raise ValueError("q requires grad, but decode_attention has no gradient: call it under torch.no_grad()")
    heads, features = k_cache.shape[1:3]
    if q.dim() != 3 or q.shape[1] % heads != 0 or q.shape[2] != features:
        raise ValueError(f"q must be (B, a multiple of {heads}, {features}) as k_cache has it, got {tuple(q.shape)}")
    if q.dtype != k_cache.dtype:
        raise TypeError(f"q must be {k_cache.dtype} as k_cache is, got {q.dtype}")
    check_device("q", q, "k_cache", k_cache)
    segments = rows.shape[:1]
    for name, table, shape in (
        ("rows", rows, (*segments, 2)),
        ("start", start, segments),
        ("length", length, segments),
        ("blocks", blocks, (*segments, *blocks.shape[-1:])),
        ("position", position, q.shape[:1]),
    ):
        check_dtype(name, table, torch.int32)
        if table.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(table.shape)}")
        check_device(name, table, "q", q)
    if sinks is not None:
        check_float("sinks", sinks)
        if sinks.shape != q.shape[1:2]:
            raise ValueError(f"sinks must be ({q.shape[1]},), got {tuple(sinks.shape)}")
        check_device("sinks", sinks, "q", q)
        sinks = sinks.to(wide_dtype(q.dtype)).contiguous()
    tables = rows, start, length, blocks, position
    return decode_attention_fwd(q, k_cache, v_cache, *tables, float(scale), window, float(softcap), sinks)


@op
def decode_attention_fwd(
    q: Tensor,  # (B, Hq, D)
    k_cache: Tensor,  # (blocks, Hkv, D, 64)
    v_cache: Tensor,  # (blocks, Hkv, 64, Dv)
    rows: Tensor,  # (S, 2)
    start: Tensor,  # (S,)
    length: Tensor,  # (S,)
    blocks: Tensor,  # (S, M)
    position: Tensor,  # (B,)
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,  # (Hq,) fp32 (fp64)
) -> tuple[Tensor, Tensor]:
    """Compute every row against every segment under a mask. Cache entries that no row reads may hold anything, even
    NaN."""
    B, Hq, D = q.shape
    S, M = blocks.shape
    Hkv, Dv = k_cache.shape[1], v_cache.shape[3]
    begin, end = rows.unbind(1)
    length = length.where(begin != end, 0)
    used = torch.arange(M, device=q.device) * BLOCK < length[:, None]
    inside = (begin >= 0) & (begin <= end) & (end <= B)
    check_that((inside | (begin == end)).all(), f"rows holds ranges outside [0, {B}]")
    check_that(((length >= 0) & (length <= M * BLOCK)).all(), f"length holds values outside [0, {M * BLOCK}]")
    inside = (blocks >= 0) & (blocks < k_cache.shape[0])
    check_that((inside | ~used).all(), f"blocks holds values outside [0, {k_cache.shape[0]})")

    i, b = torch.arange(M * BLOCK, device=q.device), torch.arange(B, device=q.device)
    covers = (begin <= b[:, None]) & (b[:, None] < end)  # (B, S)
    visible = covers[..., None] & (i < length[:, None])  # (B, S, 64 M)
    if window > 0:
        visible = visible & (start[:, None] + i > position[:, None, None] - window)
    wide = wide_dtype(q.dtype)
    block = blocks.where(used, 0)
    k = k_cache[block].to(wide).permute(2, 0, 3, 1, 4).reshape(Hkv, S, D, M * BLOCK)
    v = v_cache[block].to(wide).permute(2, 0, 1, 3, 4).reshape(Hkv, S, M * BLOCK, Dv)
    v = v.masked_fill(~visible.any(0)[..., None], 0.0)
    y = scale * torch.einsum("bhgd,hsdk->bhgsk", q.to(wide).view(B, Hkv, Hq // Hkv, D), k)
    if softcap != 0:
        y = softcap * torch.tanh(y / softcap)
    y = y.masked_fill(~visible[:, None, None], -torch.inf).flatten(3)
    if sinks is not None:
        y = torch.cat((y, sinks.view(Hkv, Hq // Hkv, 1).expand(B, -1, -1, -1)), -1)
    lse = y.logsumexp(-1)
    p = y.softmax(-1)[..., : S * M * BLOCK].view(B, Hkv, Hq // Hkv, S, M * BLOCK)
    p = p.where(visible[:, None, None], 0.0)
    parts = torch.einsum("bhgsk,hskv->bhgsv", p, v)
    out = parts.where(covers[:, None, None, :, None], 0.0).sum(3)
    return out.reshape(B, Hq, Dv).to(q.dtype), lse.reshape(B, Hq)


@decode_attention_fwd.fake
def _(q, k_cache, v_cache, *rest):
    lse_dtype = wide_dtype(q.dtype)
    return q.new_empty((*q.shape[:2], v_cache.shape[3])), q.new_empty(q.shape[:2], dtype=lse_dtype)


@decode_attention_fwd.backend("native")  # csrc/decode_plan.cpp, csrc/cpu/decode_attention.cpp
def _(q, k_cache, v_cache, rows, start, length, blocks, position, scale, window, softcap, sinks):
    if q.device.type != "cpu" or q.dtype not in KERNEL_DTYPES:
        return NotImplemented
    tables = [x.contiguous() for x in (rows, start, length, blocks, position)]
    cache_blocks, heads = k_cache.shape[:2]
    plan = native.DecodePlan(*tables, window, cache_blocks, heads, q.shape[1] // heads, torch.get_num_threads())
    out = q.new_empty((*q.shape[:2], v_cache.shape[3]))
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    scratch = lse.new_empty(native.decode_attention_scratch(plan, k_cache, v_cache))
    native.decode_attention(plan, dense_rows(q), k_cache, v_cache, scale, softcap, sinks, out, lse, scratch)
    return out, lse


@decode_attention_fwd.backend("triton")  # kernels/decode_attention.py
def _(q, *rest):
    if q.dtype not in KERNEL_DTYPES:
        return NotImplemented
    from flashpo.kernels.decode_attention import forward

    return forward(q, *rest)
