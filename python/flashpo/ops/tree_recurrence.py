"""Linear attention with decay over a token tree: the state of each token continues the state of the token before it.

S_t (Dk, Dv) is the state of one head after token t. p(t) is the token before t; the state before a first token is 0.

S_t = diag(exp(decay_t)) S_p(t) + k_t u_t^T                       out_t = scale S_t^T q_t
u_t = beta_t (v_t - (diag(exp(decay_t)) S_p(t))^T k_t)            with beta: the gated delta rule
u_t = v_t                                                         without beta: gated linear attention, Mamba-2

Sources: Gated DeltaNet (arXiv 2412.06464), Kimi Linear (2510.26692, with a decay for each feature of k), Mamba-2
(2405.21060).

Chunks of C tokens that have no branch inside turn this into matrix products. G is the sum of the chunk's decays up to
and including a token, P_ij = scale q_i k_j exp(G_i - G_j), and A_ij = beta_i k_i k_j exp(G_i - G_j) for j < i:

(I + A) [U, W] = [beta v, beta k exp(G)]       without beta: U = v, W = 0
u = U - W S_before                             out = scale (q exp(G)) S_before + (P, j <= i) u
S_behind = exp(G_last) S_before + (k exp(G_last - G))^T u

Backward keeps the states before the chunks and recomputes everything else. If several branches start from one state,
its gradient is the sum over them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashpo._op import native, op
from flashpo.ops import _recurrence_reference as reference
from flashpo.ops._check import KERNEL_DTYPES, check_device, check_flag, check_float, check_positive
from flashpo.ops._first_order import first_order
from flashpo.ops._layout import dense_rows
from flashpo.ops._lineage import Chunks, Lineage, check_lineage
from flashpo.ops._wide import wide_dtype

CHUNK = 32
CHUNK_PER_FEATURE = 16  # a decay per feature needs C x C x Dk numbers per head


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
    """Linear attention of the N tokens of a tree, each to itself and its ancestors; differentiable in all tensors.

    The formulas are at the top of flashpo/ops/tree_recurrence.py.

    Args:
        q, k: (N, Hk, Dk). Hk divides H, and each of these heads serves H / Hk consecutive heads of v.
        v: (N, H, Dv), in the dtype of q and k.
        decay: (N, H), or (N, H, Dk) with one number per feature of k: the log of the share of the state that is kept,
            at most 0.
        beta: (N, H): the share of what the state holds for k that is replaced by v. None: v is added.
        lineage: which token follows which.
        scale: the factor of the queries.
        ends: whether to return the states at the ends of the segments.

    Returns:
        (out, states): out is (N, H, Dv) in the dtype of v; states is (S, H, Dk, Dv) in fp32 or wider, or None without
        `ends`. Sums, states and exponentials are in fp32 or wider.

    Raises:
        TypeError, ValueError: the message names the argument. The values of decay are not checked.
    """
    _check(q, k, v, decay, beta, lineage)
    check_positive("scale", scale)
    check_flag("ends", ends)
    args = q, k, v, decay, beta, lineage, float(scale), ends
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in args[:5]):
        return TreeRecurrence.apply(*args)
    chunks = _chunks(lineage, decay)
    out, _, states = tree_recurrence_fwd(*args[:5], *chunks, float(scale), False, ends)
    return out, states if ends else None


def _check(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None, lineage: Lineage) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_float(name, x)
        if x.dim() != 3:
            raise ValueError(f"{name} must be (tokens, heads, features), got {tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}")
        check_device(name, x, "q", q)
    if k.shape != q.shape:
        raise ValueError(f"k must have the shape of q, {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.shape[0] != q.shape[0]:
        raise ValueError(f"v has {v.shape[0]} tokens, q has {q.shape[0]}")
    if q.shape[1] == 0 or v.shape[1] == 0 or v.shape[1] % q.shape[1] != 0:
        raise ValueError(f"v has {v.shape[1]} heads, which is not a multiple of the {q.shape[1]} of q")
    if 0 in (q.shape[2], v.shape[2]):
        raise ValueError(f"q and v must have features, got {q.shape[2]} and {v.shape[2]}")
    shape = v.shape[:2]
    check_float("decay", decay)
    if decay.shape not in (shape, (*shape, q.shape[2])):
        raise ValueError(
            f"decay must be (tokens, heads of v), {tuple(shape)}, or have one number more for each of the "
            f"{q.shape[2]} features of k, got {tuple(decay.shape)}"
        )
    check_device("decay", decay, "q", q)
    if beta is not None:
        check_float("beta", beta)
        if beta.shape != shape:
            raise ValueError(f"beta must be (tokens, heads of v), {tuple(shape)}, got {tuple(beta.shape)}")
        check_device("beta", beta, "q", q)
    check_lineage(lineage, "q", q)


def _chunks(lineage: Lineage, decay: Tensor) -> Chunks:
    return lineage.chunks(CHUNK if decay.dim() == 2 else CHUNK_PER_FEATURE)


@op
def tree_recurrence_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor | None,
    token: Tensor,  # this and the following are the fields of Chunks
    place: Tensor,
    before: Tensor,
    last: Tensor,
    sizes: list[int],
    scale: float,
    with_states: bool,
    with_ends: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out; the states before the chunks (M, H, Dk, Dv); the states after the segments (S, H, Dk, Dv).

    States that are not asked for are empty tensors.
    """
    chunks = Chunks(token, place, before, last, sizes)
    out, states, ends = reference.forward(reference.Inputs.of(q, k, v, decay, beta, chunks, scale), chunks)
    none = states.new_empty((0, *states.shape[1:]))
    return out.to(v.dtype).contiguous(), states if with_states else none, ends if with_ends else none.clone()


