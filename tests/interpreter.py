"""Repairs of Triton 3.7's interpreter, so that it computes as a GPU does: for conftest.py."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

_cast, _dot, _sum = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot, ReduceOps.sum


def cast_impl(self, x, dtype):
    """It truncates to bfloat16."""
    if (x.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
        return _cast(self, x, dtype)
    return TensorHandle(torch.tensor(x.data).bfloat16().view(torch.uint16).numpy(), tl.bfloat16)


def create_dot(self, a, b, *rest):
    """It multiplies bit patterns of bfloat16."""
    if a.dtype.scalar == tl.bfloat16:
        a, b = _cast(self, a, tl.float32), _cast(self, b, tl.float32)
    return _dot(self, a, b, *rest)


def sum(self, input):
    """It adds up one after another whatever is not contiguous."""
    if self.axis is None:
        return _sum(self, input)
    x = np.ascontiguousarray(np.moveaxis(input.handle.data, self.axis, -1)).sum(-1)
    return self.to_tensor(np.expand_dims(x, self.axis) if self.keep_dims else x, input.dtype)


InterpreterBuilder.cast_impl = cast_impl
ReduceOps.sum = sum
InterpreterBuilder.create_dot = create_dot
