"""Prefill: one packed forward computes and caches pieces of several nodes, each with the tokens before it as its past.

Pieces whose whole past is in the same forward form a token tree, whose attention is one call of tree_attention. A piece
that follows tokens cached by earlier forwards reads their keys and values back from the cache; its attention is a call
of its own.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from flashpo._causal_lm import CausalLM, Unsupported
from flashpo._recurrent import KEYWORD
from flashpo.ops._lineage import Lineage
from flashpo.ops.tree_attention import attend
from flashpo.rollout.cache import KVCache, Run
from flashpo.rollout.fused import FusedBackbone
from flashpo.rollout.hybrid import States, cache_keyword
from flashpo.rollout.seam import in_charge

TILE = 512  # queries in a tile of `causal_attention`, which limits the memory for scores


class Piece(NamedTuple):
    """Consecutive tokens of one sequence, which a prefill computes and caches.

    runs: The cache runs of the sequence up to the end of the piece. The piece's tokens are the last ones of the last
        run; all tokens before them are its past.
    """

    tokens: Sequence[int]
    runs: Sequence[Run]
    turns: Tensor | None = None  # (axes, tokens): rotary positions, where they do not simply count tokens

    @property
    def positions(self) -> range:
        end = sum(run.length for run in self.runs)
        return range(end - len(self.tokens), end)

    @property
    def slots(self) -> list[int]:
        last = self.runs[-1]
        return last.slots(last.length - len(self.tokens), last.length)


def prefill(
    parts: CausalLM,
    cache: KVCache,
    pieces: Sequence[Piece],
    fused: FusedBackbone | None = None,
    states: States | Lineage | None = None,
    placed: Callable[[Tensor], AbstractContextManager[tuple[Tensor, dict[str, Any]]]] | None = None,
) -> Tensor:
    """Computes and caches the tokens of all pieces. Returns the hidden states (pieces, H) of the last token of each.

    A piece may continue another piece of the same call that comes before it.

    Args:
        fused: The faster forward to use, if there is one.
        states: For a hybrid model. Either the states after the past of a single piece, which the call moves on to the
            end of the piece. Or the lineage of pieces whose whole past is in this call, which keeps their states.
        placed: For prompts with images, see `Shown.placed`.
    """
    packed = Packed(cache, pieces)
    if fused is not None and states is None:
        hidden = fused(packed)
    else:
        given: dict[str, object] = {}
        if states is not None:
            given[KEYWORD if isinstance(states, Lineage) else cache_keyword(parts.backbone)] = states
        with (placed or _text)(packed.token) as (token, beside), in_charge(packed):
            hidden = parts.backbone(
                input_ids=token[None],
                position_ids=packed.turns(),
                use_cache=isinstance(states, States),
                **given,
                **beside,
            ).last_hidden_state[0]
    if packed.visited != set(cache.layers):
        raise Unsupported(f"prefill attended in layers {sorted(packed.visited)}, expected {sorted(cache.layers)}")
    return hidden[torch.tensor(packed.ends, device=cache.device) - 1]


@contextlib.contextmanager
def _text(token: Tensor) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    yield token, {}


class Tree(NamedTuple):
    """Pieces together with their whole past, in the form that tree_attention takes. It has N tokens."""

    end: Tensor  # (N,): later tokens before this index see the token
    position: Tensor  # (N,)
    slot: Tensor  # (N,): the slots of keys and values in the cache


class Packed:
    """The attention of a packed forward: each piece attends to its past and causally to itself."""

    tables = None

    def __init__(self, cache: KVCache, pieces: Sequence[Piece]):
        def joined(values) -> Tensor:
            return torch.tensor(list(itertools.chain.from_iterable(values)), device=cache.device)

        self.cache, self.visited, self.pieces = cache, set[int](), pieces
        self.ends = list(itertools.accumulate(len(piece.tokens) for piece in pieces))
        self.token = joined(piece.tokens for piece in pieces)
        self.position = joined(piece.positions for piece in pieces)
        self.slot = joined(piece.slots for piece in pieces)
        self.spans: list[tuple[slice, Piece | Tree]] = []
        for within, group in itertools.groupby(zip(visible_until(pieces), pieces, self.ends), lambda x: x[0] > 0):
            until, members, ends = zip(*group)
            begins = [end - len(piece.tokens) for end, piece in zip(ends, members)]
            if within:
                behind = joined([u - begins[0]] * len(p.tokens) for u, p in zip(until, members)).int()
                span = slice(begins[0], ends[-1])
                self.spans.append((span, Tree(behind, self.position[span].int(), self.slot[span])))
            else:
                self.spans += [(slice(begin, end), piece) for begin, end, piece in zip(begins, ends, members)]

    def turns(self) -> Tensor:
        """Rotary positions: (1, N), or (axes, 1, N) where a piece has rotary positions that do not count tokens."""
        axes = next((len(piece.turns) for piece in self.pieces if piece.turns is not None), 0)
        if not axes:
            return self.position[None]
        counted = self.position.split([len(piece.tokens) for piece in self.pieces])
        own = [x.expand(axes, -1) if p.turns is None else p.turns for p, x in zip(self.pieces, counted)]
        return torch.cat([x.to(self.position.device) for x in own], 1)[:, None]

    def attend(self, layer, query, key, value, scale, softcap, sinks):
        if query.shape[2] != key.shape[2] or key.shape[2] != self.ends[-1]:
            raise Unsupported(f"layer {layer} sees {query.shape[2]} queries, {key.shape[2]} keys of {self.ends[-1]}")
        q, k, v = (x[0].transpose(0, 1).to(self.cache.dtype) for x in (query, key, value))
        self.cache.append(layer, k, v, self.slot)
        return self.attend_cached(layer, q, scale, softcap, sinks)[None].to(query.dtype)

    def attend_cached(
        self, layer: int, query: Tensor, scale: float, softcap: float = 0.0, sinks: Tensor | None = None
    ) -> Tensor:
        """query (T, Hq, D) -> (T, Hq, Dv). The tokens' own keys and values must be in the cache already."""
        self.visited.add(layer)
        window = self.cache.layers[layer].window
        out = []
        for span, of in self.spans:
            q = query[span]
            if isinstance(of, Tree):
                k, v = self.cache.gather(layer, of.slot)
                out.append(attend(q, k, v, sinks, of.end, of.position, scale, window, softcap))
            else:
                k, v = self.cache.read(layer, of.runs)
                q = q.transpose(0, 1)[None]
                out.append(causal_attention(q, k, v, scale, window, softcap, sinks)[0].transpose(0, 1))
        return torch.cat(out) if len(out) > 1 else out[0]


