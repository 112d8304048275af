"""A quantile of the live tokens' entropies, over all ranks, by counting: exact, without sorting or gathering tokens."""

import torch
import torch.distributed as dist
from torch import Tensor

HALF = 1 << 16


def entropy_threshold(
    entropy: Tensor, mask: Tensor, quantile: float, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The `quantile` of the entropies where `mask`, as `torch.quantile` interpolates it, as a tensor (1,).

    Two passes of counting: the upper and the lower 16 bits of the float32 numbers, which order as they do. Works for
    any number of tokens (torch.quantile fails above 2^24), communicates three histograms of 65,536 counts where `group`
    is given, and never waits for the device. Without a live token: inf, that is no token is above it.

    Args:
        entropy: any shape, float. mask: the same shape, bool or 0/1. quantile: in [0, 1].
    """
    if entropy.shape != mask.shape:
        raise ValueError(f"mask must have entropy's shape {tuple(entropy.shape)}, got {tuple(mask.shape)}")
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile must be in [0, 1], got {quantile}")
    live = (mask != 0).flatten().to(torch.int64)
    bits = (entropy.detach().flatten().float() + 0.0).view(torch.int32).to(torch.int64)  # + 0: no -0
    keys = torch.where(bits < 0, -1 - (bits & 0x7FFFFFFF), bits) + (1 << 31)  # 0 ... 2^32 - 1, in the floats' order
    high, low = keys // HALF, keys % HALF

    def histogram(bins: Tensor, counted: Tensor) -> Tensor:
        counts = counted.new_zeros(HALF).scatter_add_(0, bins, counted)
        if group is not None:
            dist.all_reduce(counts, group=group)
        return counts

    def position(counts: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
        """The bin with the rank-th number, and that number's rank in it."""
        ends = counts.cumsum(0)
        found = torch.searchsorted(ends, rank, right=True).clamp(max=HALF - 1)
        return found, rank - (ends[found] - counts[found])

    upper = histogram(high, live)
    total = upper.sum()
    where = quantile * (total - 1).clamp(min=0).double()
    values = []
    for rank in (where.floor().long(), where.ceil().long()):
        of_high, within = position(upper, rank[None])
        of_low, _ = position(histogram(low, live * (high == of_high)), within)
        key = of_high * HALF + of_low - (1 << 31)
        bits = torch.where(key < 0, (-1 - key) | -(1 << 31), key)
        values.append(bits.to(torch.int32).view(torch.float32))
    below, above = values
    threshold = torch.lerp(below, above, (where - where.floor()).float())
    return torch.where(total > 0, threshold, torch.inf)
