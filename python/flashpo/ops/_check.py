"""Argument checks shared by the operators: each error names the argument, what was wanted and what came."""

import reprlib
import sys
from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the dtypes that kernels take
FLOATS = (*KERNEL_DTYPES, torch.float64)  # the dtypes that the references take
LARGEST = sys.float_info.max


def check_tensor(name: str, x: Tensor) -> None:
    """Check that `x` is a dense tensor, which a kernel can read by its strides. Every tensor argument passes here."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{name} must be an ordinary dense tensor, got a {'nested' if x.is_nested else x.layout} one")


def check_float(name: str, x: Tensor) -> None:
    check_tensor(name, x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")


def check_lengths(name: str, x: Tensor) -> None:
    """Check a tensor of numbers of tokens, whose dtype may be an integer or a float one."""
    check_tensor(name, x)
    if x.dtype == torch.bool or x.is_complex():
        raise TypeError(f"{name} must be of an integer or a float dtype, got {x.dtype}")


def check_dtype(name: str, x: Tensor, *dtypes: torch.dtype) -> None:
    check_tensor(name, x)
    if x.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {wanted}, got {x.dtype}")


def check_index(name: str, x: Tensor, index_name: str, index: Tensor) -> None:
    """Check `x` (..., K) with K >= 1 together with its `index` (...) int64."""
    check_float(name, x)
    check_dtype(index_name, index, torch.int64)
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


def check_beside(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Check that `x` has the shape and the device of `other`."""
    if x.shape != other.shape:
        raise ValueError(f"{name} must have the shape of {other_name}, {tuple(other.shape)}, got {tuple(x.shape)}")
    check_device(name, x, other_name, other)


def check_range(name: str, index: Tensor, vocab: int, ignore_index: int) -> None:
    """Check that every index is in [0, vocab) or equals ignore_index."""
    fine = (((index >= 0) & (index < vocab)) | (index == ignore_index)).all()
    check_that(fine, f"{name} holds values outside [0, {vocab}) that are not ignore_index ({ignore_index})")


def check_that(fine: Tensor, message: str) -> None:
    """Raise `message` unless `fine` holds. On a GPU and in a compiled graph, assert it without waiting for the
    result."""
    if fine.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(fine, message)
    elif not fine:
        raise ValueError(message)


def check_disjoint(name: str, x: Tensor) -> None:
    """Check that no two elements of `x` share memory, as in an expanded tensor: the operator writes over `x`."""
    if x.is_contiguous() or x.numel() == 0:
        return
    reach = 0  # the largest offset that the dimensions with smaller strides reach
    for stride, size in sorted(zip(x.stride(), x.shape)):
        if size > 1:
            if stride <= reach:
                raise ValueError(
                    f"{name} is written over, but elements of it share memory or may: shape {tuple(x.shape)}, "
                    f"strides {x.stride()}; pass a copy, such as {name}.contiguous()"
                )
            reach += stride * (size - 1)


def check_number(name: str, value: float) -> None:
    """Check that `value` is a finite Python number and not a bool. Every number passes here."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not -LARGEST <= value <= LARGEST:  # this also catches integers that no float can hold
        raise ValueError(f"{name} must be finite, got {value}")


def check_positive(name: str, value: float) -> None:
    if isinstance(value, (int, float)) and not 0 < value <= LARGEST:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    check_number(name, value)


def check_share(name: str, value: float) -> None:
    if isinstance(value, (int, float)) and not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    check_number(name, value)


def check_int(name: str, value: int, low: int = -(2**63)) -> None:
    """Check that `value` is an int of at least `low` that fits into an operator's 64 bits, and not a bool."""
    wanted = "an integer" if low == -(2**63) else f"an integer of at least {low}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be {wanted}, got {reprlib.repr(value)}")
    if not low <= value < 2**63:
        raise ValueError(f"{name} must be {wanted} and fit into 64 bits, got {value}")


def check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def check_choice(name: str, value: str, choices: Collection[str], hint: str = "") -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}{hint}")


def check_names(name: str, names: tuple[str, ...], known: tuple[str, ...]) -> None:
    if not isinstance(names, (tuple, list)):
        raise TypeError(f"{name} must be a tuple of names, got {names!r}")
    unknown = [x for x in names if x not in known]
    if unknown:
        raise ValueError(f"{name}: unknown name {unknown[0]!r}; known are {known}")


def check_group(name: str, group: dist.ProcessGroup | None) -> None:
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{name} must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")


def check_mask(name: str, mask: Tensor, other_name: str, other: Tensor) -> Tensor:
    """Return the mask as bool. It must be bool or hold only 0 and 1, and have the shape of `other`."""
    check_tensor(name, mask)
    check_beside(name, mask, other_name, other)
    if mask.dtype == torch.bool:
        return mask
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"{name} must be bool or integers 0 and 1, got {mask.dtype}")
    live = mask == 1
    check_that((live | (mask == 0)).all(), f"{name} holds values that are neither 0 nor 1")
    return live


def check_cu_seqlens(cu_seqlens: Tensor, flat: Tensor) -> None:
    """Check that cu_seqlens is (S + 1,) int64, begins with 0, never falls and ends with the flat tensors' length."""
    check_dtype("cu_seqlens", cu_seqlens, torch.int64)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens must be (S + 1,), got {tuple(cu_seqlens.shape)}")
    check_device("cu_seqlens", cu_seqlens, "the flat tensors", flat)
    fine = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == flat.shape[0]) & (cu_seqlens.diff() >= 0).all()
    check_that(fine, "cu_seqlens must rise from 0 to the number of tokens")
