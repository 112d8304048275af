"""x W^T + b for the few rows of a decode step, with W packed once so that each weight is read once and prefetched.

Libraries either pack W at every call or have kernels that wait for memory. There is no gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flashpo._op import native, op, why_unavailable
from flashpo.ops._check import check_device, check_float

ROWS = 192  # up to so many rows this kernel is faster than a library's product


def packs(weight: Tensor) -> bool:
    """Whether this machine has a kernel that computes with `pack_linear(weight)`. Without one, packing does not pay."""
    if weight.device.type != "cpu" or weight.numel() == 0 or why_unavailable("native", "cpu"):
        return False
    return packs_dtype(weight.dtype) and (weight.dtype == torch.float32 or weight.shape[1] % 32 == 0)


def packs_dtype(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 or (dtype == torch.bfloat16 and native.isa in ("avx512bf16", "amx"))


def pack_linear(weight: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Copy the weight (N, K) of a linear layer into the layout that `packed_linear` takes.

    N is filled up with zeros to whole panels. float32 (and other dtypes in the reference): panels of 48 columns of the
    result, (N / 48, K, 48). bfloat16: AMX's tile format, (N / 32, K / 32, 2, 16, 16, 2), where a tile has 16 pairs
    of k and 16 columns; K must be a multiple of 32.

    Args:
        weight: (N, K), N and K at least 1.
        out: where to write the result: contiguous, in the weight's dtype, of shape `packed_shape(weight)`.

    Returns:
        The packed weight.

    Raises:
        TypeError, ValueError: the message names the argument.
    """
    shape = packed_shape(weight)
    if out is None:
        out = weight.new_empty(shape)
    elif out.shape != shape or out.dtype != weight.dtype or not out.is_contiguous():
        raise ValueError(f"out must be a dense {weight.dtype} {shape}, got {out.dtype} {tuple(out.shape)}")
    check_device("out", out, "weight", weight)
    pack_linear_(weight.detach(), out)
    return out


def packed_shape(weight: Tensor) -> tuple[int, ...]:
    check_float("weight", weight)
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"weight must be (N, K) with N, K >= 1, got {tuple(weight.shape)}")
    columns, depth = weight.shape
    if weight.dtype != torch.bfloat16:
        return (columns + 47) // 48, depth, 48
    if depth % 32:
        raise ValueError(f"weight must have a multiple of 32 columns in bfloat16, got {depth}")
    return (columns + 31) // 32, depth // 32, 2, 16, 16, 2


@op(mutates=("out",))
def pack_linear_(weight: Tensor, out: Tensor) -> None:
    width = 32 if weight.dtype == torch.bfloat16 else 48
    weight = F.pad(weight, (0, 0, 0, -weight.shape[0] % width))
    if weight.dtype == torch.bfloat16:
        panels = weight.view(-1, 2, 16, weight.shape[1] // 32, 16, 2).permute(0, 3, 1, 4, 2, 5)
    else:
        panels = weight.unflatten(0, (-1, 48)).transpose(1, 2)
    out.copy_(panels)


@pack_linear_.fake
def _(weight, out):
    return None


@pack_linear_.backend("native")  # csrc/cpu/packed_linear.cpp
def _(weight, out):
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return NotImplemented
    native.pack_linear(weight.contiguous(), out, torch.get_num_threads())
    return None


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None, *, columns: int) -> Tensor:
    """x W^T + b, with sums in float32. The result of a row depends, bitwise, on this row only.

    Args:
        x: (M, K). Rows may be strided.
        packed: `pack_linear(W)`, in x's dtype.
        bias: (N,) in x's dtype, or None.
        columns: N.

    Returns:
        (M, N) in x's dtype.

    Raises:
        TypeError, ValueError: the message names the argument.
    """
    check_float("x", x)
    depth = depth_of(packed)
    if x.dim() != 2 or x.shape[1] != depth:
        raise ValueError(f"x must be (M, {depth}) as packed has it, got {tuple(x.shape)}")
    width = packed.numel() // (packed.shape[0] * depth)
    if not 0 <= packed.shape[0] * width - columns < width:
        raise ValueError(f"columns must fill the {packed.shape[0]} panels of {width} that packed has, got {columns}")
    for name, other in (("packed", packed), ("bias", bias)):
        if other is not None:
            if other.dtype != x.dtype:
                raise TypeError(f"{name} must be {x.dtype} as x is, got {other.dtype}")
            check_device(name, other, "x", x)
    if bias is not None and bias.shape != (columns,):
        raise ValueError(f"bias must be ({columns},), got {tuple(bias.shape)}")
    return packed_linear_fwd(x, packed, bias, columns)


def depth_of(packed: Tensor) -> int:
    return packed.shape[1] * (32 if packed.dtype == torch.bfloat16 else 1)


@op
def packed_linear_fwd(x: Tensor, packed: Tensor, bias: Tensor | None, columns: int) -> Tensor:
    if packed.dtype == torch.bfloat16:
        packed = packed.permute(0, 1, 3, 5, 2, 4)  # (panels, depth / 32, 16, 2, 2, 16)
    weight = packed.reshape(packed.shape[0], x.shape[1], -1)
    return F.linear(x, weight.transpose(1, 2).flatten(0, 1)[:columns], bias)


@packed_linear_fwd.fake
def _(x, packed, bias, columns):
    return x.new_empty(x.shape[0], columns)


@packed_linear_fwd.backend("native")  # csrc/cpu/packed_linear.cpp
def _(x, packed, bias, columns):
    if x.device.type != "cpu" or not packs_dtype(x.dtype):
        return NotImplemented
    out = x.new_empty(x.shape[0], columns)
    x = x if x.stride(1) == 1 else x.contiguous()
    bias = bias if bias is None else bias.contiguous()
    native.packed_linear(x, packed.contiguous(), bias, out, torch.get_num_threads())
    return out
