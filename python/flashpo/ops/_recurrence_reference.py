"""tree_recurrence in torch, forward and backward. The formulas and the names C, U, W, P, G are in tree_recurrence.py.

Everything except the states is computed in one batch over the M chunks of the tree. The states are computed one depth
of chunks at a time, from the roots to the leaves, and their gradients in the reverse order.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashpo.ops._lineage import Chunks
from flashpo.ops._wide import wide_dtype


class Inputs(NamedTuple):
    """The arguments in chunks, (M, H, C, ...). A shorter chunk is filled up with zeros, which change no state."""

    q: Tensor  # multiplied by scale
    k: Tensor
    v: Tensor
    decay: Tensor  # (M, H, C, Dk or 1)
    beta: Tensor | None  # (M, H, C, 1)

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None, chunks: Chunks, scale: float):
        dtype, heads = wide_dtype(v.dtype), v.shape[1]

        def chunked(x: Tensor) -> Tensor:
            x = x.to(dtype)
            return _chunked(x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1), chunks)

        decay = chunked(decay if decay.dim() == 3 else decay[..., None])
        beta = None if beta is None else chunked(beta[..., None])
        return cls(chunked(q) * scale, chunked(k), chunked(v), decay, beta)


class Terms(NamedTuple):
    """The terms of a chunk that do not depend on the state before it; each has M and H as its first dimensions."""

    factor: Tensor  # exp(G_i - G_j), 0 above the diagonal (C, C, Dk or 1)
    reach: Tensor  # exp(G) (C, Dk or 1)
    rest: Tensor  # exp(G_last - G) (C, Dk or 1)
    within: Tensor  # P (C, C)
    keys: Tensor | None  # A / beta, including its diagonal
    update: Tensor  # U (C, Dv)
    read: Tensor | None  # W (C, Dk)
    query: Tensor  # scale q exp(G) (C, Dk)
    write: Tensor  # k exp(G_last - G) (C, Dk)
    kept: Tensor  # exp(G_last) (Dk or 1, 1)


def forward(inputs: Inputs, chunks: Chunks) -> tuple[Tensor, Tensor, Tensor]:
    """out (N, H, Dv), the states before all chunks (M, H, Dk, Dv), and those after the segments (S, H, Dk, Dv)."""
    terms = _terms(inputs)
    before, u = _states(terms, chunks)
    out = _flat(terms.query @ before + terms.within @ u, chunks)
    last = chunks.last
    return out, before, _behind(before[last], terms.kept[last], terms.write[last], u[last])


def backward(
    inputs: Inputs, chunks: Chunks, before: Tensor, d_out: Tensor, d_ends: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of scale q, k, v, decay and beta, each (N, H, ...)."""
    q, k, v, _, beta = inputs
    terms = _terms(inputs)
    d_out = _chunked(d_out.to(v.dtype), chunks)
    u = terms.update if terms.read is None else terms.update - terms.read @ before
    du, d_behind = _state_gradients(terms, chunks, before, d_out, d_ends)
    d_query, d_write = d_out @ before.mT, u @ d_behind.mT
    dq, dk = d_query * terms.reach, d_write * terms.rest
    d_within = (d_out @ u.mT).tril()
    d_reach = terms.query * d_query  # already multiplied by reach, as are all gradients of exponentials here
    dv, d_beta, d_keys = du, None, None
    if beta is not None and terms.keys is not None:
        r = torch.linalg.solve_triangular((terms.keys * beta).mT, du, upper=True, unitriangular=True)
        d_read = -beta * (r @ before.mT)
        k_reach = k * terms.reach
        d_a = -(r @ u.mT).tril(-1)
        dv, d_keys = beta * r, beta * d_a
        d_beta = (r * (v - k_reach @ before)).sum(-1, True) + (d_a * terms.keys).sum(-1, True)
        dk += d_read * terms.reach
        d_reach += k_reach * d_read
    more_q, more_k, d_gap = _key_gradients(q, k, terms.factor, d_within, d_keys)
    shared = terms.reach.shape[-1] == 1
    d_last = terms.kept * (before * d_behind).sum(-1, True)
    d_rest = terms.write * d_write
    if shared:
        d_reach, d_rest, d_last = d_reach.sum(-1, True), d_rest.sum(-1, True), d_last.sum(-2, True)
    d_gap[:, :, -1] += d_rest
    d_reach[:, :, -1:] += d_last.mT
    d_decay = d_reach.flip(2).cumsum(2).flip(2) + (d_gap.flatten(2, 3).mT @ _between(q).flatten(0, 1)).mT
    found = (dq + more_q, dk + more_k, dv, d_decay)
    dq, dk, dv, d_decay = (_flat(x, chunks) for x in found)
    return dq, dk, dv, d_decay, None if d_beta is None else _flat(d_beta, chunks)[..., 0]


def _chunked(x: Tensor, chunks: Chunks) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, 0, 1))[chunks.token].transpose(1, 2)


def _flat(x: Tensor, chunks: Chunks) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)[chunks.place]