def visible_until(pieces: Sequence[Piece]) -> list[int]:
    """For each piece, the index in the packed forward up to which later tokens see it; 0 if its past is not in there.

    The pieces of a tree come depth first: each one after its parent or after the whole subtree of a sibling.
    """
    until, path = [0] * len(pieces), list[tuple[int, Run]]()  # path: the pieces from the root to the current one
    at = 0
    for i, piece in enumerate(pieces):
        *above, own = piece.runs
        while path and [run for _, run in path] != above:
            until[path.pop()[0]] = at
        at += len(piece.tokens)
        if len(path) == len(above) and own.length == len(piece.tokens):
            until[i] = at
            path.append((i, own))
    for i, _ in path:
        until[i] = at
    return until


def lineage(pieces: Sequence[Piece], device: torch.device) -> Lineage:
    """The lineage of pieces that each continue another one or begin a sequence. It keeps the states after them."""
    parents = torch.tensor([parent(piece, pieces[:i]) for i, piece in enumerate(pieces)], device="cpu")
    stops = list(itertools.accumulate(len(piece.tokens) for piece in pieces))
    found = Lineage(torch.tensor([*zip([0, *stops], stops)], device="cpu"), parents, device)
    found.kept = {}
    return found


def parent(piece: Piece, before: Sequence[Piece]) -> int | None:
    """The index in `before` of the piece that this one continues; -1 if it begins a sequence; None if it continues
    tokens that earlier forwards have cached."""
    *above, own = piece.runs
    if own.length > len(piece.tokens):
        return None
    if not above:
        return -1
    return next((i for i in reversed(range(len(before))) if list(before[i].runs) == above), None)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, softcap: float, sinks: Tensor | None
) -> Tensor:
    """Causal attention (1, Hq, T, Dv) of queries (1, Hq, T, D), which belong to the last T of the keys (1, Hkv, S, D).

    One call of torch's attention where the mask is purely causal and there are no softcap and sinks; else tiles of
    queries, each with the keys that it can see.
    """
    queries, keys = query.shape[2], key.shape[2]
    plain = not softcap and sinks is None
    if plain and not 0 < window < keys:
        past = {"is_causal": True} if queries == keys else {"attn_mask": causal_lower_right(queries, keys)}
        return F.scaled_dot_product_attention(query, key, value, **past, scale=scale, enable_gqa=True)
    out = []
    for begin in range(0, queries, TILE):
        q = query[:, :, begin : begin + TILE]
        last = keys - queries + begin + q.shape[2]  # one past the key of the tile's last query
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
    """softmax(softcap tanh(q k^T scale / softcap)) v in fp32. A sink is one more logit of a head, without a value."""
    rep = q.shape[1] // k.shape[1]
    scores = q.float() @ k.float().repeat_interleave(rep, 1).transpose(2, 3) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)), -1)
    share = scores.softmax(-1)[..., : k.shape[2]]
    return (share @ v.float().repeat_interleave(rep, 1)).to(q.dtype)
