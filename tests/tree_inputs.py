"""Inputs for the tests of tree_attention: token trees, and attention of each row by itself in plain torch."""

import dataclasses

import torch
from accuracy import assert_as_accurate
from torch import Tensor

import flashpo
from flashpo import tree_attention


@dataclasses.dataclass(frozen=True)
class Tree:
    """`rows`: of each leaf, the flat indices of the tokens from the root to it."""

    end: Tensor
    position: Tensor
    rows: list[Tensor]

    @classmethod
    def of(cls, *roots: tuple) -> "Tree":
        """Each segment is (tokens, child, child, ...)."""
        end: list[int] = []
        position: list[int] = []
        rows: list[Tensor] = []

        def walk(segment: tuple, path: list[int]) -> None:
            tokens, *children = segment
            begin = len(end)
            own = list(range(begin, begin + tokens))
            position.extend(range(len(path), len(path) + tokens))
            end.extend([0] * tokens)
            for child in children:
                walk(child, path + own)
            end[begin : begin + tokens] = [len(end)] * tokens
            if not children:
                rows.append(torch.tensor(path + own))

        for root in roots:
            walk(root, [])
        return cls(torch.tensor(end, dtype=torch.int32), torch.tensor(position, dtype=torch.int32), rows)

    @classmethod
    def random(cls, roots: int, depth: int, children: int, tokens: int) -> "Tree":
        def segment(depth: int) -> tuple:
            count = int(torch.randint(children + 1, ())) if depth else 0
            return (int(torch.randint(1, tokens + 1, ())), *(segment(depth - 1) for _ in range(count)))

        return cls.of(*(segment(depth) for _ in range(roots)))

    def to(self, device: str) -> "Tree":
        return Tree(self.end.to(device), self.position.to(device), [row.to(device) for row in self.rows])

    def __len__(self) -> int:
        return len(self.end)


def group(prompt: int, *completions: int) -> tuple:
    return (prompt, *((tokens,) for tokens in completions))


TREES = {
    "one chain": Tree.of((37,)),
    "two groups": Tree.of(group(41, 7, 19, 1, 12), group(5, 33, 2)),
    "no sharing": Tree.of((9,), (1,), (30,), (17,)),
    "levels": Tree.of((6, (5, (4,), (3, (2,), (1,))), (7, (8,), (1, (9,), (10,)))), (3, (2, (1, (1,))), (4,))),
    "single tokens": Tree.of(*5 * [(1, (1, (1,), (1, (1,), (1,))), (1,), (1, (1,)))]),
}
# larger than the tiles of every backend
LARGE = Tree.of(group(150, 70, 90, 1, 40), (130, (70, (20,), (40,)), (5,)), (1,), group(3, 2, 2, 60))


@dataclasses.dataclass(frozen=True)
class Attention:
    """Heads and options; `tokens -> (q, k, v, sinks)`."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    v_dim: int | None = None
    scale: float | None = None
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False

    def make(self, tokens: int, dtype: torch.dtype = torch.float64, wide: torch.dtype | None = None) -> list[Tensor]:
        """Leaves of `dtype`'s precision, kept as `wide`. q is a view with heads first, as transformers makes it."""
        v_dim = self.v_dim or self.dim
        q = torch.randn(self.heads, tokens, self.dim, dtype=torch.float64).transpose(0, 1)
        k = torch.randn(tokens, self.kv_heads, self.dim, dtype=torch.float64)
        v = torch.randn(tokens, self.kv_heads, v_dim, dtype=torch.float64)
        inputs = [q, k, v] + ([torch.randn(self.heads, dtype=torch.float64)] if self.sinks else [])
        return [x.to(dtype).to(wide or dtype).requires_grad_() for x in inputs]

    @property
    def options(self) -> dict:
        return {"scale": self.scale, "window": self.window, "softcap": self.softcap}

    def rows(self, tree: Tree, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        """Every row attended to by itself, its prompt computed again, as a padded batch does it."""
        out = q.new_zeros(len(tree), self.heads, v.shape[2])
        for row in tree.rows:
            out = out.index_copy(0, row, self._row(q[row], k[row], v[row], sinks, tree.position[row]))
        return out

    def _row(self, q, k, v, sinks, position) -> Tensor:
        """transformers' eager attention."""
        repeat = self.heads // self.kv_heads
        k, v = k.repeat_interleave(repeat, 1).transpose(0, 1), v.repeat_interleave(repeat, 1).transpose(0, 1)
        s = q.transpose(0, 1) @ k.transpose(1, 2) * (self.scale or self.dim**-0.5)
        if self.softcap:
            s = self.softcap * torch.tanh(s / self.softcap)
        distance = position[:, None] - position
        s = s.masked_fill((distance < 0) | ((distance >= self.window) if self.window else False), -torch.inf)
        if sinks is not None:
            s = torch.cat([s, sinks[:, None, None].expand(-1, s.shape[1], 1)], -1)
        p = s.softmax(-1, dtype=torch.promote_types(s.dtype, torch.float32)).to(s.dtype)
        return (p[..., : k.shape[1]] @ v).transpose(0, 1)


OPTIONS = {
    "plain": Attention(),
    "scaled": Attention(scale=0.3),
    "window": Attention(window=5),
    "window longer than any row": Attention(window=1000),
    "softcap": Attention(softcap=1.5),
    "sinks": Attention(heads=32, kv_heads=4, sinks=True),
    "everything": Attention(heads=32, kv_heads=4, window=7, softcap=2.0, sinks=True, scale=0.5, v_dim=24),
    "one head": Attention(heads=1, kv_heads=1, dim=64),
    "one kv head": Attention(heads=8, kv_heads=1),
    "six heads a key": Attention(heads=6, kv_heads=1),
    "equal heads": Attention(heads=3, kv_heads=3, dim=7, v_dim=5),
    "D 80": Attention(dim=80),
    "D 128": Attention(heads=4, kv_heads=1, dim=128),
    "D 256": Attention(heads=2, kv_heads=1, dim=256),
}


def ours(attention: Attention, tree: Tree, *inputs, **options):
    q, k, v, *sinks = inputs
    options = attention.options | {"sinks": sinks[0] if sinks else None} | options
    return tree_attention(q, k, v, tree.end, tree.position, **options)


def run(function, inputs, upstream):
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype), allow_unused=True)]


def check(attention: Attention, tree: Tree, backend: str, dtype: torch.dtype):
    """Values and gradients of random upstream gradients against fp64, with eager attention's error as the yardstick.

    The largest error of a few tokens is a matter of luck: that of small trees is judged over several draws.
    """
    draws = [_draw(attention, tree, backend, dtype) for _ in range(1 if len(tree) > 200 else 3)]
    for of_result in zip(*draws, strict=True):
        assert_as_accurate(*(torch.stack(x) for x in zip(*of_result)))


def _draw(attention: Attention, tree: Tree, backend: str, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(ours, exact, eager's) of the output and each gradient."""
    inputs = attention.make(len(tree), dtype)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    upstream = torch.randn(len(tree), attention.heads, attention.v_dim or attention.dim).to(dtype)
    exact = run(lambda *x: attention.rows(tree, *x), wide, upstream)
    plain = run(lambda *x: attention.rows(tree, *x), inputs, upstream)
    flashpo.stats(reset=True)
    with flashpo.backend(backend):
        results = run(lambda *x: ours(attention, tree, *x), inputs, upstream)
    assert {used for counts in flashpo.stats().values() for used in counts} == {backend}
    assert all(result.dtype == dtype for result in results)
    return list(zip(results, exact, plain, strict=True))
