"""Batches of rewards with groups of different sizes, and their advantages computed by a plain loop over groups."""

import torch

EPS = {"trl": 1e-4, "verl": 1e-6, "openrlhf": 1e-9}


def batch(rows: int, groups: int, functions: int = 1, nan: float = 0.0):
    """(rewards (B, K), group (B), lengths (B)): keys over all of int64, shuffled; some groups with one row."""
    keys = torch.randint(-(2**63), 2**63 - 1, (groups,))
    group = keys[torch.cat([torch.arange(groups), torch.randint(max(groups // 2, 1), (max(rows - groups, 0),))])]
    group = group[torch.randperm(len(group))][:rows]
    rewards = torch.randn(rows, functions) + 0.7
    return rewards.masked_fill(torch.rand_like(rewards) < nan, torch.nan), group, torch.randint(1, 90, (rows,))


def combine(rewards, weights=None):
    weights = torch.ones(rewards.shape[1]) if weights is None else torch.tensor(weights)
    total = (rewards * weights.to(rewards.dtype)).nansum(1)
    return total.masked_fill(rewards.isnan().all(1), torch.nan)


def members(group):
    """The rows of each group."""
    rows: dict[int, list[int]] = {}
    for i, key in enumerate(group.tolist()):
        rows.setdefault(key, []).append(i)
    return rows.values()


def spread(x, weight):
    """Standard deviation, ddof 1; 0 of one value, NaN of none."""
    total = weight.sum()
    if total <= 1:
        return x.new_tensor(0.0 if len(x) else torch.nan)
    return ((weight * (x - (weight * x).sum() / total) ** 2).sum() / (total - 1)).sqrt()


def plain(rewards, group, *, baseline="mean", scale="group", reward_weights=None, convention="trl", lengths=None):
    """(advantage, mean, std, degenerate), in the dtype of rewards."""
    x = combine(rewards, reward_weights)
    weight = torch.ones_like(x) if lengths is None else lengths.to(x.dtype)
    advantage, mean, std = torch.zeros_like(x), torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    degenerate = torch.ones(len(x), dtype=torch.bool)
    live = ~x.isnan()
    of_batch = spread(x[live], weight[live])
    for rows in members(group):
        some = [i for i in rows if live[i]]
        r, w = x[some], weight[some]
        n = len(some)
        degenerate[rows] = len(r.unique()) <= 1
        if n == 0:
            mean[rows] = 0.0 if baseline == "none" else torch.nan
            continue
        sigma = spread(r, w)
        centre = (w * r).sum() / w.sum()
        others = centre.expand(n)
        if baseline == "leave_one_out" and n > 1:
            others = (r.sum() - r) / (n - 1)
        elif baseline == "second_best":
            second = r.sort().values[-2] if n > 1 else r[0]
            centre, others = second, r.where(r < second, second)
        elif baseline == "none":
            centre, others = torch.zeros_like(centre), torch.zeros_like(r)
        if n == 1 and convention == "verl" and baseline != "second_best":
            centre, others, sigma = torch.zeros_like(centre), torch.zeros_like(r), torch.ones_like(sigma)
        mean[rows], mean[some] = centre, others
        std[rows] = sigma
        divisor = of_batch if scale == "batch" else sigma
        advantage[some] = r - others if scale == "none" else (r - others) / (divisor + EPS[convention]) * (divisor > 0)
    return advantage, mean, of_batch.expand_as(x) if scale == "batch" else std, degenerate
