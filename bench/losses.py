"""Benchmark of `policy_loss`, forward and backward on given log-probs, against TRL's chain of torch operations."""

import functools
from collections.abc import Callable, Iterator

import torch

from flashpo import policy_loss
from flashpo.bench.peers import trl_policy_loss
from flashpo.bench.timing import Clock, Device, KernelTable

SHAPES = {"cpu": (64, 4096), "cuda": (256, 8192)}  # (sequences, tokens)
KL = {"kl_coef": 0.04, "kl_ratio_correction": True}
SPECS = {  # title -> (name in LOSSES, its overrides, options of TRL's chain)
    "dapo": ("dapo", {}, {}),
    "grpo with k3 KL": ("grpo", {**KL, "clip_high": 0.28}, {"beta": 0.04}),
    "gspo": ("gspo", {}, {"level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4}),
    "cispo": ("cispo", {}, {"epsilon_high": 5.0}),
    "vespo": ("vespo", {}, {}),
}
COPY = "copy of as many bytes"
PEERS = ("TRL eager", "TRL eager, with its metrics", "TRL, torch.compile")


def make(device: Device, with_ref: bool) -> dict[str, torch.Tensor]:
    sequences, tokens = SHAPES[device.name]
    old = -torch.rand(sequences, tokens, device=device.name)
    length = torch.randint(tokens // 2, tokens + 1, (sequences, 1), device=device.name)
    mask = (torch.arange(tokens, device=device.name) < length).long()  # the dtype that TRL has
    inputs = {
        "logprob": old + 0.05 * torch.randn_like(old),
        "old_logprob": old,
        "advantage": torch.randn(sequences, device=device.name),
        "mask": mask,
    }
    return {**inputs, "ref_logprob": old + 0.05 * torch.randn_like(old)} if with_ref else inputs


def step(loss: Callable, inputs: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    logprob = inputs["logprob"].detach().requires_grad_()

    def run():
        return torch.autograd.grad(loss(**{**inputs, "logprob": logprob}), logprob)[0]

    return run


def table(device: Device, title: str, clock: Clock, with_peers: bool) -> list[dict]:
    name, overrides, options = SPECS[title]
    inputs = make(device, "kl_coef" in overrides)
    num_items = inputs["mask"].sum().float() if name in ("dapo", "cispo", "vespo") else None

    def ours(**inputs):
        return policy_loss(**inputs, loss=name, num_items=num_items, **overrides).loss

    trl = functools.partial(
        trl_policy_loss, loss_type=name if name != "gspo" else "grpo", num_items=num_items, **options
    )
    wide = {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}
    exact = step(trl, wide)()
    error = ((step(ours, inputs)() - exact).abs().max() / exact.abs().max()).item()
    if not error < 1e-5:
        raise AssertionError(f"the gradient of policy_loss {title} is off by {error} of its largest value")

    # The minimum that must move: every input once and the gradient once. A copy reads half of its bytes and writes
    # half.
    floor_bytes = sum(x.nbytes for x in inputs.values()) + inputs["logprob"].nbytes
    source = torch.empty(floor_bytes // 2, dtype=torch.uint8, device=device.name).zero_()
    target = torch.empty_like(source)
    variants = {COPY: lambda: target.copy_(source), "FlashPO": step(ours, inputs)}
    if with_peers:
        torch._dynamo.reset()
        of_trl = trl, functools.partial(trl, metrics=True), torch.compile(trl)
        variants |= {name: step(loss, inputs) for name, loss in zip(PEERS, of_trl)}
    seconds = clock(variants)
    return [
        {
            "variant": variant,
            "ms": seconds[variant] * 1e3,
            "times_flashpo": seconds[variant] / seconds["FlashPO"],
            "share_of_copy_bandwidth": seconds[COPY] / seconds[variant],
        }
        for variant in variants
    ]


def policy_loss_tables(device: Device, quick: bool) -> Iterator[KernelTable]:
    for title in list(SPECS)[: 1 if quick else None]:
        shape = "B={} T={}".format(*SHAPES[device.name])
        measure = functools.partial(table, device, title)
        yield KernelTable(f"policy_loss {title} {shape} forward and backward", (COPY, "FlashPO"), PEERS, measure)
