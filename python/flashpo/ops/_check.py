"""Argument checks shared by the ops: each error names the argument, what was wanted and what came."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_float(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")


def check_index(name: str, x: Tensor, index_name: str, index: Tensor) -> None:
    """`x` (..., K) with K >= 1, and `index` (...) int64 beside it."""
    check_float(name, x)
    if not isinstance(index, Tensor):
        raise TypeError(f"{index_name} must be a torch.Tensor, got {type(index).__name__}")
    if index.dtype != torch.int64:
        raise TypeError(f"{index_name} must be int64, got {index.dtype}")
    if x.dim() < 1 or index.shape != x.shape[:-1]:
        raise ValueError(
            f"{index_name} must have the shape of {name} without its last dimension, "
            f"{tuple(x.shape[:-1])}, got {tuple(index.shape)}"
        )
    if x.shape[-1] == 0:
        raise ValueError(f"{name} has an empty last dimension: {tuple(x.shape)}")
    check_device(index_name, index, name, x)


def check_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device}, {other_name} on {other.device}")


def check_range(name: str, index: Tensor, vocab: int, ignore_index: int) -> None:
    """Every index in [0, vocab) or ignore_index."""
    fine = (((index >= 0) & (index < vocab)) | (index == ignore_index)).all()
    check_that(fine, f"{name} holds values outside [0, {vocab}) that are not ignore_index ({ignore_index})")


def check_that(fine: Tensor, message: str) -> None:
    """A condition on values. On a GPU and in a compiled graph an assertion that nothing waits for."""
    if fine.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(fine, message)
    elif not fine:
        raise ValueError(message)


def check_positive(name: str, value: float) -> None:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
