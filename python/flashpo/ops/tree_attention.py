"""Attention over a token tree: sequences that begin alike share a path, whose keys and values exist once.

Tokens are flat in depth-first order. All tokens that see key j therefore lie between j and the end of its segment's
subtree:

query i sees key j  <=>  j <= i < end[j]  and, with a window, position[i] - position[j] < window
s_ij = cap(scale q_i k_j)      cap(x) = softcap tanh(x / softcap)      lse_i = log(exp(sink) + sum_j exp(s_ij))
p_ij = exp(s_ij - lse_i)       out_i = sum_j p_ij v_j

delta_i = d_out_i out_i        ds_ij = p_ij (d_out_i v_j - delta_i) scale cap'(scale q_i k_j)
dq_i = sum_j ds_ij k_j         dk_j = sum_i ds_ij q_i         dv_j = sum_i p_ij d_out_i
d sink = -sum_i exp(sink - lse_i) delta_i
"""

import sys
from typing import Any

import torch
from torch import Tensor

from flashpo._op import native, op
from flashpo.ops import _masked_attention as masked
from flashpo.ops._check import (
    KERNEL_DTYPES,
    check_device,
    check_dtype,
    check_float,
    check_int,
    check_positive,
    check_that,
)
from flashpo.ops._first_order import first_order
from flashpo.ops._layout import dense_rows
from flashpo.ops._wide import wide_dtype


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    end: Tensor,
    position: Tensor,
    *,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention of a tree's N tokens, each to itself and its ancestors; differentiable in q, k, v and sinks.

    The formulas are at the top of flashpo/ops/tree_attention.py. A packed batch without shared prefixes is a forest of
    chains. A single causal sequence has `end[j] = N` everywhere.

    Args:
        q, k, v: (N, Hq, D), (N, Hkv, D), (N, Hkv, Dv) of one dtype. Hq is a multiple of Hkv (grouped-query attention).
        end: (N,) int32: `end[j]` is the index after the last token that sees token j. Subtrees are nested or disjoint.
        position: (N,) int32: the token's position in its sequence, by which the window is counted.
        scale: the factor of the scores; D**-0.5 by default.
        window: how many positions back a token sees, including its own (Mistral, Gemma). 0 means all.
        softcap: the bound on the scores, as in Gemma 2. 0 means none.
        sinks: (Hq,): one more score per head, which takes part in the softmax but has no value (gpt-oss).

    Returns:
        (N, Hq, Dv) in the dtype of q. Sums and softmax are in fp32 or wider. Where the hardware multiplies 16-bit
        numbers (GPUs; bfloat16 on CPUs with AVX512-BF16 or AMX), p and ds are rounded to the dtype of q before they are
        multiplied.

    Raises:
        TypeError, ValueError: the message names the argument. (Values of `end` on CUDA: a device assertion.)
    """
    _check(q, k, v, end, position, window, softcap, sinks)
    if scale is None:
        scale = q.shape[2] ** -0.5
    check_positive("scale", scale)
    return attend(q, k, v, sinks, end, position, float(scale), window, float(softcap))


def attend(q, k, v, sinks, end, position, scale: float, window: int, softcap: float) -> Tensor:
    """tree_attention without its checks, which on a GPU are seven kernel launches, for trees that this package
    builds."""
    args = q, k, v, sinks, end, position, scale, window, softcap
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in args[:4]):
        return TreeAttention.apply(*args)
    return tree_attention_fwd(*args)[0]


def release() -> None:
    """Free what Triton's kernels keep of the last tree."""
    if (tiles := sys.modules.get("flashpo.kernels.tree_tiles")) is not None:
        tiles.release()


def _check(q, k, v, end, position, window, softcap, sinks) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_float(name, x)
        if x.dim() != 3:
            raise ValueError(f"{name} must be (tokens, heads, head dimension), got {tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}")
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name} has {x.shape[0]} tokens, q has {q.shape[0]}")
        check_device(name, x, "q", q)
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"q has {q.shape[1]} heads, which is not a multiple of the {k.shape[1]} of k")
    if v.shape[1] != k.shape[1]:
        raise ValueError(f"v has {v.shape[1]} heads, k has {k.shape[1]}")
    if k.shape[2] != q.shape[2] or 0 in (k.shape[2], v.shape[2]):
        raise ValueError(
            f"head dimensions of q and k must agree, and none be 0: {q.shape[2]}, {k.shape[2]}, {v.shape[2]}"
        )
    for name, x in (("end", end), ("position", position)):
        check_dtype(name, x, torch.int32)
        if x.shape != q.shape[:1]:
            raise ValueError(f"{name} must have the shape of q's tokens, {tuple(q.shape[:1])}, got {tuple(x.shape)}")
        check_device(name, x, "q", q)
    check_int("window", window, 0)
    if softcap != 0:
        check_positive("softcap", softcap)
    if sinks is not None:
        check_float("sinks", sinks)
        if sinks.shape != q.shape[1:2]:
            raise ValueError(
                f"sinks must have one number for each head of q, {tuple(q.shape[1:2])}, got {tuple(sinks.shape)}"
            )
        check_device("sinks", sinks, "q", q)
    here = torch.arange(q.shape[0], dtype=torch.int32, device=end.device)
    check_that(
        ((end > here) & (end <= q.shape[0])).all(),
        "end must be greater than the index of its token, and at most the number of tokens",
    )


