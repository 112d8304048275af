"""tree_attention on CPUs, by torch's own flash attention on pieces of a tree's mask.

A token's first child follows it, so that a path of first children is one chain, causal in itself: a leaf each. Where a
node has further children, all tokens of these see the whole chain down to that node: a dense rectangle. What a query
gets of its pieces is merged by their log-sum-exp; given the merged result, flash attention's backward of each piece
gives that piece's share of the gradients.

Where a window cuts these pieces, and where they are tiny, the pieces are tiles of queries with the keys that any of
them may see, under a mask. A softcap, which flash attention does not know, takes such tiles through plain torch.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashpo.ops import _masked_attention as masked

TILE = 128  # queries
SHORT = 8  # tokens a chain or rectangle, on average, below which calls cost more than masked tiles compute in vain

_flash: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)  # not a public operator
_flash_backward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def takes(q: Tensor) -> bool:
    here = q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return here and _flash is not None and _flash_backward is not None


def rectangles(end: Tensor) -> tuple[list[tuple[int, int]], list[tuple[int, int, int, int]]]:
    """Causal chains (begin, stop), which hold every token once; dense (first query, behind the last, keys likewise)."""
    begins = [0, *((end[1:] != end[:-1]).nonzero()[:, 0] + 1).tolist()]
    ends = end[begins].tolist()
    chains, dense, open_ends = [], [], [len(end)]
    chain = 0  # where the path of first children begins
    for begin, stop, own, first_child in zip(begins, [*begins[1:], len(end)], ends, [*ends[1:], len(end)]):
        while open_ends[-1] <= begin:
            open_ends.pop()
        if own > open_ends[-1] or stop > own:
            raise ValueError(f"end: the subtrees of tokens {begin - 1} and {begin} are neither nested nor disjoint")
        open_ends.append(own)
        if stop == own:
            chains.append((chain, stop))
            chain = stop
        elif first_child < own:
            dense.append((first_child, own, chain, stop))
    return chains, dense


class Piece(NamedTuple):
    begin: int  # of the queries
    stop: int
    keys: slice | Tensor
    causal: bool = False
    mask: Tensor | None = None  # (queries, keys), bool
    merge: bool = False  # into what earlier pieces gave the same queries


def tiles(end: Tensor, position: Tensor, window: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(begin, stop, keys, seen): some queries, the keys that any of them may see, and which of them each sees."""
    here = torch.arange(len(end))
    for begin in range(0, len(end), TILE):
        queries = here[begin : begin + TILE]
        stop = begin + len(queries)
        near = end[:stop] > begin
        if window:
            near &= position[:stop] > position[begin:stop].min() - window
        keys = near.nonzero()[:, 0]
        yield begin, stop, keys, masked.visible(queries, keys, end, position, window)


