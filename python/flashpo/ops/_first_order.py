"""Gradients that are written out have no derivative of their own: whoever asks for one gets an error, not zeros."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def first_order(backward: Callable) -> Callable:
    """`backward` of an autograd.Function, whose results raise when a second backward pass reaches them.

    They do so under `create_graph=True`, on whichever way to an input: the saved ones, and those in `ctx.inputs` of a
    function that does not save its inputs. `once_differentiable` sees the incoming gradients alone, and these are
    constants where the loss is what is differentiated. torch.compile has an error of its own.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *grads)
        inputs = [x for x in (*ctx.saved_tensors, *getattr(ctx, "inputs", ()), *grads) if x is not None]
        inputs = [x for x in inputs if x.requires_grad]
        with torch.no_grad():
            results = backward(ctx, *grads)
        results = results if isinstance(results, tuple) else (results,)
        found = iter(_Last.apply(type(ctx).__name__, len(inputs), *inputs, *(x for x in results if x is not None)))
        return tuple(None if x is None else next(found) for x in results)

    return run


class _Last(torch.autograd.Function):
    """Gradients as they are, after the inputs that they depend on; there is no way back through them."""

    @staticmethod
    def forward(ctx: Any, of: str, inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.of = of.removesuffix("Backward").removesuffix("Function")
        return tuple(x.detach() for x in tensors[inputs:])

    @staticmethod
    def backward(ctx: Any, *_: Any):
        raise NotImplementedError(f"flashpo: {ctx.of} has no second derivative: its gradient cannot be differentiated")