@tree_recurrence_fwd.fake
def _(q, k, v, decay, beta, token, place, before, last, sizes, scale, with_states, with_ends):
    return _results(q, v, token, last, with_states, with_ends)


def _results(q, v, token, last, with_states, with_ends):
    shape, dtype = (v.shape[1], q.shape[2], v.shape[2]), wide_dtype(v.dtype)
    counts = (token.shape[0] if with_states else 0, last.shape[0] if with_ends else 0)
    return v.new_empty(v.shape), *(v.new_empty((n, *shape), dtype=dtype) for n in counts)


@op
def tree_recurrence_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor | None,
    token: Tensor,
    place: Tensor,
    before: Tensor,
    last: Tensor,
    sizes: list[int],
    scale: float,
    states: Tensor,  # as returned by forward: the states before the chunks
    d_out: Tensor,
    d_ends: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, d_decay, d_beta), contiguous, each in its argument's dtype; d_beta is empty without beta."""
    chunks = Chunks(token, place, before, last, sizes)
    inputs = reference.Inputs.of(q, k, v, decay, beta, chunks, scale)
    dq, dk, dv, d_decay, d_beta = reference.backward(inputs, chunks, states, d_out, d_ends)
    dq, dk = (x.unflatten(1, (q.shape[1], -1)).sum(2) for x in (dq * scale, dk))
    return _in_dtypes((dq, dk, dv, d_decay.reshape(decay.shape), d_beta), (q, k, v, decay, beta))


def _in_dtypes(grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> Any:
    """Cast the gradients to their inputs' dtypes. Operators cannot return None, so without beta the last is empty."""
    found = [x.to(of.dtype).contiguous() for x, of in zip(grads, inputs) if x is not None and of is not None]
    return tuple(found) if len(found) == len(grads) else (*found, found[0].new_empty(0))


@tree_recurrence_bwd.fake
def _(q, k, v, decay, beta, *rest):
    inputs = (q, k, v, decay, v.new_empty(0) if beta is None else beta)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)


