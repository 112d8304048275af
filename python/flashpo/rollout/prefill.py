"""Prompts into the cache: one packed forward over pieces of several nodes, each behind its own past."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from flashpo._causal_lm import CausalLM, Unsupported
from flashpo.rollout.cache import KVCache, Run
from flashpo.rollout.hybrid import States
from flashpo.rollout.seam import in_charge

TILE = 512  # queries whose scores against all of their keys exist at a time, where a kernel of torch cannot be used


class Piece(NamedTuple):
    """Consecutive tokens of one prompt: `past` is everything before them, in the cache already; they go to `slots`."""

    tokens: Sequence[int]
    past: Sequence[Run]
    slots: Sequence[int]


def prefill(parts: CausalLM, cache: KVCache, pieces: Sequence[Piece], states: States | None = None) -> Tensor:
    """Caches the tokens of all pieces; the hidden state (pieces, H) of each one's last token.

    A piece may stand behind another one of the same call, if that comes before it. The layers of a hybrid model know
    no boundaries of pieces: it takes one at a time, with the states behind the piece's past.
    """
    device = cache.device
    tokens = torch.tensor([t for piece in pieces for t in piece.tokens], device=device)
    positions = [range(n, n + len(p.tokens)) for p in pieces for n in (sum(run.length for run in p.past),)]
    attention = Packed(cache, pieces)
    with in_charge(attention):
        hidden = parts.backbone(
            input_ids=tokens[None],
            position_ids=torch.tensor(list(itertools.chain(*positions)), device=device)[None],
            past_key_values=states,
            use_cache=states is not None,
        ).last_hidden_state[0]
    if attention.visited != set(cache.layers):
        raise Unsupported(f"prefill attended in layers {sorted(attention.visited)}, expected {sorted(cache.layers)}")
    return hidden[torch.tensor(attention.ends, device=device) - 1]


class Packed:
    """The attention of a packed forward: each piece attends to its past and causally to itself."""

    def __init__(self, cache: KVCache, pieces: Sequence[Piece]):
        self.cache, self.pieces, self.visited = cache, pieces, set[int]()
        self.ends = list(itertools.accumulate(len(piece.tokens) for piece in pieces))
        self.slot = torch.tensor([s for piece in pieces for s in piece.slots], device=cache.device)

    def attend(self, layer, query, key, value, scale, softcap, sinks):
        if query.shape[2] != key.shape[2] or key.shape[2] != self.ends[-1]:
            raise Unsupported(f"layer {layer} sees {query.shape[2]} queries, {key.shape[2]} keys of {self.ends[-1]}")
        self.visited.add(layer)
        window = self.cache.layers[layer].window
        dtype = query.dtype
        query, key, value = (x.to(self.cache.dtype) for x in (query, key, value))
        self.cache.append(layer, key[0].transpose(0, 1), value[0].transpose(0, 1), self.slot)
        out = []
        for piece, end in zip(self.pieces, self.ends):
            here = slice(end - len(piece.tokens), end)
            q, k, v = query[:, :, here], key[:, :, here], value[:, :, here]
            if piece.past:
                past_k, past_v = self.cache.read(layer, piece.past)
                k, v = torch.cat((past_k, k), 2), torch.cat((past_v, v), 2)
            out.append(causal_attention(q, k, v, scale, window, softcap, sinks))
        return torch.cat(out, 2).transpose(1, 2).contiguous().to(dtype)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, softcap: float, sinks: Tensor | None
) -> Tensor:
    """(1, Hq, T, Dv): the queries (1, Hq, T, D) are those of the last T of the keys (1, Hkv, S, D).

    A kernel of torch where the mask is plainly causal, else tiles of queries with the keys that they can see.
    """
    queries, keys = query.shape[2], key.shape[2]
    plain = not softcap and sinks is None
    if plain and not 0 < window < keys:
        past = {"is_causal": True} if queries == keys else {"attn_mask": causal_lower_right(queries, keys)}
        return F.scaled_dot_product_attention(query, key, value, **past, scale=scale, enable_gqa=True)
    out = []
    for begin in range(0, queries, TILE):
        q = query[:, :, begin : begin + TILE]
        last = keys - queries + begin + q.shape[2]  # of the keys, behind the tile's last query
        first = max(last - q.shape[2] - window + 1, 0) if window else 0
        k, v = key[:, :, first:last], value[:, :, first:last]
        distance = torch.arange(last - q.shape[2], last, device=q.device)[:, None] - torch.arange(
            first, last, device=q.device
        )
        seen = (distance >= 0) & (distance < window) if window else distance >= 0
        if plain:
            out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True))
        else:
            out.append(_explicit(q, k, v, seen, scale, softcap, sinks))
    return torch.cat(out, 2)


def _explicit(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float, sinks: Tensor | None):
    """softmax(softcap tanh(q k^T scale / softcap), with one logit more a head where there are sinks) v, in fp32."""
    rep = q.shape[1] // k.shape[1]
    scores = q.float() @ k.float().repeat_interleave(rep, 1).transpose(2, 3) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)), -1)
    share = scores.softmax(-1)[..., : k.shape[2]]
    return (share @ v.float().repeat_interleave(rep, 1)).to(q.dtype)