def _terms(inputs: Inputs) -> Terms:
    q, k, v, decay, beta = inputs
    gap = (decay.mT @ _between(decay).flatten(0, 1).T).mT.unflatten(2, (decay.shape[2], decay.shape[2]))
    later = torch.ones(gap.shape[2:4], dtype=torch.bool, device=q.device).triu(1)
    factor = gap.exp().masked_fill(later[..., None], 0.0)

    def with_keys(x: Tensor) -> Tensor:
        """(M, H, C, C): x_i k_j exp(G_i - G_j)."""
        if factor.shape[-1] == 1:
            return x @ k.mT * factor[..., 0]
        return torch.einsum("mhid,mhjd,mhijd->mhij", x, k, factor)

    reach, rest, within = decay.cumsum(2).exp(), gap[:, :, -1].exp(), with_keys(q)
    keys, update, read = None, v, None
    if beta is not None:
        keys = with_keys(k)
        solved = torch.linalg.solve_triangular(  # which does not read the diagonal
            keys * beta, torch.cat([v, k * reach], -1) * beta, upper=False, unitriangular=True
        )
        update, read = solved.split([v.shape[-1], k.shape[-1]], -1)
    return Terms(factor, reach, rest, within, keys, update, read, q * reach, k * rest, reach[:, :, -1:].mT)


def _between(x: Tensor) -> Tensor:
    """(C, C, C) over i, j and t: 1 where j < t <= i. The product with the decays gives G_i - G_j, and 0 above the
    diagonal.

    A difference of two running sums would cancel large numbers, and so would the gradients of the decays.
    """
    i = torch.arange(x.shape[2], device=x.device)
    return ((i[None, :, None] < i) & (i <= i[:, None, None])).to(x.dtype)


def _key_gradients(
    q: Tensor, k: Tensor, factor: Tensor, d_within: Tensor, d_keys: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and the gaps (M, H, C, C, Dk or 1) from the gradients of P and of A / beta."""
    if factor.shape[-1] == 1:
        f = factor[..., 0]
        by_query = d_within * f
        dq, dk, d_gap = by_query @ k, by_query.mT @ q, by_query * (q @ k.mT)
        if d_keys is not None:
            by_key = d_keys * f
            dk, d_gap = dk + (by_key + by_key.mT) @ k, d_gap + by_key * (k @ k.mT)
        return dq, dk, d_gap[..., None]
    of_k = k[:, :, None] * factor  # (i, j, Dk), as all tensors from here on
    dq, dk = torch.einsum("mhij,mhijd->mhid", d_within, of_k), torch.zeros_like(k)
    rows = d_within[..., None] * q[:, :, :, None]
    if d_keys is not None:
        dk = torch.einsum("mhij,mhijd->mhid", d_keys, of_k)
        rows = rows + d_keys[..., None] * k[:, :, :, None]
    rows = rows * factor
    return dq, dk + rows.sum(2), rows * k[:, :, None]


def _states(terms: Terms, chunks: Chunks) -> tuple[Tensor, Tensor]:
    """S_before (M, H, Dk, Dv) and u (M, H, C, Dv) of all chunks."""
    sizes = list(chunks.sizes)
    _, heads, _, features = terms.query.shape
    state = terms.query.new_zeros(sizes[0], heads, features, terms.update.shape[-1])
    states, updates = [state], []
    parents, read = chunks.before.split(sizes), None if terms.read is None else terms.read.split(sizes)
    update, write, kept = (x.split(sizes) for x in (terms.update, terms.write, terms.kept))
    for depth in range(len(sizes)):
        u = update[depth] if read is None else update[depth] - read[depth] @ state
        updates.append(u)
        if depth + 1 < len(sizes):
            state = _handed_on(_behind(state, kept[depth], write[depth], u), parents[depth + 1])
            states.append(state)
    return torch.cat(states), torch.cat(updates)


def _state_gradients(
    terms: Terms, chunks: Chunks, before: Tensor, d_out: Tensor, d_ends: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of u (M, H, C, Dv) and of the states after all chunks (M, H, Dk, Dv)."""
    sizes = list(chunks.sizes)
    d_behind = torch.zeros_like(before)
    if d_ends is not None:
        d_behind[chunks.last] = d_ends.to(before.dtype)
    du = terms.within.mT @ d_out
    of_queries = terms.query.mT @ d_out
    parents, into = chunks.before.split(sizes), d_behind.split(sizes)
    read = None if terms.read is None else terms.read.split(sizes)
    write, kept, du_of, queries = (x.split(sizes) for x in (terms.write, terms.kept, du, of_queries))
    for depth in reversed(range(len(sizes))):
        du_of[depth].add_(write[depth] @ into[depth])
        if depth > 0:
            d_state = kept[depth] * into[depth] + queries[depth]
            if read is not None:
                d_state -= read[depth].mT @ du_of[depth]
            _summed(into[depth - 1], d_state, parents[depth])
    return du, d_behind


def _behind(state: Tensor, kept: Tensor, write: Tensor, u: Tensor) -> Tensor:
    return kept * state + write.mT @ u


def _handed_on(behind: Tensor, before: Tensor) -> Tensor:
    """Pass the final states of one depth's chunks on to the chunks of the next depth."""
    return behind[before]


def _summed(d_behind: Tensor, d_state: Tensor, before: Tensor) -> None:
    """Add up the gradient of each state over the chunks that start from it."""
    d_behind.index_add_(0, before, d_state)
