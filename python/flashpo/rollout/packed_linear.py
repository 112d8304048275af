"""Linear layers whose weight is laid out once for the CPU's GEMM library, in place of at every call.

At 32 rows this is 1.4 to 2 times quicker than `F.linear` (which packs the weight each time), with the same bits.
"""

from collections.abc import Callable

import torch
from torch import Tensor

ROWS = 64  # hint for the layout; a weight packed for 1 row is slow, or differs in the last bit, for many


def packed_linear(weight: Tensor, bias: Tensor | None, like: Tensor) -> Callable[[Tensor], Tensor] | None:
    """`x -> x W^T + b` from a packed copy of `weight` (out, in), or None where the library has none for it.

    `like`: a tensor of the weight's shape that lives as long as the result; MKL's operator asks for its sizes alone.
    Not differentiable.
    """
    if weight.device.type != "cpu" or weight.numel() == 0:
        return None
    if weight.dtype == torch.float32 and torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear"):
        mkl_linear, features = torch.ops.mkl._mkl_linear.default, weight.shape[1]
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, ROWS)
        return lambda x: mkl_linear(x, packed, like, bias, x.numel() // features)
    if weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available():
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return None
        linear = torch.ops.mkldnn._linear_pointwise.default
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        return lambda x: linear(x, packed, bias, "none", [], "")
    return None
