"""The recurrence of Mamba, for each feature by itself, over a token tree: h_t = a_t h_p(t) + b_t.

p(t) is the token before t, and h before a first token is 0. Backward goes from the leaves to the roots:

d_t = d h_t + the sum over the children c of t of a_c d_c      d b_t = d_t      d a_t = d_t h_p(t)

All tokens of one depth are computed in one step, so there are as many steps as the longest sequence has tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashpo.ops._first_order import first_order
from flashpo.ops._lineage import Lineage, Waves, check_lineage


def tree_scan(a: Tensor, b: Tensor, lineage: Lineage) -> Tensor:
    """h (N, F) for the N tokens of a tree; differentiable in a and b.

    Args:
        a, b: (N, F) of one dtype, which is also the result's. fp32 or wider keeps long sequences accurate.
        lineage: which token follows which.

    Raises:
        TypeError, ValueError: the message names the argument.
    """
    if a.dim() != 2 or a.shape != b.shape or a.dtype != b.dtype:
        found = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (a, b))
        raise ValueError(f"a and b must be (tokens, features) of one dtype, got {found}")
    check_lineage(lineage, "a", a)
    return TreeScan.apply(a, b, lineage.waves())


class TreeScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, waves: Waves) -> Tensor:
        decays, states = a[waves.order].split(waves.sizes), list(b[waves.order].split(waves.sizes))
        for depth in range(1, len(states)):
            states[depth].addcmul_(decays[depth], states[depth - 1][waves.parents[depth]])
        h = torch.cat(states)[waves.place]
        ctx.waves = waves
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    @first_order
    def backward(ctx: Any, d_h: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        a, h = ctx.saved_tensors
        waves = ctx.waves
        decays, found = a[waves.order].split(waves.sizes), list(d_h[waves.order].split(waves.sizes))
        for depth in reversed(range(1, len(found))):
            found[depth - 1].index_add_(0, waves.parents[depth], decays[depth] * found[depth])
        d_b = torch.cat(found)[waves.place]
        return d_b * F.pad(h, (0, 0, 0, 1))[waves.before], d_b, None
