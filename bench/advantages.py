"""Benchmark of group_advantages against TRL's torch expression and verl's loop over groups."""

import importlib.util
from collections import defaultdict
from collections.abc import Iterator
from functools import partial

import torch

import flashpo
from flashpo import group_advantages
from flashpo.bench.timing import Clock, Device, KernelTable

# (number of groups, their size)
SHAPES = {"512 groups of 64": (512, 64), "65536 rewards in 4096 ragged groups": (4096, None)}
REFERENCE, VERL = "FlashPO's reference in torch", "verl's loop"


def trls_name(size: int | None) -> str:
    return "TRL, groups of 16" if size is None else "TRL"


def ours(rewards, group):
    return group_advantages(rewards, group)[0]


def reference(rewards, group):
    with flashpo.backend("torch"):
        return group_advantages(rewards, group)[0]


def trl(rewards, generations):
    """GRPOTrainer's lines for scale_rewards="group": groups have one size and consecutive rows."""
    from trl.trainer.utils import nanstd

    rewards = (rewards[:, None] * torch.ones(1, device=rewards.device)).nansum(dim=1)
    grouped = rewards.view(-1, generations)
    mean = torch.nanmean(grouped, dim=1).repeat_interleave(generations, dim=0)
    std = nanstd(grouped, dim=1).repeat_interleave(generations, dim=0)
    return torch.nan_to_num((rewards - mean) / (std + 1e-4), nan=0.0)


def verl(rewards, group):
    """verl's compute_grpo_outcome_advantage: a dictionary of lists of scalar tensors."""
    scores, keys = rewards.clone(), group.tolist()  # in verl the keys are an array on the host
    members, mean, std = defaultdict(list), {}, {}
    for i, key in enumerate(keys):
        members[key].append(scores[i])
    for key, values in members.items():
        stacked = torch.stack(values)
        alone = len(values) == 1
        mean[key] = torch.tensor(0.0) if alone else stacked.mean()
        std[key] = torch.tensor(1.0) if alone else stacked.std()
    for i, key in enumerate(keys):
        scores[i] = (scores[i] - mean[key]) / (std[key] + 1e-6)
    return scores


def table(device: Device, groups: int, size: int | None, clock: Clock, with_peers: bool) -> Iterator[dict]:
    if size is None:
        group = torch.cat([torch.arange(groups), torch.randint(groups, (65536 - groups,))])
        group = group[torch.randperm(65536)].to(device.name)
    else:
        group = torch.arange(groups, device=device.name).repeat_interleave(size)
    rewards = torch.rand(len(group), device=device.name)
    variants = {
        "FlashPO": lambda: ours(rewards, group),
        REFERENCE: lambda: reference(rewards, group),
    }
    exact = ours(rewards.double(), group)
    error = (ours(rewards, group) - exact).abs().max().item()
    if error > 1e-5:
        raise AssertionError(f"group_advantages is off by {error}")
    if with_peers and importlib.util.find_spec("trl"):
        # TRL has no ragged groups: it gets as many rewards in as many groups of one size
        variants[trls_name(size)] = lambda: trl(rewards, size or 16)
    seconds = clock(variants)
    if with_peers:  # not in turns with the others: it takes a second and would leave cold caches for the next variant
        seconds |= clock({VERL: lambda: verl(rewards, group)})
    for name in seconds:
        yield {"variant": name, "ms": seconds[name] * 1e3, "times_flashpo": seconds[name] / seconds["FlashPO"]}


def tables(device: Device, quick: bool) -> Iterator[KernelTable]:
    for title, (groups, size) in list(SHAPES.items())[: 1 if quick else None]:
        peers = (trls_name(size), VERL)
        measure = partial(table, device, groups, size)
        yield KernelTable(f"group_advantages {title}", ("FlashPO", REFERENCE), peers, measure)
