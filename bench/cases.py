"""The suites of `flashpo bench`. Each yields the titles of its tables and the functions that measure them."""

import importlib
from collections.abc import Iterator
from functools import partial

from flashpo.bench.timing import Device, KernelTable, Tables, compare

KERNELS = {  # where the tables of an operator are: a function of device and quick
    "linear_logprob": "scoring.linear_logprob_tables",
    "linear_divergence": "divergence.tables",
    "selective_log_softmax": "scoring.selective_log_softmax_tables",
    "gae": "gae.tables",
    "group_advantages": "advantages.tables",
    "tree_attention": "tree.tables",
    "tree_recurrence": "recurrence.tables",
    "policy_loss": "losses.policy_loss_tables",
    "sample": "sampling.tables",
    "decode_attention": "decoding.tables",
    "packed_linear": "packed_linear.tables",
}
WHOLES = {  # suites that run many operators: functions of device, with_peers and quick; some of these modules need TRL
    "rollout": "rollout.tables",
    "rollout_long": "rollout.long_tables",
    "mismatch": "mismatch.tables",
    "packing": "packing.tables",
    "growth": "growth.tables",
    "decode_step": "decode_step.tables",
    "grpo_step": "grpo_step.tables",
    "distillation_step": "distillation_step.tables",
    "reward_step": "reward_step.tables",
    "images": "images.tables",
    "overhead": "scoring.overhead_tables",
}


SUITES = KERNELS | WHOLES


def load(place: str):
    module, function = place.split(".")
    return getattr(importlib.import_module(f"flashpo.bench.{module}"), function)


def kernel_tables(device: Device, quick: bool = False) -> Iterator[KernelTable]:
    for place in KERNELS.values():
        yield from load(place)(device, quick)


def run(device: Device, only: str | None, with_peers: bool, quick: bool) -> Tables:
    for name in SUITES if only is None else (only,):
        if name in WHOLES:
            yield from load(WHOLES[name])(device, with_peers, quick)
        else:
            for table in load(KERNELS[name])(device, quick):
                yield table.title, partial(table.measure, partial(compare, device), with_peers)
