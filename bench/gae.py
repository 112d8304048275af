"""gae against a time loop in torch, and against a copy of its inputs."""

from collections.abc import Iterator
from functools import partial

import torch

from flashpo import gae
from flashpo.bench.timing import Clock, Device, KernelTable

SHAPES = {"cpu": [(64, 1024), (64, 16384)], "cuda": [(64, 16384), (1024, 16384)]}  # (B, T)
COPY, WHITENED, LOOP = "copy of rewards and values", "FlashPO, whitened", "torch loop over T"
VARIANTS, PEERS = (COPY, "FlashPO", WHITENED), (LOOP,)


def loop(rewards, values, mask, gamma, lam):
    """A time loop, each step over all B sequences, as in verl and OpenRLHF; by verl's rule for masked tokens."""
    advantage, value = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    reverse = []
    for t in reversed(range(rewards.shape[1])):
        live = mask[:, t]
        delta = rewards[:, t] + gamma * value - values[:, t]
        advantage = torch.where(live, delta + gamma * lam * advantage, advantage)
        value = torch.where(live, values[:, t], value)
        reverse.append(advantage)
    advantages = torch.stack(reverse[::-1], dim=1)
    return advantages * mask, (advantages + values) * mask


def records(device: Device, shape: tuple[int, int], clock: Clock, with_peers: bool) -> Iterator[dict]:
    rewards, values = torch.randn(2, *shape, device=device.name)
    mask = torch.rand(shape, device=device.name) < 0.9
    inputs = rewards, values, mask
    exact = loop(rewards.double(), values.double(), mask, 1.0, 0.95)
    functions = {
        "FlashPO": lambda: gae(*inputs, gamma=1.0, lam=0.95),
        LOOP: lambda: loop(*inputs, 1.0, 0.95),
    }
    errors = {name: max((x - y).abs().max().item() for x, y in zip(f(), exact)) for name, f in functions.items()}
    if errors["FlashPO"] > 2 * errors[LOOP] + 1e-5:
        raise AssertionError(f"gae is off by {errors['FlashPO']}")
    out = torch.empty_like(rewards), torch.empty_like(rewards)
    functions |= {
        COPY: lambda: (out[0].copy_(rewards), out[1].copy_(values)),
        WHITENED: lambda: gae(*inputs, gamma=1.0, lam=0.95, whiten=True),
    }
    names = VARIANTS + PEERS if with_peers else VARIANTS
    seconds = clock({name: functions[name] for name in names})
    moved = rewards.numel() * (4 * 4 + 1)  # bytes of rewards, values and mask, and of advantages and returns
    for name, time in seconds.items():
        record = {"variant": name, "ms": time * 1e3, "times_flashpo": time / seconds["FlashPO"]}
        if name == "FlashPO":
            record["gb_per_s"] = moved / time / 1e9
        yield record | ({"max_error": errors[name]} if name in errors else {})


def tables(device: Device, quick: bool) -> Iterator[KernelTable]:
    for shape in SHAPES[device.name][: 1 if quick else None]:
        yield KernelTable(f"gae B={shape[0]} T={shape[1]}", VARIANTS, PEERS, partial(records, device, shape))
