"""Causal convolution of each feature over a token tree: a token's window are its ancestors.

out_t = bias + sum_j weight[:, K - 1 - j] x_a(t, j)      a(t, j): the j-th token before t in its sequences, 0 where none
"""

import torch.nn.functional as F
from torch import Tensor

from flashpo.ops._lineage import Lineage
from flashpo.ops._wide import wide_dtype


def tree_conv(x: Tensor, weight: Tensor, bias: Tensor | None, lineage: Lineage) -> Tensor:
    """(N, C) in the dtype of x; differentiable in x, weight and bias.

    Args:
        x: (N, C).
        weight: (C, K), the newest token's last, as in a depthwise torch.nn.Conv1d; bias: (C,).
        lineage: of the N tokens.

    Sums are in fp32 or wider.
    """
    dtype = wide_dtype(x.dtype)
    *older, newest = weight.to(dtype).unbind(1)
    out = x * newest if bias is None else x * newest + bias
    padded = F.pad(x, (0, 0, 0, 1))
    for w, ancestor in zip(reversed(older), lineage.ancestors(len(older))):
        out = out + padded[ancestor] * w
    return out.to(x.dtype)
