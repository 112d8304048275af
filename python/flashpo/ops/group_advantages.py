"""Advantages within groups of completions: A = (R - baseline) / (std + eps). Groups are given by keys, and may be
ragged.

Every statistic is computed relative to a reward of the group itself, so equal rewards give exactly 0 and are detected.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from flashpo._op import native, op
from flashpo.ops._check import (
    check_choice,
    check_device,
    check_dtype,
    check_float,
    check_group,
    check_number,
    check_tensor,
    check_that,
)
from flashpo.ops._wide import wide

BASELINES = ("mean", "leave_one_out", "second_best", "none")
SCALES = ("group", "batch", "none")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
WHITENING_EPS = 1e-8  # verl's masked_whiten adds this to the variance
MAX_FUNCTIONS = 64  # as in csrc/group_advantages.h


class Convention(NamedTuple):
    eps: float  # added to the standard deviation, which has ddof 1 in all three
    raw_singletons: bool  # whether a group with one scorable reward has that reward as its advantage, instead of 0


CONVENTIONS = {
    "trl": Convention(1e-4, False),
    "verl": Convention(1e-6, True),
    "openrlhf": Convention(1e-9, False),  # OpenRLHF itself gives NaN for a group of one
}


class Advantages(NamedTuple):
    """The results of `group_advantages`: (B,) each, fp32 (fp64 for fp64 rewards)."""

    advantage: Tensor
    mean: Tensor  # the baseline that was subtracted from the row's reward
    std: Tensor  # of the row's group; of the batch with scale="batch" and with "normalize_then_sum"
    degenerate: Tensor  # bool: all rewards of the row's group are equal, so that nothing is learned from it


def group_advantages(
    rewards: Tensor,
    group: Tensor,
    *,
    baseline: str = "mean",
    scale: str = "group",
    reward_weights: Sequence[float] | Tensor | None = None,
    aggregation: str = "sum_then_normalize",
    convention: str = "trl",
    lengths: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Advantages:
    """Advantage of each completion relative to its group. The results are constants: no gradient flows.

        A = (R - baseline) / (std + eps),   R = sum_k reward_weights_k rewards_k

    | estimator | options |
    | --- | --- |
    | GRPO (2402.03300) | the defaults |
    | Dr. GRPO (2503.20783) | `scale="none"` |
    | RLOO (2402.14740) | `baseline="leave_one_out", scale="none"` |
    | GDPO (2601.05242) | `aggregation="normalize_then_sum"` |
    | OPO (2505.23585): baseline sum(len R) / sum(len) | `lengths=..., scale="none"` |
    | Pass@k (verl's): the best of a group gets its lead over the second best, the others 0 | `baseline="second_best"` |
    | REINFORCE++ (2501.03262) | one key for all rows, `group=torch.zeros_like(group)`; `lengths` to whiten by tokens |

    Args:
        rewards: (B,), or (B, K) for K reward functions, float. NaN means not scored: a function that did not score a
            row counts as 0 there. A row that no function scored enters no statistic, and its advantage is 0.
        group: (B,) int64: the key of each row's group. Any numbers in any order, for instance one for each (prompt,
            agent, turn).
        baseline: "mean": of the group. "leave_one_out": the mean of the group's other rows. "second_best": the second
            best reward of the group. "none": 0.
        scale: what the difference is divided by. "group": the standard deviation of the group. "batch": that of the
            batch. "none": nothing. Where the standard deviation is 0 the advantage is 0.
        reward_weights: K numbers on the host; all 1 by default.
        aggregation: "sum_then_normalize": the weighted sum of the functions is normalised. "normalize_then_sum": each
            function is normalised in its group by itself, and then their weighted sum over the batch; it needs
            baseline="mean" and scale="group".
        convention: whose eps and whose treatment of singletons: "trl" (eps 1e-4), "verl" (1e-6), "openrlhf" (1e-9);
            ddof is 1 in each. The advantage in a group with one scorable row is 0; in "verl" it is the row's reward. In
            the second step of "normalize_then_sum", "trl" weighs all rows equally and "verl" weighs them by `lengths`.
            Therefore the latter does not give 0 for equal rewards.
        lengths: (B,) int64, positive: the number of tokens of each row, by which it is weighted in mean, standard
            deviation and ddof.
        process_group: statistics are taken over the rows of all ranks of this group, so a group of completions may be
            spread over ranks. Each rank gets the results of its own rows. This needs one all-gather of the rows and one
            of their number, for which the host waits.

    Returns:
        Advantages. `mean` and `std` are NaN for a group without a scorable row.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or options are wrong; a reward is infinite, or a weighted sum of
            rewards becomes infinite in the result's dtype; a length is not positive. On CUDA the errors about values
            are asynchronous device assertions.
    """
    rewards, reward_weights = _check(rewards, group, lengths, reward_weights)
    check_choice("baseline", baseline, BASELINES)
    check_choice("scale", scale, SCALES)
    check_choice("aggregation", aggregation, AGGREGATIONS)
    check_choice("convention", convention, tuple(CONVENTIONS))
    check_group("process_group", process_group)
    _check_combination(baseline, scale, aggregation, convention, lengths)
    rows = slice(None)
    if process_group is not None:
        rewards, group, lengths, rows = _gather(rewards, group, lengths, process_group)
    results = group_advantages_fwd(rewards, group, lengths, reward_weights, baseline, scale, aggregation, convention)
    return Advantages(*results if process_group is None else (x[rows].clone() for x in results))


def _check(rewards, group, lengths, reward_weights) -> tuple[Tensor, list[float]]:
    """Check the tensors and weights; return `rewards` as (B, K) in fp32 or fp64, and the K weights."""
    check_float("rewards", rewards)
    if rewards.dim() not in (1, 2) or (rewards.dim() == 2 and rewards.shape[1] == 0):
        raise ValueError(f"rewards must be (B,) or (B, K) with K >= 1, got {tuple(rewards.shape)}")
    for name, x in (("group", group), ("lengths", lengths)):
        if x is None and name == "lengths":
            continue
        check_dtype(name, x, torch.int64)
        if x.shape != rewards.shape[:1]:
            raise ValueError(f"{name} must be ({rewards.shape[0]},) for as many rows of rewards, got {tuple(x.shape)}")
        check_device(name, x, "rewards", rewards)
    rewards = wide(rewards.detach())
    rewards = rewards[:, None] if rewards.dim() == 1 else rewards
    functions = rewards.shape[1]
    if reward_weights is None:
        return rewards, [1.0] * functions
    if isinstance(reward_weights, Tensor):
        check_tensor("reward_weights", reward_weights)
        if reward_weights.device.type != "cpu":
            raise ValueError(f"reward_weights must be on the host, got a tensor on {reward_weights.device}")
        reward_weights = reward_weights.tolist()
    if not isinstance(reward_weights, (tuple, list)):
        raise TypeError(f"reward_weights must be {functions} numbers, got {type(reward_weights).__name__}")
    if len(reward_weights) != functions:
        raise ValueError(f"reward_weights must be {functions} numbers, one for each function, got {reward_weights}")
    for weight in reward_weights:
        check_number("reward_weights", weight)
    return rewards, [float(weight) for weight in reward_weights]


def _check_combination(baseline, scale, aggregation, convention, lengths) -> None:
    if lengths is not None and baseline != "mean":
        raise ValueError(f"lengths weigh the rows of baseline 'mean', not of {baseline!r}")
    if aggregation == "sum_then_normalize":
        return
    if baseline != "mean" or scale != "group":
        raise ValueError(
            f"aggregation 'normalize_then_sum' needs baseline 'mean' and scale 'group', got {baseline!r}, {scale!r}"
        )
    if convention == "openrlhf":
        raise ValueError("aggregation 'normalize_then_sum' has no convention 'openrlhf'")
    if (convention == "verl") != (lengths is not None):
        raise ValueError("aggregation 'normalize_then_sum' weighs by lengths in convention 'verl', and only there")


def _gather(rewards, group, lengths, process_group) -> tuple[Tensor, Tensor, Tensor | None, slice]:
    """The rows of all ranks, and the slice of them that belongs to this rank."""
    ranks, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
    columns = [rewards.double().view(torch.int64), group[:, None]] + ([] if lengths is None else [lengths[:, None]])
    mine = torch.cat(columns, 1)
    shape = torch.tensor([*mine.shape, rewards.shape[1]], device=mine.device)
    shapes = shape.new_empty(ranks, len(shape))
    dist.all_gather_into_tensor(shapes.view(-1), shape, group=process_group)
    counts, widths, functions = shapes.t().tolist()
    if len(set(widths)) > 1 or len(set(functions)) > 1:
        raise ValueError(f"rewards must have one K on all ranks, got {functions}, and all or none of them lengths")
    padded = mine.new_zeros(max(counts), widths[0])
    padded[: len(mine)] = mine
    every = padded.new_empty(ranks, *padded.shape)
    dist.all_gather_into_tensor(every.view(-1, widths[0]), padded, group=process_group)
    rows = torch.cat([every[r, :n] for r, n in enumerate(counts)])
    first, k = sum(counts[:rank]), functions[0]
    return (
        rows[:, :k].contiguous().view(torch.float64).to(rewards.dtype),
        rows[:, k].contiguous(),
        None if lengths is None else rows[:, k + 1].contiguous(),
        slice(first, first + counts[rank]),
    )


@op
def group_advantages_fwd(
    rewards: Tensor,  # (B, K) fp32 or fp64
    group: Tensor,  # (B)
    lengths: Tensor | None,  # (B)
    reward_weights: list[float],  # K
    baseline: str,
    scale: str,
    aggregation: str,
    convention: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four results, (B,) each. Computed in float64, except that weighted sums are rounded to the rewards' dtype."""
    eps, raw_singletons = CONVENTIONS[convention]
    parts = rewards.double()
    total = sum((w * parts[:, k].nan_to_num(0.0) for k, w in enumerate(reward_weights)), parts.new_zeros(()))
    total = total.to(rewards.dtype).double()
    _check_values(parts, total, lengths)
    unscorable = parts.isnan().all(1)
    ids = _dense(group)
    if aggregation == "sum_then_normalize":
        x = total.masked_fill(unscorable, torch.nan)[:, None]
        stats = _statistics(x, ids, lengths, baseline, raw_singletons)
        above = _above(x, stats, baseline)
        std = _statistics(x, torch.zeros_like(ids), lengths).std if scale == "batch" else stats.std
        advantage = above if scale == "none" else _scaled(above, std, eps)
        mean = (x - above).where(~unscorable[:, None], stats.centre + stats.offset)
    else:
        stats = _statistics(parts, ids, None, baseline, raw_singletons)
        z = _scaled(_above(parts, stats, baseline), stats.std, eps)
        x = sum((w * z[:, k].nan_to_num(0.0) for k, w in enumerate(reward_weights)), z.new_zeros(()))
        x = x.masked_fill(unscorable, torch.nan)[:, None]
        over_rows = _statistics(x, torch.zeros_like(ids), lengths)
        std = over_rows.std
        if lengths is None:  # the mean of each column is 0 in every group, so the mean of the sums is 0
            mean = torch.zeros_like(x)
            advantage = _scaled(x, std, eps)
        else:
            mean = over_rows.centre + over_rows.offset
            advantage = _above(x, over_rows, "mean") / (std**2 + WHITENING_EPS).sqrt()
    advantage = advantage.masked_fill(unscorable[:, None], 0.0)
    advantage, mean, std = (r[:, 0].to(rewards.dtype) for r in (advantage, mean, std))
    return advantage, mean, std, stats.equal.all(1)


