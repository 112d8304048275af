"""Matrix products that sum over the vocabulary or over many tokens, in fp32 or wider.

A library adds up a product term by term, sometimes on top of the values in the output. Beside a large sum, tens of
thousands of small terms then vanish in rounding. Summing at most TERMS terms at a time and adding these sums keeps
them.
"""

import torch
from torch import Tensor

TERMS = 4096


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, for a (M, K) and b (K, N)."""
    return add_product(a.new_empty(a.shape[0], b.shape[1]), a, b, first=True)


def add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool = False, buffer: Tensor | None = None) -> Tensor:
    """total += a @ b in place, or total = a @ b if `first`. `buffer` is flat and holds the product of a few rows."""
    if first:
        torch.mm(a[:, :TERMS], b[:TERMS], out=total)
    columns = b.shape[1]
    step = len(a) if buffer is None else min(len(a), buffer.numel() // columns)
    for begin in range(TERMS if first else 0, a.shape[1], TERMS):
        terms = slice(begin, begin + TERMS)
        for row in range(0, len(a), max(step, 1)):
            some = a[row : row + step, terms]
            out = None if buffer is None else buffer[: len(some) * columns].view(len(some), columns)
            total[row : row + step] += torch.mm(some, b[terms], out=out)
    return total
