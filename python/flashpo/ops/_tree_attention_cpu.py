"""tree_attention on CPUs, by torch's own flash attention on the rectangles of which the mask of a tree consists.

A token's first child follows it, so that a path of first children is one chain, causal in itself: a leaf each. Where a
node has further children, all tokens of these see the whole chain down to that node: a dense rectangle. What a query
gets of its rectangles is merged by their log-sum-exp; given the merged result, flash attention's backward of each
rectangle gives that rectangle's share of the gradients.

A window, a softcap and trees of tiny segments go by tiles of queries instead, over the keys that a tile can see.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashpo.ops import _masked_attention as masked

TILE = 128  # queries
SHORT = 16  # tokens a rectangle below which a rectangle costs more to call than a share of a tile

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
    N, heads, kv_heads, v_dim, dtype = len(q), q.shape[1], k.shape[1], v.shape[2], q.dtype
    wide = q.new_empty((N, heads, v_dim), dtype=torch.float32)
    lse = q.new_empty((N, heads), dtype=torch.float32)
    if N == 0:
        return wide.to(dtype), lse
    chains, dense = rectangles(end)
    if window or softcap or (len(chains) + len(dense)) * SHORT > N:
        for a, b, keys, seen in tiles(end, position, window):
            wide[a:b], lse[a:b] = masked.forward(q[a:b], k[keys], v[keys], sinks, seen, scale, softcap)
        return wide.to(dtype), lse
    if sinks is not None:  # a result rounded to 16 bits before they take their share would be rounded twice
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = _padded(q, k, v)
    q, k, v = _of_queries(q, kv_heads), _of_keys(k, heads), _of_keys(v, heads)
    out, total = _of_queries(wide, kv_heads), _of_queries(lse[..., None], kv_heads)
    for a, b in chains:
        part, part_lse = _flash(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], 0.0, True, scale=scale)
        out[:, :, a:b], total[:, :, a:b, 0] = part[..., :v_dim], part_lse
    for a, b, c, d in dense:
        part, part_lse = _flash(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], 0.0, False, scale=scale)
        before, part_lse = total[:, :, a:b], part_lse[..., None]
        out[:, :, a:b].lerp_(part[..., :v_dim].float(), (part_lse - before).sigmoid())
        total[:, :, a:b] = torch.logaddexp(before, part_lse)
    if sinks is not None:
        wide *= (lse - sinks).sigmoid()[..., None]
        lse = torch.logaddexp(lse, sinks.float())
    return wide.to(dtype), lse


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
    """In fp32 throughout: flash attention's backward is no faster in 16 bits, and a key's shares add up exactly."""
    N, heads, kv_heads = len(q), q.shape[1], k.shape[1]
    dtype = q.dtype
    q, k, v, out, d_out = (x.float() for x in (q, k, v, out, d_out))
    dq, dk, dv = (torch.zeros(x.shape) for x in (q, k, v))
    delta = (out * d_out).sum(-1)
    chains, dense = rectangles(end) if N else ([], [])
    if window or softcap or (len(chains) + len(dense)) * SHORT > N:
        for a, b, keys, seen in tiles(end, position, window):
            grads = masked.backward(q[a:b], k[keys], v[keys], seen, scale, softcap, lse[a:b], delta[a:b], d_out[a:b])
            dq[a:b] = grads[0]
            dk.index_add_(0, keys, grads[1])
            dv.index_add_(0, keys, grads[2])
    else:
        dim, v_dim = q.shape[2], v.shape[2]
        q, k, v, out, d_out = _padded(q, k, v, out, d_out)
        q, out, d_out, lse_of = (_of_queries(x, kv_heads) for x in (q, out, d_out, lse[..., None]))
        k, v = _of_keys(k, heads), _of_keys(v, heads)
        of_dq = _of_queries(dq, kv_heads)
        causal = ((a, b, a, b) for a, b in chains)
        for a, b, c, d in itertools.chain(causal, dense):
            part_dq, part_dk, part_dv = _flash_backward(
                d_out[:, :, a:b],
                q[:, :, a:b],
                k[:, :, c:d],
                v[:, :, c:d],
                out[:, :, a:b],
                lse_of[:, :, a:b, 0],
                0.0,
                a == c,
                scale=scale,
            )
            of_dq[:, :, a:b] += part_dq[..., :dim]
            dk[c:d] += part_dk.sum(1).transpose(0, 1)[..., :dim]
            dv[c:d] += part_dv.sum(1).transpose(0, 1)[..., :v_dim]
    return dq.to(dtype), dk.to(dtype), dv.to(dtype), masked.sink_gradient(sinks, lse, delta)


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
