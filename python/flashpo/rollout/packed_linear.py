"""Linear layers of a decode step, which has few rows, from a copy of the weight in a faster layout.

At 32 rows this is up to twice as fast as `F.linear`, which packs the weight at each call.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from flashpo.ops.packed_linear import ROWS, pack_linear, packed_linear_fwd, packed_shape, packs

Linear = Callable[[Tensor], Tensor]
Empty = Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor]  # allocates, as `torch.empty` does


class PackedLinear:
    """`x -> x W^T + b` from a packed copy of W. More than ROWS rows, as in a prefill, go through `plain`.

    It is not differentiable.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, plain: Linear, empty: Empty):
        out = empty(packed_shape(weight), weight.dtype, weight.device)
        self.packed, self.bias, self.plain = pack_linear(weight, out=out), bias, plain
        self.columns, self.depth = weight.shape

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() > ROWS * self.depth:
            return self.plain(x)
        rows = x if x.dim() == 2 else x.reshape(-1, self.depth)
        return packed_linear_fwd(rows, self.packed, self.bias, self.columns).view(*x.shape[:-1], self.columns)


def packed_linear(weight: Tensor, bias: Tensor | None, plain: Linear, empty: Empty) -> Linear | None:
    """A PackedLinear, or the product of oneDNN from a weight in its layout; None where neither has a kernel."""
    if packs(weight):
        return PackedLinear(weight, bias, plain, empty)
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or weight.numel() == 0:
        return None
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    linear, limit = torch.ops.mkldnn._linear_pointwise.default, ROWS * weight.shape[1]
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    return lambda x: linear(x, packed, bias, "none", [], "") if x.numel() <= limit else plain(x)
