"""Hand-written gradients cannot be differentiated again: a second derivative raises an error instead of being zero."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def first_order(backward: Callable) -> Callable:
    """Wrap the `backward` of an autograd.Function so that a second backward pass through its results raises.

    Under `create_graph=True` the results are connected to every input on which they depend: the saved tensors, the
    incoming gradients, and `ctx.inputs` of a function that does not save its inputs. torch's `once_differentiable`
    connects them to the incoming gradients only. These are constants when the loss itself is differentiated, and then
    it would not raise. torch.compile raises an error of its own.
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
    """Passes the gradients through and makes them depend on the inputs; its own backward raises."""

    @staticmethod
    def forward(ctx: Any, of: str, inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.of = of.removesuffix("Backward").removesuffix("Function")
        return tuple(x.detach() for x in tensors[inputs:])

    @staticmethod
    def backward(ctx: Any, *_: Any):
        raise NotImplementedError(f"flashpo: {ctx.of} has no second derivative: its gradient cannot be differentiated")