def pieces(end: Tensor, position: Tensor, window: int) -> list[Piece]:
    """Of the whole mask; each query's first one does not merge."""
    if len(end) == 0:
        return []
    chains, dense = rectangles(end)
    cuts = window and bool(position.max() - position.min() >= window)
    if cuts or (len(chains) + len(dense)) * SHORT > len(end):
        return [Piece(a, b, keys, mask=seen) for a, b, keys, seen in tiles(end, position, window)]
    causal = [Piece(a, b, slice(a, b), causal=True) for a, b in chains]
    return causal + [Piece(a, b, slice(c, d), merge=True) for a, b, c, d in dense]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    end: Tensor,
    position: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    heads, kv_heads, v_dim, dtype = q.shape[1], k.shape[1], v.shape[2], q.dtype
    out = q.new_empty((len(q), heads, v_dim), dtype=torch.float32)
    lse = q.new_empty((len(q), heads), dtype=torch.float32)
    if softcap:
        for a, b, near, seen in tiles(end, position, window):
            out[a:b], lse[a:b] = masked.forward(q[a:b], k[near], v[near], sinks, seen, scale, softcap)
        return out.to(dtype), lse
    if sinks is not None:  # a result rounded to 16 bits before they take their share would be rounded twice
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = _padded(q, k, v)
    q, out_of, lse_of = (_of_queries(x, kv_heads) for x in (q, out, lse[..., None]))
    for a, b, keys, causal, mask, merge in pieces(end, position, window):
        part, part_lse = _flash(
            q[:, :, a:b],
            _of_keys(k[keys], heads),
            _of_keys(v[keys], heads),
            is_causal=causal,
            attn_mask=_additive(mask, q.dtype),
            scale=scale,
        )
        part, part_lse, before = part[..., :v_dim], part_lse[..., None], lse_of[:, :, a:b]
        if merge:
            out_of[:, :, a:b].lerp_(part.float(), (part_lse - before).sigmoid())
            part_lse = torch.logaddexp(before, part_lse)
        else:
            out_of[:, :, a:b] = part
        before.copy_(part_lse)
    if sinks is not None:
        out *= (lse - sinks).sigmoid()[..., None]
        lse = torch.logaddexp(lse, sinks.float())
    return out.to(dtype), lse


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
    """In fp32 throughout: flash attention's backward is no faster in 16 bits, and a token's shares add up exactly."""
    heads, kv_heads, dim, v_dim, dtype = q.shape[1], k.shape[1], q.shape[2], v.shape[2], q.dtype
    q, k, v, out, d_out = (x.float() for x in (q, k, v, out, d_out))
    dq, dk, dv = (torch.zeros(x.shape) for x in (q, k, v))
    delta = (out * d_out).sum(-1) if softcap or sinks is not None else lse
    d_sinks = masked.sink_gradient(sinks, lse, delta)
    if softcap:
        for a, b, near, seen in tiles(end, position, window):
            dq[a:b], part_dk, part_dv = masked.backward(
                q[a:b], k[near], v[near], seen, scale, softcap, lse[a:b], delta[a:b], d_out[a:b]
            )
            dk[near] += part_dk
            dv[near] += part_dv
        return dq.to(dtype), dk.to(dtype), dv.to(dtype), d_sinks
    q, k, v, out, d_out = _padded(q, k, v, out, d_out)
    q, out, d_out, lse, dq_of = (_of_queries(x, kv_heads) for x in (q, out, d_out, lse[..., None], dq))
    for a, b, keys, causal, mask, _ in pieces(end, position, window):
        part_dq, part_dk, part_dv = _flash_backward(
            d_out[:, :, a:b],
            q[:, :, a:b],
            _of_keys(k[keys], heads),
            _of_keys(v[keys], heads),
            out[:, :, a:b],
            lse[:, :, a:b, 0],
            0.0,
            causal,
            attn_mask=_additive(mask, q.dtype),
            scale=scale,
        )
        dq_of[:, :, a:b] += part_dq[..., :dim]
        dk[keys] += part_dk.sum(1).transpose(0, 1)[..., :dim]
        dv[keys] += part_dv.sum(1).transpose(0, 1)[..., :v_dim]
    return dq.to(dtype), dk.to(dtype), dv.to(dtype), d_sinks


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if mask is None else torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)


def _of_queries(x: Tensor, kv_heads: int) -> Tensor:
    """(N, Hq, D) as (Hkv, Hq / Hkv, N, D): heads of one key are the heads of one batch."""
    return x.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _of_keys(x: Tensor, heads: int) -> Tensor:
    """(N, Hkv, D) as (Hkv, Hq / Hkv, N, D), the repetition by a stride of 0."""
    return x.transpose(0, 1)[:, None].expand(-1, heads // x.shape[1], -1, -1)


def _padded(*tensors: Tensor) -> list[Tensor]:
    """To the widest head dimension, which flash attention wants to be one for all; elements of a head side by side."""
    dim = max(x.shape[2] for x in tensors)
    padded = (F.pad(x, (0, dim - x.shape[2])) if x.shape[2] < dim else x for x in tensors)
    return [x if x.stride(2) == 1 else x.contiguous() for x in padded]
