"""Repairs of Triton 3.7's interpreter for conftest.py: it then computes as a GPU does, and in less time."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

_cast, _dot, _sum = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot, ReduceOps.sum
_patch_lang = interpreter._patch_lang
_patched: set[int] = set()  # modules for which a launch has done so


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


def patch_lang(fn):
    """It puts its own functions in the place of the language's at a launch, and again at every call within: for a third
    of the time. Once a module and launch will do."""
    if id(fn.__globals__) in _patched:
        return None  # a call within a launch: nobody asks for the scope
    scope = _patch_lang(fn)
    _patched.add(id(fn.__globals__))
    restore = scope.restore

    def restore_all():
        _patched.clear()
        restore()

    scope.restore = restore_all
    return scope


interpreter._patch_lang = patch_lang
InterpreterBuilder.cast_impl = cast_impl
ReduceOps.sum = sum
InterpreterBuilder.create_dot = create_dot
