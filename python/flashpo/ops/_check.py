"""Argument checks shared by the ops: each error names the argument, what was wanted and what came."""

import reprlib
import sys
from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of what kernels take
FLOATS = (*KERNEL_DTYPES, torch.float64)  # the references, too
LARGEST = sys.float_info.max


def check_tensor(name: str, x: Tensor) -> None:
    """Every tensor argument passes here: a kernel can read it by its strides, so it is neither sparse nor nested."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{name} must be an ordinary dense tensor, got a {'nested' if x.is_nested else x.layout} one")


def check_float(name: str, x: Tensor) -> None:
    check_tensor(name, x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")


def check_lengths(name: str, x: Tensor) -> None:
    """Numbers of tokens, of an integer or a float dtype."""
    check_tensor(name, x)
    if x.dtype == torch.bool or x.is_complex():
        raise TypeError(f"{name} must be of an integer or a float dtype, got {x.dtype}")


def check_dtype(name: str, x: Tensor, *dtypes: torch.dtype) -> None:
    check_tensor(name, x)
    if x.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {wanted}, got {x.dtype}")


def check_index(name: str, x: Tensor, index_name: str, index: Tensor) -> None:
    """`x` (..., K) with K >= 1, and `index` (...) int64 beside it."""
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
    """`x` has the shape of `other` and is on its device."""
    if x.shape != other.shape:
        raise ValueError(f"{name} must have the shape of {other_name}, {tuple(other.shape)}, got {tuple(x.shape)}")
    check_device(name, x, other_name, other)


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


def check_disjoint(name: str, x: Tensor) -> None:
    """No two elements of `x`, which is written over, lie in the same memory, as those of an expanded tensor do."""
    if x.is_contiguous() or x.numel() == 0:
        return
    reach = 0  # the last element that the dimensions of smaller strides lead to
    for stride, size in sorted(zip(x.stride(), x.shape)):
        if size > 1:
            if stride <= reach:
                raise ValueError(
                    f"{name} is written over, but elements of it share memory or may: shape {tuple(x.shape)}, "
                    f"strides {x.stride()}; pass a copy, such as {name}.contiguous()"
                )
            reach += stride * (size - 1)


def check_number(name: str, value: float) -> None:
    """Every number passes here: a finite one of Python, and no bool."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not -LARGEST <= value <= LARGEST:  # also for integers that no float can hold
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
    """An int of at least `low` that operators can take, so of 64 bits, and no bool."""
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
    """The mask as bool; it is bool or holds 0 and 1, and has the shape of `other`."""
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
    """(S + 1,) int64 that begins with 0, never falls and ends with the length of the flat tensors."""
    check_dtype("cu_seqlens", cu_seqlens, torch.int64)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens must be (S + 1,), got {tuple(cu_seqlens.shape)}")
    check_device("cu_seqlens", cu_seqlens, "the flat tensors", flat)
    fine = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == flat.shape[0]) & (cu_seqlens.diff() >= 0).all()
    check_that(fine, "cu_seqlens must rise from 0 to the number of tokens")
