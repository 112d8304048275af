"""PPO's clipped value loss: moving a value further than `clip` from its old value does not lower the loss.

c = clip(v, v_old - clip, v_old + clip)      loss = 1/2 sum_t m_t max((v_t - R_t)^2, (c_t - R_t)^2) / num_items
d loss / d v_t = m_t (v_t - R_t) / num_items, or 0 where only the clipped error counts
"""

import torch
from torch import Tensor

from flashpo.ops._check import check_device, check_float, check_mask, check_positive, check_tensor
from flashpo.ops._first_order import first_order
from flashpo.ops._wide import wide_dtype


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None = 0.2,
    num_items: Tensor | float | None = None,
) -> Tensor:
    """Half the mean squared error to the returns over live tokens, with PPO's clipping.

    The clipping is that of verl and of TRL's former PPO; see the formula at the top of flashpo/ops/value_loss.py.

    Args:
        values: the critic's values, of any shape such as (B, T) or flat (N,). Only this argument is differentiated.
        old_values: the same shape: the critic's values when the tokens were generated. Not used if clip is None.
        returns: the same shape, as returned by `gae`.
        mask: the same shape, bool or integers 0 and 1. At masked tokens no tensor is ever read.
        clip: how far a value may move from its old value. None: no clipping.
        num_items: the denominator, instead of the number of live tokens in this call: that of the global batch. A
            number or a scalar tensor.

    Returns:
        A scalar, fp32 (fp64 for fp64). Without live tokens it is 0 and stays in the graph.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices disagree, or clip or num_items is not positive.
    """
    check_float("values", values)
    for name, x in (("old_values", old_values), ("returns", returns)):
        check_float(name, x)
        check_device(name, x, "values", values)
        if x.shape != values.shape:
            raise ValueError(f"{name} must have values' shape {tuple(values.shape)}, got {tuple(x.shape)}")
    mask = check_mask("mask", mask, "values", values)
    if clip is not None:
        check_positive("clip", clip)
    if num_items is None:
        num_items = mask.sum().clamp(min=1)
    elif isinstance(num_items, Tensor):
        check_tensor("num_items", num_items)
        if num_items.numel() != 1:
            raise ValueError(f"num_items must be a number or a scalar tensor, got {tuple(num_items.shape)}")
        check_device("num_items", num_items, "values", values)
    else:
        check_positive("num_items", num_items)
    return ValueLoss.apply(values, old_values.detach(), returns.detach(), mask, clip, num_items)


class ValueLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, old_values, returns, mask, clip, num_items):
        dtype = wide_dtype(values.dtype)
        error = torch.where(mask, values.to(dtype) - returns, 0.0)
        square, gradient = error.square(), error
        if clip is not None:
            clipped = torch.where(mask, old_values + (values.to(dtype) - old_values).clamp(-clip, clip) - returns, 0.0)
            outside = torch.where(mask, (values.to(dtype) - old_values).abs() > clip, False)
            stopped = outside & (clipped.abs() > error.abs())
            square = torch.where(stopped, clipped.square(), square)
            gradient = error.masked_fill(stopped, 0.0)
        ctx.save_for_backward(gradient / num_items)
        ctx.dtype, ctx.inputs = values.dtype, (values,)
        return (0.5 * square.sum() / num_items).to(dtype).reshape(())

    @staticmethod
    @first_order
    def backward(ctx, d_loss):
        (gradient,) = ctx.saved_tensors
        return (gradient * d_loss).to(ctx.dtype), None, None, None, None, None