@group_advantages_fwd.fake
def _(rewards, *rest):
    rows = rewards.new_empty(rewards.shape[0])
    return rows, torch.empty_like(rows), torch.empty_like(rows), torch.empty_like(rows, dtype=torch.bool)


def _check_values(rewards: Tensor, total: Tensor, lengths: Tensor | None) -> None:
    infinite = rewards.isinf().any() | total.isinf().any()
    check_that(~infinite, "rewards must be finite, or NaN where there is none; so must their weighted sum")
    if lengths is not None:
        check_that((lengths > 0).all(), "lengths must be positive")


def _dense(group: Tensor) -> Tensor:
    """Number the groups of the rows from 0. `torch.unique` would make the host wait for a GPU."""
    keys, order = group.sort()
    return torch.empty_like(group).scatter_(0, order, (keys.diff(prepend=keys[:1]) != 0).cumsum(0))


class _Statistics(NamedTuple):
    """Statistics of the group of each row for each column, (B, C) each."""

    scorable: Tensor  # number of scorable rows
    centre: Tensor  # a reward of the group; baseline = centre + offset (for "leave_one_out": the group's mean)
    offset: Tensor
    std: Tensor
    equal: Tensor


def _statistics(x, ids, lengths, baseline="mean", raw_singletons=False) -> _Statistics:
    index = ids[:, None].expand_as(x)

    def over_group(reduce: str, values: Tensor, neutral: float) -> Tensor:
        values = values.where(x.isfinite(), neutral)
        return torch.full_like(values, neutral).scatter_reduce(0, index, values, reduce).gather(0, index)

    weight = torch.ones_like(x) if lengths is None else lengths[:, None].to(x.dtype).expand_as(x)
    total, count = over_group("sum", weight, 0.0), over_group("sum", torch.ones_like(x), 0.0)
    low, high = over_group("amin", x, torch.inf), over_group("amax", x, -torch.inf)
    offset = over_group("sum", weight * (x - low), 0.0) / total.clamp(min=1.0)
    variance = over_group("sum", weight * (x - low - offset) ** 2, 0.0) / (total - 1)
    std = variance.where(total > 1, 0.0).sqrt()
    equal = low >= high
    centre = low.masked_fill(count == 0, torch.nan)
    if baseline == "second_best":
        below = over_group("amax", x.where(x < high, -torch.inf), -torch.inf)
        tied = over_group("sum", (x == high).to(x.dtype), 0.0) > 1
        centre, offset = high.where(tied | (count == 1), below), torch.zeros_like(offset)
        centre = centre.masked_fill(count == 0, torch.nan)
    elif baseline == "none":
        centre, offset = torch.zeros_like(low), torch.zeros_like(offset)
    if raw_singletons and baseline != "second_best":
        alone = count == 1
        centre, std = centre.masked_fill(alone, 0.0), std.masked_fill(alone, 1.0)
    return _Statistics(count, centre, offset, std.masked_fill(count == 0, torch.nan), equal)


