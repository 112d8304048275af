"""tree_attention on CPUs, by torch's own flash attention on pieces of a tree's mask.

A token's first child follows it, so that a path of first children is one chain, causal in itself: a leaf each. Chains
of similar length go through one call as rows padded at their ends, which causal attention never sees. Where a node has
further children, all tokens of these see the whole chain down to that node: a dense rectangle. What a query gets of its
pieces is merged by their log-sum-exp; given the merged result, flash attention's backward of each piece gives that
piece's share of the gradients.

Where a window cuts these pieces, and where they are tiny, the pieces are tiles of queries with the keys that any of
them may see, under a mask. A softcap, which flash attention does not know, takes such tiles through plain torch.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashpo.ops import _masked_attention as masked
from flashpo.ops._check import KERNEL_DTYPES

TILE = 128  # queries
SHORT = 8  # tokens a call, on average, below which calls cost more than masked tiles compute in vain
COPIED = 12_000  # numbers a chain of queries, up to which a call of its own costs more than to copy and pad it

_flash: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)  # not a public operator
_flash_backward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def takes(q: Tensor) -> bool:
    here = q.device.type == "cpu" and q.dtype in KERNEL_DTYPES
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


class Chains(NamedTuple):
    """Rows of one call, padded at its end by repetitions of its last token."""

    tokens: Tensor  # (rows, length): flat indices
    live: Tensor  # which of rows * length are no padding

    @classmethod
    def of(cls, ranges: list[tuple[int, int]]) -> "Chains":
        begin, stop = torch.tensor(ranges).T[..., None]
        tokens = begin + torch.arange(int((stop - begin).max()))
        return cls(tokens.clamp(max=stop - 1), (tokens < stop).flatten().nonzero()[:, 0])


Place = slice | Tensor | Chains  # of queries or keys: a range, flat indices, or rows of them


class Piece(NamedTuple):
    queries: Place
    keys: Place
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


def pieces(end: Tensor, position: Tensor, window: int, features: int) -> list[Piece]:
    """Of the whole mask; each query's first one does not merge. A query has so many features."""
    if len(end) == 0:
        return []
    chains, dense = rectangles(end)
    calls = alike(chains, COPIED // features)
    cuts = window and bool(position.max() - position.min() >= window)
    if cuts or (len(calls) + len(dense)) * SHORT > len(end):
        return [Piece(slice(a, b), keys, mask=seen) for a, b, keys, seen in tiles(end, position, window)]
    places: list[Place] = [slice(*call[0]) if len(call) == 1 else Chains.of(call) for call in calls]
    causal = [Piece(place, place, causal=True) for place in places]
    return causal + [Piece(slice(a, b), slice(c, d), merge=True) for a, b, c, d in dense]


def alike(chains: list[tuple[int, int]], most: int) -> list[list[tuple[int, int]]]:
    """The chains by length, those of up to `most` tokens together as long as none is padded by more than a quarter of
    the longest, or 8 tokens."""
    calls: list[list[tuple[int, int]]] = []
    shortest = 0  # that joins the last call
    for begin, stop in sorted(chains, key=lambda chain: chain[0] - chain[1]):
        length = stop - begin
        if calls and length >= shortest:
            calls[-1].append((begin, stop))
        else:
            calls.append([(begin, stop)])
            shortest = min(length - length // 4, length - 8) if length <= most else length + 1
    return calls


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
    heads, kv_heads, dim, v_dim, dtype = q.shape[1], k.shape[1], q.shape[2], v.shape[2], q.dtype
    out = q.new_empty((len(q), heads, v_dim), dtype=torch.float32)
    lse = q.new_empty((len(q), heads), dtype=torch.float32)
    if softcap:
        for a, b, near, seen in tiles(end, position, window):
            out[a:b], lse[a:b] = masked.forward(q[a:b], k[near], v[near], sinks, seen, scale, softcap)
        return out.to(dtype), lse
    if sinks is not None:  # a result rounded to 16 bits before they take their share would be rounded twice
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = _padded(q, k, v)
    q, k, v, out_of, lse_of = (_by_head(x, kv_heads) for x in (q, k, v, out, lse[..., None]))
    for queries, keys, causal, mask, merge in pieces(end, position, window, heads * dim):
        part, part_lse = _flash(
            _take(q, queries),
            _take(k, keys).expand(-1, heads // kv_heads, -1, -1),
            _take(v, keys).expand(-1, heads // kv_heads, -1, -1),
            is_causal=causal,
            attn_mask=_additive(mask, q.dtype),
            scale=scale,
        )
        part, part_lse = part[..., :v_dim], part_lse[..., None]
        if merge:
            before = _take(lse_of, queries)
            part = _take(out_of, queries).lerp(part.float(), (part_lse - before).sigmoid())
            part_lse = torch.logaddexp(before, part_lse)
        _put(out_of, queries, part)
        _put(lse_of, queries, part_lse)
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
    q, k, v, out, d_out, lse = (_by_head(x, kv_heads) for x in (q, k, v, out, d_out, lse[..., None]))
    dq_of, dk_of, dv_of = (_by_head(x, kv_heads) for x in (dq, dk, dv))
    for queries, keys, causal, mask, _ in pieces(end, position, window, heads * dim):
        part_dq, part_dk, part_dv = _flash_backward(
            _take(d_out, queries),
            _take(q, queries),
            _take(k, keys).expand(-1, heads // kv_heads, -1, -1),
            _take(v, keys).expand(-1, heads // kv_heads, -1, -1),
            _take(out, queries),
            _take(lse, queries, padding=torch.inf)[..., 0],  # whose probabilities are 0
            0.0,
            causal,
            attn_mask=_additive(mask, q.dtype),
            scale=scale,
        )
        give = _put if causal else _add  # chains come first and hold every token once
        give(dq_of, queries, part_dq[..., :dim])
        give(dk_of, keys, part_dk.sum(1, keepdim=True)[..., :dim])
        give(dv_of, keys, part_dv.sum(1, keepdim=True)[..., :v_dim])
    return dq.to(dtype), dk.to(dtype), dv.to(dtype), d_sinks


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if mask is None else torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)


def _by_head(x: Tensor, kv_heads: int) -> Tensor:
    """(N, Hq, D) or (N, Hkv, D) as (Hkv, N, R, D): heads of one key are the heads of one row of a batch."""
    return x.unflatten(1, (kv_heads, -1)).transpose(0, 1)


def _take(x: Tensor, place: Place, padding: float | None = None) -> Tensor:
    """Of x (Hkv, N, R, D) the tokens there as (Hkv * rows, R, length, D); `padding` in the place of repetitions."""
    if isinstance(place, slice):
        return x[:, place].transpose(1, 2)
    if isinstance(place, Tensor):
        return x.index_select(1, place).transpose(1, 2)
    taken = x.index_select(1, place.tokens.flatten())
    if padding is not None:
        taken = torch.full_like(taken, padding).index_copy_(1, place.live, taken[:, place.live])
    return taken.view(-1, place.tokens.shape[1], *x.shape[2:]).transpose(1, 2)


def _put(x: Tensor, place: Place, part: Tensor) -> None:
    """The opposite of `_take`."""
    where, part = _live(x, place, part)
    x[:, where] = part.to(x.dtype)


def _add(x: Tensor, place: Place, part: Tensor) -> None:
    where, part = _live(x, place, part)
    x[:, where] += part


def _live(x: Tensor, place: Place, part: Tensor) -> tuple[slice | Tensor, Tensor]:
    """Where in x (Hkv, N, R, D), and the part (Hkv * rows, R, length, D) without padding as x lies."""
    part = part.transpose(1, 2)
    if not isinstance(place, Chains):
        return place, part
    part = part.reshape(len(x), place.tokens.numel(), *part.shape[2:])
    return place.tokens.flatten()[place.live], part[:, place.live]


def _padded(*tensors: Tensor) -> list[Tensor]:
    """To the widest head dimension, which flash attention wants to be one for all; elements of a head side by side."""
    dim = max(x.shape[2] for x in tensors)
    padded = (F.pad(x, (0, dim - x.shape[2])) if x.shape[2] < dim else x for x in tensors)
    return [x if x.stride(2) == 1 else x.contiguous() for x in padded]
