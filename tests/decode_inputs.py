"""Inputs for the tests of decode attention: trees of segments in a paged cache, and the formula applied row by row."""

import dataclasses

import torch
from torch import Tensor

from flashpo import decode_attention

BLOCK = 64


@dataclasses.dataclass
class Segment:
    begin: int
    end: int  # of its rows
    start: int  # position of its first token
    length: int
    k: Tensor  # (length, Hkv, D)
    v: Tensor


@dataclasses.dataclass
class Problem:
    """Float64 values, which a run rounds to its dtype; `options` go to decode_attention."""

    q: Tensor
    segments: list[Segment]
    position: Tensor
    options: dict

    def tables(self, dtype, poison=torch.nan, unused=1, spare=1):
        """Arguments of decode_attention. Whatever holds no token of a segment is `poison`; blocks lie in any order;
        `unused` entries of the tables and `spare` columns hold nothing but nonsense."""
        _, heads, features = self.segments[0].k.shape
        value_features = self.segments[0].v.shape[2]
        needed = [-(-s.length // BLOCK) for s in self.segments]
        free = (torch.randperm(sum(needed) + 2) + 1).tolist()
        k_cache = torch.full((len(free) + 1, heads, features, BLOCK), poison, dtype=dtype)
        v_cache = torch.full((len(free) + 1, heads, BLOCK, value_features), poison, dtype=dtype)
        S, M = len(self.segments) + unused, max(needed) + spare
        blocks = torch.full((S, M), 1 << 30, dtype=torch.int32)
        rows, start, length = (torch.full(shape, 5, dtype=torch.int32) for shape in ((S, 2), (S,), (S,)))
        for i, (s, n) in enumerate(zip(self.segments, needed)):
            rows[i, 0], rows[i, 1], start[i], length[i] = s.begin, s.end, s.start, s.length
            for j in range(n):
                blocks[i, j] = block = free.pop()
                k, v = s.k[j * BLOCK : (j + 1) * BLOCK], s.v[j * BLOCK : (j + 1) * BLOCK]
                k_cache[block, :, :, : len(k)] = k.permute(1, 2, 0).to(dtype)
                v_cache[block, :, : len(v)] = v.transpose(0, 1).to(dtype)
        return self.q.to(dtype), k_cache, v_cache, rows, start, length, blocks, self.position

    def ours(self, dtype, **tables):
        return decode_attention(*self.tables(dtype, **tables), **self.options)

    def dense(self, dtype, wide):
        """The formula on each row's own keys, inputs rounded to `dtype`, sums in `wide`."""
        results = [self.dense_row(b, dtype, wide) for b in range(len(self.q))]
        return torch.stack([out for out, _ in results]), torch.stack([lse for _, lse in results])

    def dense_row(self, b, dtype, wide):
        scale, window = self.options["scale"], self.options.get("window", 0)
        softcap, sinks = self.options.get("softcap", 0.0), self.options.get("sinks")
        mine = [s for s in self.segments if s.begin <= b < s.end]
        heads = self.q.shape[1]
        at = torch.cat([s.start + torch.arange(s.length) for s in mine] or [torch.empty(0)])
        keep = at > self.position[b] - window if window > 0 else at >= 0
        k, v = (
            torch.cat([getattr(s, name) for s in mine] or [getattr(self.segments[0], name)[:0]])[keep]
            .to(dtype)
            .to(wide)
            .repeat_interleave(heads // self.segments[0].k.shape[1], 1)
            for name in ("k", "v")
        )
        y = scale * torch.einsum("hd,khd->hk", self.q[b].to(dtype).to(wide), k)
        if softcap != 0:
            y = softcap * torch.tanh(y / softcap)
        if sinks is not None:
            y = torch.cat([y, sinks.to(wide)[:, None]], 1)
        lse = y.logsumexp(1)
        if not len(v):
            return v.new_zeros(heads, v.shape[2]), lse
        p = y.softmax(1)[:, : len(v)]
        if wide != torch.float64:  # what torch's fused attention does with its weights and its result
            return torch.einsum("hk,khd->hd", p.to(dtype).to(wide), v).to(dtype), lse
        return torch.einsum("hk,khd->hd", p, v), lse


def plant(forest, heads=2, rep=2, features=64, value_features=None, spread=1.0, **options):
    """A Problem of nested tuples: a number is a row with so many own tokens, (n, a, b, ...) n tokens that the rows of
    a, b, ... share. Shared segments come first, as wide ones must come before those within them."""
    shared, own, position = [], [], []

    def segment(begin, end, start, length):
        k = torch.randn(length, heads, features, dtype=torch.float64) * spread
        v = torch.randn(length, heads, value_features or features, dtype=torch.float64)
        return Segment(begin, end, start, length, k, v)

    def grow(node, start):
        row = len(position)
        if isinstance(node, int):
            own.append(segment(row, row + 1, start, node))
            position.append(start + node - 1)
            return
        length, *children = node
        shared.append(segment(row, row, start, length))
        here = shared[-1]
        for child in children:
            grow(child, start + length)
        here.end = len(position)

    for tree in forest:
        grow(tree, 0)
    q = torch.randn(len(position), heads * rep, features, dtype=torch.float64) * spread
    return Problem(q, shared + own, torch.tensor(position, dtype=torch.int32), {"scale": features**-0.5, **options})


FORESTS = {
    "one row": [1],
    "no sharing": [70, 1, 64, 200],
    "one group": [(130, 3, 64, 65, 1)],
    "ragged groups": [(100, 5, 7), (64, *range(1, 12)), (1, 2), (300, 1, 1, 1), 20],
    "rows without own tokens": [(70, 0, 3, 0), (65, 0), 0, 5],
    "empty shared segments": [(0, 3, 4), (10, (0, 2, 2), 5)],
    "three levels": [(150, (64, 3, (7, 1, 2, 3), 9), (1, 4), 12), (20, (90, 3, 3), (70, 8, 1, 1))],
    "long prefix": [(1500, 40, 3, 17, 64, 1)],
}
