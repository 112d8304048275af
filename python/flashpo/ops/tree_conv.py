"""Causal convolution of each feature over a token tree, where the window of a token consists of its ancestors.

out_t = bias + sum_j weight[:, K - 1 - j] x_a(t, j)      a(t, j): the j-th token before t; x is 0 where there is none
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashpo._op import native, op
from flashpo.ops._check import KERNEL_DTYPES, check_device, check_float
from flashpo.ops._first_order import first_order
from flashpo.ops._layout import dense_rows
from flashpo.ops._lineage import Lineage, check_lineage
from flashpo.ops._wide import wide_dtype


def tree_conv(x: Tensor, weight: Tensor, bias: Tensor | None, lineage: Lineage) -> Tensor:
    """The short causal convolution of hybrid models over the N tokens of a tree; differentiable in x, weight and bias.

    Args:
        x: (N, C).
        weight: (C, K). The last column belongs to the newest token, as in a depthwise torch.nn.Conv1d.
        bias: (C,), or None.
        lineage: which token follows which.

    Returns:
        (N, C) in the dtype of x. Sums are in fp32 or wider.

    Raises:
        TypeError, ValueError: the message names the argument.
    """
    check_float("x", x)
    check_float("weight", weight)
    if x.dim() != 2:
        raise ValueError(f"x must be (tokens, features), got {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[0] != x.shape[1] or weight.shape[1] == 0:
        raise ValueError(f"weight must be ({x.shape[1]}, width) for the features of x, got {tuple(weight.shape)}")
    check_device("weight", weight, "x", x)
    if bias is not None:
        check_float("bias", bias)
        if bias.shape != x.shape[1:]:
            raise ValueError(f"bias must be one number for each feature of x, ({x.shape[1]},), got {tuple(bias.shape)}")
        check_device("bias", bias, "x", x)
    check_lineage(lineage, "x", x)
    args = x, weight, bias, lineage.ancestors(weight.shape[1] - 1)
    if torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in args[:3]):
        return TreeConv.apply(*args)
    return tree_conv_fwd(*args)


@op
def tree_conv_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, ancestors: Tensor) -> Tensor:
    """ancestors is (K - 1, N) int64, with N where there is none."""
    dtype = wide_dtype(x.dtype)
    *older, newest = weight.to(dtype).unbind(1)
    out = x * newest if bias is None else x * newest + bias
    padded = F.pad(x, (0, 0, 0, 1))
    for w, ancestor in zip(reversed(older), ancestors):
        out = out + padded[ancestor] * w
    return out.to(x.dtype).contiguous()


@tree_conv_fwd.fake
def _(x, weight, bias, ancestors):
    return x.new_empty(x.shape)


@op
def tree_conv_bwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, ancestors: Tensor, d_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, d_weight, d_bias), contiguous, each in its argument's dtype; d_bias is empty if there is no bias."""
    dtype = wide_dtype(x.dtype)
    *older, newest = weight.to(dtype).unbind(1)
    d_out, padded = d_out.to(dtype), F.pad(x, (0, 0, 0, 1)).to(dtype)
    dx, d_weight = F.pad(d_out * newest, (0, 0, 0, 1)), [(d_out * padded[:-1]).sum(0)]
    for w, ancestor in zip(reversed(older), ancestors):
        dx.index_add_(0, ancestor, d_out * w)
        d_weight.append((d_out * padded[ancestor]).sum(0))
    d_bias = x.new_empty(0) if bias is None else d_out.sum(0).to(bias.dtype)
    return dx[:-1].to(x.dtype).contiguous(), torch.stack(d_weight[::-1], 1).to(weight.dtype), d_bias


@tree_conv_bwd.fake
def _(x, weight, bias, ancestors, d_out):
    inputs = (x, weight, x.new_empty(0) if bias is None else bias)
    return tuple(torch.empty_like(y, memory_format=torch.contiguous_format) for y in inputs)


@tree_conv_fwd.backend("native")  # csrc/cpu/tree_conv.cpp
def _(x, weight, bias, ancestors):
    if not _for_native(x, weight):
        return NotImplemented
    out = x.new_empty(x.shape)
    offset = None if bias is None else bias.float().contiguous()
    native.tree_conv_fwd(dense_rows(x), _by_age(weight), offset, ancestors, out, torch.get_num_threads())
    return out


@tree_conv_bwd.backend("native")  # csrc/cpu/tree_conv.cpp
def _(x, weight, bias, ancestors, d_out):
    if not _for_native(x, weight):
        return NotImplemented
    by_age = _by_age(weight)
    dx, d_bias = (x.new_empty(shape, dtype=torch.float32) for shape in (x.shape, x.shape[1:]))
    d_weight, d_out = torch.empty_like(by_age), d_out.to(x.dtype).contiguous()
    native.tree_conv_bwd(dense_rows(x), by_age, ancestors, d_out, dx, d_weight, d_bias, torch.get_num_threads())
    d_weight = d_weight.flip(0).T.to(weight.dtype).contiguous()
    return dx.to(x.dtype), d_weight, x.new_empty(0) if bias is None else d_bias.to(bias.dtype)


def _for_native(x: Tensor, weight: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in KERNEL_DTYPES and weight.shape[1] <= 8


def _by_age(weight: Tensor) -> Tensor:
    """The weight as (K, C) in fp32, with the newest token's row first."""
    return weight.float().T.flip(0).contiguous()


class TreeConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.save_for_backward(*args)
        return tree_conv_fwd(*args)

    @staticmethod
    @first_order
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, ancestors = ctx.saved_tensors
        dx, d_weight, d_bias = tree_conv_bwd(x, weight, bias, ancestors, d_out)
        return dx, d_weight, None if bias is None else d_bias, None
