"""Argument checks shared by the ops: each error names the argument, what was wanted and what came."""

import math

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of what kernels take
FLOATS = (*KERNEL_DTYPES, torch.float64)  # the references, too


def check_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")


def check_float(name: str, x: Tensor) -> None:
    check_tensor(name, x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")


def check_index(name: str, x: Tensor, index_name: str, index: Tensor) -> None:
    """`x` (..., K) with K >= 1, and `index` (...) int64 beside it."""
    check_float(name, x)
    check_tensor(index_name, index)
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


def check_finite(name: str, value: float) -> None:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:  # torch.compile has no math.isfinite
        raise ValueError(f"{name} must be finite, got {value}")


def check_positive(name: str, value: float) -> None:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def check_share(name: str, value: float) -> None:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def check_mask(name: str, mask: Tensor, other_name: str, other: Tensor) -> Tensor:
    """The mask as bool; it is bool or holds 0 and 1, and has the shape of `other`."""
    check_tensor(name, mask)
    if mask.shape != other.shape:
        raise ValueError(f"{name} must have the shape of {other_name}, {tuple(other.shape)}, got {tuple(mask.shape)}")
    check_device(name, mask, other_name, other)
    if mask.dtype == torch.bool:
        return mask
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"{name} must be bool or integers 0 and 1, got {mask.dtype}")
    live = mask == 1
    check_that((live | (mask == 0)).all(), f"{name} holds values that are neither 0 nor 1")
    return live


def check_cu_seqlens(cu_seqlens: Tensor, flat: Tensor) -> None:
    """(S + 1,) int64 that begins with 0, never falls and ends with the length of the flat tensors."""
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype != torch.int64:
        raise TypeError(f"cu_seqlens must be int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens must be (S + 1,), got {tuple(cu_seqlens.shape)}")
    check_device("cu_seqlens", cu_seqlens, "the flat tensors", flat)
    fine = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == flat.shape[0]) & (cu_seqlens.diff() >= 0).all()
    check_that(fine, "cu_seqlens must rise from 0 to the number of tokens")