def _above(x: Tensor, stats: _Statistics, baseline: str) -> Tensor:
    above = x - stats.centre - stats.offset
    if baseline == "second_best":
        return above.clamp(min=0.0)
    if baseline == "leave_one_out":
        return above * (stats.scorable / (stats.scorable - 1)).where(stats.scorable > 1, 1.0)
    return above


def _scaled(above: Tensor, std: Tensor, eps: float) -> Tensor:
    return (above / (std + eps)).where(std > 0, 0.0)


@group_advantages_fwd.backend("native")  # csrc/group_advantages.h
def _(rewards, group, lengths, reward_weights, baseline, scale, aggregation, convention):
    if rewards.dtype != torch.float32 or len(reward_weights) > MAX_FUNCTIONS:
        return NotImplemented
    rows, functions = rewards.shape
    normalize_first = aggregation == "normalize_then_sum"
    advantage, mean, std = (rewards.new_empty(rows) for _ in range(3))
    degenerate = rewards.new_empty(rows, dtype=torch.bool)
    words = native.group_advantages_scratch(rows, functions if normalize_first else 1)
    scratch = rewards.new_empty(words, dtype=torch.int64)
    with torch.cuda.device_of(rewards):
        native.group_advantages(
            rewards.contiguous(),
            group.contiguous(),
            None if lengths is None else lengths.contiguous(),
            reward_weights,
            BASELINES.index(baseline),
            SCALES.index(scale),
            normalize_first,
            *CONVENTIONS[convention],
            *(advantage, mean, std, degenerate, scratch),
            torch.cuda.current_stream().cuda_stream if rewards.is_cuda else 0,
        )
    return advantage, mean, std, degenerate
