"""Linear attention with decay for one token in each row of a decode batch. `tree_recurrence` is for whole trees.

S (Dk, Dv) is the state of a row and head. It is read once and overwritten:

S := diag(exp(decay)) S + k u^T                 out = scale S^T q
u = beta (v - (diag(exp(decay)) S)^T k)         with beta: the gated delta rule
u = v                                           without beta: gated linear attention, Mamba-2
"""

import torch
from torch import Tensor

from flashpo._op import native, op

DTYPE = torch.float32  # of the kernels' arguments


def recurrence_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None, *, scale: float = 1.0
) -> Tensor:
    """Read one token in each of R rows; return out (R, H, Dv).

    Args:
        state: (R, H, Dk, Dv), written over. It is contiguous, or the transpose of a contiguous (R, H, Dv, Dk).
        q, k: (R, Hk, Dk) in the dtype of the state, like all that follows. Each head serves H / Hk consecutive heads.
        v: (R, H, Dv).
        decay: (R, H), or (R, H, Dk) with one number per feature of k: the log of the share of the state that is kept.
        beta: (R, H): the share of what the state holds for k that is replaced by v. None: v is added.
        scale: the factor of the queries.

    Raises:
        TypeError, ValueError: dtypes or shapes disagree, or the state is laid out in another way.
    """
    rows, heads, dk, dv = state.shape
    wanted = {"q": (rows, q.shape[1], dk), "k": (rows, q.shape[1], dk), "v": (rows, heads, dv), "beta": (rows, heads)}
    for name, x in (("q", q), ("k", k), ("v", v), ("decay", decay), ("beta", beta)):
        if x is None:
            continue
        if x.dtype != state.dtype:
            raise TypeError(f"{name} must be {state.dtype} as state is, got {x.dtype}")
        shapes = ((rows, heads), (rows, heads, dk)) if name == "decay" else (wanted[name],)
        if tuple(x.shape) not in shapes:
            raise ValueError(f"{name} must be {' or '.join(map(str, shapes))}, got {tuple(x.shape)}")
    if q.shape[1] == 0 or heads % q.shape[1] != 0:
        raise ValueError(f"state has {heads} heads, which is not a multiple of the {q.shape[1]} of q")
    if not (state.is_contiguous() or state.mT.is_contiguous()):
        raise ValueError("state must be contiguous, or the transpose of a contiguous tensor")
    return recurrence_step_(state, q, k, v, decay, beta, float(scale))


@op(mutates=("state",))
def recurrence_step_(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None, scale: float
) -> Tensor:
    q, k = (x.repeat_interleave(state.shape[1] // x.shape[1], 1) for x in (q, k))
    state.mul_(decay.exp().reshape(*state.shape[:2], -1, 1))
    held = torch.einsum("rhkv,rhk->rhv", state, k)
    state.add_(k[..., None] * (v if beta is None else beta[..., None] * (v - held))[..., None, :])
    return scale * torch.einsum("rhkv,rhk->rhv", state, q)


@recurrence_step_.fake
def _(state, q, k, v, *rest):
    return v.new_empty(v.shape)


@recurrence_step_.backend("native")  # csrc/cpu/recurrence_step.cpp
def _(state, q, k, v, decay, beta, scale):
    if state.device.type != "cpu" or state.dtype != DTYPE:
        return NotImplemented
    inputs = [None if x is None else x.contiguous() for x in (q, k, v, decay.exp(), beta)]
    out = v.new_empty(v.shape)
    by_value = state.is_contiguous()
    native.recurrence_step(state if by_value else state.mT, by_value, *inputs, scale, out, torch.get_num_threads())
    return out


@recurrence_step_.backend("triton")  # kernels/recurrence_step.py
def _(state, *rest):
    if state.dtype != DTYPE or max(state.shape[2:]) > 256:
        return NotImplemented
    from flashpo.kernels.recurrence_step import step

    return step(state, *rest)
