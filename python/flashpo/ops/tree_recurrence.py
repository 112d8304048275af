"""Linear attention with decay over a token tree: every token's state goes on from that of the token before it.

S_t (Dk, Dv) is the state behind token t of a head, p(t) the token before it in its sequences; 0 before a first token.

S_t = diag(exp(decay_t)) S_p(t) + k_t u_t^T                       out_t = scale S_t^T q_t
u_t = beta_t (v_t - (diag(exp(decay_t)) S_p(t))^T k_t)            with beta: the gated delta rule
u_t = v_t                                                         without: gated linear attention, Mamba-2

Sources: Gated DeltaNet (arXiv 2412.06464), Kimi Linear (2510.26692, a decay for each feature of k), Mamba-2
(2405.21060).

Chunks of C tokens without a branch inside turn this into matrix products. With G the sum of the chunk's decays up to
and with a token, P_ij = scale q_i k_j exp(G_i - G_j) and A_ij = beta_i k_i k_j exp(G_i - G_j), j < i:

(I + A) [U, W] = [beta v, beta k exp(G)]       without beta U = v, W = 0
u = U - W S_before                             out = scale (q exp(G)) S_before + (P, j <= i) u
S_behind = exp(G_last) S_before + (k exp(G_last - G))^T u

All but the states is one batch over all chunks of the tree; the states go chunk after chunk, those of one depth at a
time. That two branches start from one state makes its gradient the sum over both.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashpo.ops._lineage import Lineage
from flashpo.ops._wide import wide_dtype

CHUNK = 32
CHUNK_PER_FEATURE = 16  # a decay for each feature needs C x C x Dk numbers for each head


class Terms(NamedTuple):
    """What of a chunk does not depend on the state before it, over (M, H, ...)."""

    update: Tensor  # U (C, Dv)
    read: Tensor | None  # W (C, Dk)
    query: Tensor  # scale q exp(G) (C, Dk)
    within: Tensor  # P (C, C)
    write: Tensor  # k exp(G_last - G) (C, Dk)
    kept: Tensor  # exp(G_last) (Dk or 1, 1)


def tree_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor | None,
    lineage: Lineage,
    *,
    scale: float = 1.0,
    ends: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """out (N, H, Dv) in the dtype of v, differentiable in all tensors; and the states behind the segments.

    Args:
        q, k: (N, Hk, Dk); Hk divides H: each serves H / Hk neighbouring heads.
        v: (N, H, Dv).
        decay: (N, H), or (N, H, Dk) for one of each feature of k; log of what is kept, at most 0.
        beta: (N, H): how much of what the state says about k is replaced; None: v is added.
        lineage: of the N tokens.
        ends: whether the states (S, H, Dk, Dv) are wanted, else None.

    Sums, states and exponentials are in fp32 or wider.
    """
    with torch.autocast(v.device.type, enabled=False):  # it would round the products, as it rounds those of layers
        return _tree_recurrence(q, k, v, decay, beta, lineage, scale, ends)


def _tree_recurrence(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None, lineage: Lineage, scale: float, ends: bool
) -> tuple[Tensor, Tensor | None]:
    per_feature = decay.dim() == 3
    chunks = lineage.chunks(CHUNK_PER_FEATURE if per_feature else CHUNK)
    dtype, heads = wide_dtype(v.dtype), v.shape[1]

    def chunked(x: Tensor) -> Tensor:
        """(N, H or Hk, D) -> (M, H, C, D), zeros where a chunk is shorter: such a token changes no state."""
        x = F.pad(x.to(dtype), (0, 0, 0, 0, 0, 1))[chunks.token].transpose(1, 2)
        return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)

    q, k, v_ = chunked(q * scale), chunked(k), chunked(v)
    decay = chunked(decay if per_feature else decay[..., None])
    terms = _terms(q, k, v_, decay, None if beta is None else chunked(beta[..., None]))
    before, update = _states(terms, chunks.before, chunks.sizes)
    out = terms.query @ before + terms.within @ update
    out = out.transpose(1, 2).flatten(0, 1)[chunks.place].to(v.dtype)
    if not ends:
        return out, None
    last = chunks.last
    return out, _behind(before[last], terms.kept[last], terms.write[last], update[last])


def _terms(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None) -> Terms:
    """q, k (M, H, C, Dk), v (M, H, C, Dv), decay (M, H, C, Dk or 1), beta (M, H, C, 1)."""
    gap = _gaps(decay)
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    factor = gap.exp().masked_fill(later[..., None], 0.0)

    def with_keys(x: Tensor) -> Tensor:
        """(M, H, C, C): x_i k_j exp(G_i - G_j)."""
        if factor.shape[-1] == 1:
            return x @ k.mT * factor[..., 0]
        return torch.einsum("mhid,mhjd,mhijd->mhij", x, k, factor)

    reach, within = decay.cumsum(2).exp(), with_keys(q)
    write, kept = k * gap[:, :, -1].exp(), reach[:, :, -1:].mT
    if beta is None:
        return Terms(v, None, q * reach, within, write, kept)
    solved = torch.linalg.solve_triangular(  # it does not read the diagonal
        with_keys(k) * beta, torch.cat([v, k * reach], -1) * beta, upper=False, unitriangular=True
    )
    update, read = solved.split([v.shape[-1], k.shape[-1]], -1)
    return Terms(update, read, q * reach, within, write, kept)


def _gaps(decay: Tensor) -> Tensor:
    """(M, H, C, Dk or 1) -> (M, H, C, C, Dk or 1): of i and j, the sum of the decays behind j up to and with i; 0 above
    the diagonal. As a product with zeros and ones: differences of running sums, and so the gradients of the decays,
    would be those of large numbers.
    """
    i = torch.arange(decay.shape[2], device=decay.device)
    between = ((i[None, :, None] < i) & (i <= i[:, None, None])).to(decay.dtype)  # (i, j, t)
    return (decay.mT @ between.flatten(0, 1).T).mT.unflatten(2, (len(i), len(i)))


def _states(terms: Terms, before: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """S_before (M, H, Dk, Dv) and u (M, H, C, Dv) of all chunks."""
    _, heads, _, features = terms.query.shape
    state = terms.query.new_zeros(sizes[0], heads, features, terms.update.shape[-1])
    states, updates = [state], []
    parts = [[None] * len(sizes) if x is None else x.split(sizes) for x in terms]
    for depth, (update, read, _, _, write, kept) in enumerate(zip(*parts)):
        u = update if read is None else update - read @ state
        updates.append(u)
        if depth + 1 < len(sizes):
            state = _handed_on(_behind(state, kept, write, u), before.split(sizes)[depth + 1])
            states.append(state)
    return torch.cat(states), torch.cat(updates)


def _behind(state: Tensor, kept: Tensor, write: Tensor, u: Tensor) -> Tensor:
    return kept * state + write.mT @ u


def _handed_on(behind: Tensor, before: Tensor) -> Tensor:
    """The states of one depth, for the chunks of the next."""
    return behind[before]
