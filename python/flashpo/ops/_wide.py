"""The precision in which everything is computed: float32, or the argument's dtype if that is wider."""

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    return x.to(wide_dtype(x.dtype))