def _seen(end: Tensor, position: Tensor, window: int) -> Tensor:
    here = torch.arange(end.shape[0], device=end.device)
    return masked.visible(here, here, end, position, window)


@op
def tree_attention_fwd(
    q: Tensor,  # (N, Hq, D)
    k: Tensor,  # (N, Hkv, D)
    v: Tensor,  # (N, Hkv, Dv)
    sinks: Tensor | None,  # (Hq,)
    end: Tensor,  # (N,)
    position: Tensor,  # (N,)
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """(out (N, Hq, Dv), lse (N, Hq) in fp32 or wider)."""
    out, lse = masked.forward(q, k, v, sinks, _seen(end, position, window), scale, softcap)
    return out.to(q.dtype).contiguous(), lse.contiguous()


@tree_attention_fwd.fake
def _(q, k, v, *rest):
    lse = q.new_empty(q.shape[:2], dtype=wide_dtype(q.dtype))
    return q.new_empty((*q.shape[:2], v.shape[2])), lse


@op
def tree_attention_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    end: Tensor,
    position: Tensor,
    scale: float,
    window: int,
    softcap: float,
    out: Tensor,  # as returned by forward
    lse: Tensor,  # as returned by forward
    d_out: Tensor,  # (N, Hq, Dv)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dsinks), contiguous, each in its argument's dtype; dsinks is empty if there are no sinks."""
    delta = (out.to(lse.dtype) * d_out).sum(-1)
    seen = _seen(end, position, window)
    dq, dk, dv = masked.backward(q, k, v, seen, scale, softcap, lse, delta, d_out)
    dq, dk, dv = (x.to(q.dtype).contiguous() for x in (dq, dk, dv))
    return dq, dk, dv, masked.sink_gradient(sinks, lse, delta)


@tree_attention_bwd.fake
def _(q, k, v, sinks, end, position, scale, window, softcap, out, lse, d_out):
    grads = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return *grads, lse.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)


@tree_attention_fwd.backend("native")  # csrc/cpu/tree_attention.cpp
def _(q, k, v, sinks, end, position, scale, window, softcap):
    if q.device.type != "cpu" or q.dtype not in KERNEL_DTYPES:
        return NotImplemented
    inputs, tree, threads = _laid_out(q, k, v), _laid_out(end, position), torch.get_num_threads()
    out = q.new_empty((*q.shape[:2], v.shape[2]))
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    scratch = lse.new_empty(native.tree_attention_scratch(*inputs, *tree, window, False, threads))
    sinks = None if sinks is None else sinks.float().contiguous()
    native.tree_attention_fwd(*inputs, sinks, *tree, scale, window, softcap, out, lse, scratch, threads)
    return out, lse


@tree_attention_bwd.backend("native")  # csrc/cpu/tree_attention.cpp
def _(q, k, v, sinks, end, position, scale, window, softcap, out, lse, d_out):
    if q.device.type != "cpu" or q.dtype not in KERNEL_DTYPES:
        return NotImplemented
    inputs, threads = _laid_out(q, k, v, end, position), torch.get_num_threads()
    d_out = d_out.contiguous()  # before torch's sum, whose order depends on the layout
    delta = (out.float() * d_out).sum(-1)
    results = lse, delta, d_out
    grads = [x.new_empty(x.shape, dtype=torch.float32) for x in (q, k, v)]
    scratch = lse.new_empty(native.tree_attention_scratch(*inputs, window, True, threads))
    native.tree_attention_bwd(*inputs, scale, window, softcap, *results, *grads, scratch, threads)
    dq, dk, dv = (x.to(q.dtype) for x in grads)
    return dq, dk, dv, masked.sink_gradient(sinks, lse, delta)


def _laid_out(*tensors: Tensor) -> list[Tensor]:
    """The tensors with unit stride along their last dimension."""
    return [dense_rows(x) for x in tensors]


def _for_triton(q: Tensor, v: Tensor) -> bool:
    return q.dtype in KERNEL_DTYPES and max(q.shape[2], v.shape[2]) <= 256


@tree_attention_fwd.backend("triton")  # kernels/tree_attention.py
def _(q, k, v, *rest):
    if not _for_triton(q, v):
        return NotImplemented
    from flashpo.kernels.tree_attention import forward

    return forward(q, k, v, *rest)


@tree_attention_bwd.backend("triton")  # kernels/tree_attention_backward.py
def _(q, k, v, *rest):
    if not _for_triton(q, v):
        return NotImplemented
    from flashpo.kernels.tree_attention_backward import backward

    return backward(q, k, v, *rest)


class TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        out, lse = tree_attention_fwd(*args)
        *tensors, ctx.scale, ctx.window, ctx.softcap = args
        ctx.save_for_backward(*tensors, out, lse)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *tensors, out, lse = ctx.saved_tensors
        grads = tree_attention_bwd(*tensors, ctx.scale, ctx.window, ctx.softcap, out, lse, d_out)
        dq, dk, dv, d_sinks = grads
        return dq, dk, dv, None if tensors[3] is None else d_sinks, None, None, None, None, None
