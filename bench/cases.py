"""The suites of `flashpo bench`: each yields (title, records) of its tables."""

from collections.abc import Callable

from flashpo.bench import (
    advantages,
    decoding,
    gae,
    growth,
    losses,
    packed_linear,
    packing,
    sampling,
    scoring,
    tree,
)
from flashpo.bench.timing import Device, Tables


def rollout_tables(device: Device, with_peers: bool, quick: bool) -> Tables:
    from flashpo.bench import rollout  # needs transformers

    return rollout.tables(device, with_peers, quick)


def rollout_long_tables(device: Device, with_peers: bool, quick: bool) -> Tables:
    from flashpo.bench import rollout

    return rollout.tables(device, with_peers, quick, long=True)


def decode_step_tables(device: Device, with_peers: bool, quick: bool) -> Tables:
    from flashpo.bench import decode_step

    return decode_step.tables(device, with_peers, quick)


def mismatch_tables(device: Device, with_peers: bool, quick: bool) -> Tables:
    from flashpo.bench import mismatch

    return mismatch.tables(device, with_peers, quick)


def grpo_step_tables(device: Device, with_peers: bool, quick: bool) -> Tables:
    from flashpo.bench import grpo_step  # needs TRL

    return grpo_step.tables(device, with_peers, quick)


SUITES: dict[str, Callable[[Device, bool, bool], Tables]] = {  # of device, with_peers, quick
    "linear_logprob": scoring.linear_logprob_tables,
    "selective_log_softmax": scoring.selective_log_softmax_tables,
    "gae": gae.tables,
    "group_advantages": advantages.tables,
    "tree_attention": tree.tables,
    "policy_loss": losses.policy_loss_tables,
    "rollout": rollout_tables,
    "rollout_long": rollout_long_tables,
    "mismatch": mismatch_tables,
    "packing": packing.tables,
    "growth": growth.tables,
    "sample": sampling.tables,
    "decode_attention": decoding.tables,
    "decode_step": decode_step_tables,
    "packed_linear": packed_linear.tables,
    "grpo_step": grpo_step_tables,
    "overhead": scoring.overhead_tables,
}


def run(device: Device, only: str | None, with_peers: bool, quick: bool) -> Tables:
    for name, suite in SUITES.items():
        if only in (None, name):
            yield from suite(device, with_peers, quick)