@tree_recurrence_fwd.backend("native")  # csrc/cpu/tree_recurrence.cpp
def _(q, k, v, decay, beta, token, place, before, last, sizes, scale, with_states, with_ends):
    if not _for_native(q, k, v):
        return NotImplemented
    inputs, chunks, threads = _laid_out(q, k, v, decay, beta), (token, before, last, sizes), torch.get_num_threads()
    out, states, ends = _results(q, v, token, last, with_states, with_ends)
    scratch = v.new_empty(
        native.tree_recurrence_scratch(*inputs, *chunks, False, with_states, threads), dtype=torch.float32
    )
    results = (out, states if with_states else None, ends if with_ends else None)
    native.tree_recurrence_fwd(*inputs, *chunks, scale, *results, scratch, threads)
    return out, states, ends


@tree_recurrence_bwd.backend("native")  # csrc/cpu/tree_recurrence.cpp
def _(q, k, v, decay, beta, token, place, before, last, sizes, scale, states, d_out, d_ends):
    if not _for_native(q, k, v):
        return NotImplemented
    inputs, chunks, threads = _laid_out(q, k, v, decay, beta), (token, before, last, sizes), torch.get_num_threads()
    grads = [None if x is None else x.new_empty(x.shape, dtype=torch.float32) for x in (q, k, v, decay, beta)]
    scratch = v.new_empty(native.tree_recurrence_scratch(*inputs, *chunks, True, True, threads), dtype=torch.float32)
    upstream = d_out.to(v.dtype).contiguous(), None if d_ends is None else d_ends.float().contiguous()
    native.tree_recurrence_bwd(*inputs, *chunks, scale, states, *upstream, *grads, scratch, threads)
    return _in_dtypes(grads, (q, k, v, decay, beta))


def _for_native(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return v.device.type == "cpu" and v.dtype in KERNEL_DTYPES and q.dtype == k.dtype == v.dtype


def _laid_out(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None) -> list[Tensor | None]:
    """q, k and v with unit stride along the last dimension; decay and beta contiguous in fp32."""
    rest = (None if x is None else x.float().contiguous() for x in (decay, beta))
    return [*(dense_rows(x) for x in (q, k, v)), *rest]


def _for_triton(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> bool:
    fits = max(q.shape[2], v.shape[2]) <= 256 and v.shape[0] > 0
    return v.dtype in KERNEL_DTYPES and q.dtype == k.dtype == v.dtype and decay.dim() == 2 and fits


@tree_recurrence_fwd.backend("triton")  # kernels/tree_recurrence.py
def _(q, k, v, decay, beta, token, place, before, last, sizes, scale, with_states, with_ends):
    if not _for_triton(q, k, v, decay):
        return NotImplemented
    from flashpo.kernels.tree_recurrence import forward

    out, states, ends = forward(q, k, v, decay, beta, token, before, last, sizes, scale, with_ends)
    return out, states if with_states else states.new_empty((0, *states.shape[1:])), ends


@tree_recurrence_bwd.backend("triton")  # kernels/tree_recurrence_backward.py
def _(q, k, v, decay, beta, token, place, before, last, sizes, *rest):
    if not _for_triton(q, k, v, decay):
        return NotImplemented
    from flashpo.kernels.tree_recurrence_backward import backward

    grads = backward(q, k, v, decay, beta, token, before, last, sizes, *rest)
    return _in_dtypes(grads, (q, k, v, decay, beta))


class TreeRecurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, decay, beta, lineage: Lineage, scale: float, ends: bool):
        chunks = _chunks(lineage, decay)
        out, before, states = tree_recurrence_fwd(q, k, v, decay, beta, *chunks, scale, True, ends)
        ctx.chunks, ctx.scale = chunks, scale
        ctx.save_for_backward(q, k, v, decay, beta, before)
        ctx.set_materialize_grads(False)
        return out, states if ends else None

    @staticmethod
    @first_order
    def backward(ctx: Any, d_out: Tensor | None, d_ends: Tensor | None):  # type: ignore[override]
        *inputs, before = ctx.saved_tensors
        d_out = torch.zeros_like(inputs[2]) if d_out is None else d_out
        *grads, d_beta = tree_recurrence_bwd(*inputs, *ctx.chunks, ctx.scale, before, d_out, d_ends)
        return *grads, None if inputs[4] is None else d_beta, None, None, None
