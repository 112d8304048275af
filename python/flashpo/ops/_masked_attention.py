"""Dense attention of some queries to some keys under a mask, in fp32 or wider, by the formulas of tree_attention.

Shapes: q (I, Hq, D), k (J, Hkv, D), v (J, Hkv, Dv), seen (I, J), sinks (Hq,), lse and delta (I, Hq).
"""

import torch
from torch import Tensor

from flashpo.ops._wide import wide_dtype


def visible(i: Tensor, j: Tensor, end: Tensor, position: Tensor, window: int) -> Tensor:
    """(I, J) bool: whether the query at flat index i sees the key at flat index j. end and position are the tree's."""
    seen = (j <= i[:, None]) & (i[:, None] < end[j])
    return seen & (position[i][:, None] - position[j] < window) if window else seen


def _scores(q: Tensor, k: Tensor, seen: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor | None]:
    """The scores (Hkv, Hq / Hkv, I, J), -inf where unseen, and their derivative by scale q k (None where it is 1)."""
    x = torch.einsum("ihrd,jhd->hrij", q.unflatten(1, (k.shape[1], -1)) * scale, k)
    slope = None
    if softcap:
        tanh = torch.tanh(x / softcap)
        x, slope = softcap * tanh, 1 - tanh * tanh
    return x.masked_fill(~seen, -torch.inf), slope


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, seen: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """(out (I, Hq, Dv), lse (I, Hq)), in fp32 or wider."""
    q, k, v = _wide(q, k, v)
    s, _ = _scores(q, k, seen, scale, softcap)
    lse = s.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype).view(*lse.shape[:2], 1))
    out = torch.einsum("hrij,jhd->ihrd", (s - lse[..., None]).exp(), v)
    return out.flatten(1, 2), lse.flatten(0, 1).t()


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    scale: float,
    softcap: float,
    lse: Tensor,
    delta: Tensor,
    d_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), in fp32 or wider. Sinks enter through their share of lse only."""
    q, k, v, d_out = _wide(q, k, v, d_out)
    s, slope = _scores(q, k, seen, scale, softcap)
    heads = (k.shape[1], -1)
    lse, delta = (x.t().unflatten(0, heads)[..., None] for x in (lse, delta))
    p = (s - lse).exp()
    d_out = d_out.unflatten(1, heads)
    dv = torch.einsum("hrij,ihrd->jhd", p, d_out)
    ds = p * (torch.einsum("ihrd,jhd->hrij", d_out, v) - delta) * scale
    if slope is not None:
        ds = ds * slope
    dq = torch.einsum("hrij,jhd->ihrd", ds, k).flatten(1, 2)
    return dq, torch.einsum("hrij,ihrd->jhd", ds, q.unflatten(1, heads)), dv


def sink_gradient(sinks: Tensor | None, lse: Tensor, delta: Tensor) -> Tensor:
    """The gradient (Hq,) of the sinks, summed over all queries; an empty tensor without sinks."""
    if sinks is None:
        return lse.new_empty(0)
    return -((sinks.to(lse.dtype) - lse).exp() * delta).sum(0).to(sinks.dtype)


def _wide(*tensors: Tensor) -> list[Tensor]:
    dtype = wide_dtype(tensors[0].dtype)
    return [x.to(dtype) for x in tensors]
