"""Exact quantiles of the live tokens' values over all ranks, by counting instead of sorting or gathering tokens."""

import torch
import torch.distributed as dist
from torch import Tensor

from flashpo.ops._check import check_beside, check_float, check_group, check_share, check_tensor

HALF = 1 << 16


def masked_quantile(
    x: Tensor, mask: Tensor, quantiles: float | tuple[float, ...], *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The quantiles of x where `mask` is not 0, interpolated as in `torch.quantile`.

    The upper and then the lower 16 bits of the float32 numbers are counted, since these bits sort as the numbers do.
    This works for any number of tokens (torch.quantile fails above 2^24) and never waits for the device. With `group`
    it communicates 1 + 2 Q histograms of 65,536 counts.

    Args:
        x: any shape, float, without NaN at live tokens.
        mask: the same shape; not 0 at live tokens.
        quantiles: Q >= 1 numbers in [0, 1].
        group: a process group over whose ranks the quantiles are taken.

    Returns:
        (Q,) float32; NaN if there is no live token.

    Raises:
        TypeError, ValueError: the message names the argument.
    """
    check_float("x", x)
    _check(x, "x", mask, group)
    wanted = tuple(quantiles) if isinstance(quantiles, (tuple, list)) else (quantiles,)
    if not wanted:
        raise ValueError("quantiles must have at least one number, got none")
    for q in wanted:
        check_share("quantiles", q)
    return _quantiles(x, mask, wanted, group)


def _check(x: Tensor, name: str, mask: Tensor, group: dist.ProcessGroup | None) -> None:
    check_tensor("mask", mask)
    check_beside("mask", mask, name, x)
    check_group("group", group)


def _quantiles(x: Tensor, mask: Tensor, wanted: tuple[float, ...], group: dist.ProcessGroup | None) -> Tensor:
    live = (mask != 0).flatten().to(torch.int64)
    bits = (x.detach().flatten().float() + 0.0).view(torch.int32).to(torch.int64)  # + 0.0 turns -0 into 0
    keys = torch.where(bits < 0, -1 - (bits & 0x7FFFFFFF), bits) + (1 << 31)  # 0 ... 2^32 - 1, sorted like the floats
    high, low = keys // HALF, keys % HALF

    def histogram(bins: Tensor, counted: Tensor) -> Tensor:
        counts = counted.new_zeros(HALF).scatter_add_(0, bins, counted)
        if group is not None:
            dist.all_reduce(counts, group=group)
        return counts

    def position(counts: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
        """The bin that holds the rank-th number, and the number's rank within that bin."""
        ends = counts.cumsum(0)
        found = torch.searchsorted(ends, rank, right=True).clamp(max=HALF - 1)
        return found, rank - (ends[found] - counts[found])

    upper = histogram(high, live)
    total = upper.sum()

    def value(rank: Tensor) -> Tensor:
        of_high, within = position(upper, rank[None])
        of_low, _ = position(histogram(low, live * (high == of_high)), within)
        key = of_high * HALF + of_low - (1 << 31)
        return torch.where(key < 0, (-1 - key) | -(1 << 31), key).to(torch.int32).view(torch.float32)

    found = []
    for q in wanted:
        where = q * (total - 1).clamp(min=0).double()
        found.append(torch.lerp(value(where.floor().long()), value(where.ceil().long()), (where % 1).float()))
    return torch.where(total > 0, torch.cat(found), torch.nan)


def entropy_threshold(
    entropy: Tensor, mask: Tensor, quantile: float, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The quantile (1,) of the live tokens' entropy, above which the share 1 - `quantile` of them is.

    Without live tokens it is inf. The arguments and errors are as in `masked_quantile`.
    """
    check_float("entropy", entropy)
    _check(entropy, "entropy", mask, group)
    check_share("quantile", quantile)
    return _quantiles(entropy, mask, (quantile,), group).nan_to_num(nan=torch.inf)


def ratio_quantiles(
    logprob: Tensor,
    old_logprob: Tensor,
    mask: Tensor,
    quantiles: float | tuple[float, ...] = (0.01, 0.1, 0.5, 0.9, 0.99),
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Quantiles (Q,) of the tokens' ratios exp(logprob - old_logprob), of a policy to the old one or to the sampler.

    They are exact, interpolated between log-ratios. `PolicyStats.ratio_quantile` approximates them from counts that
    `policy_loss` makes anyway. logprob, old_logprob and mask have one shape; the other arguments and errors are as in
    `masked_quantile`.
    """
    for name, x in (("logprob", logprob), ("old_logprob", old_logprob)):
        check_float(name, x)
        check_beside(name, x, "logprob", logprob)
    _check(logprob, "logprob", mask, group)
    return masked_quantile(logprob - old_logprob, mask, quantiles, group=group).exp()
