"""The suites of `flashpo bench`: each yields the titles of its tables and what makes them."""

import importlib

from flashpo.bench.timing import Device, Tables

SUITES = {  # where the tables are, a function of device, with_peers, quick; imported when asked for: some need TRL
    "linear_logprob": "scoring.linear_logprob_tables",
    "linear_divergence": "divergence.tables",
    "selective_log_softmax": "scoring.selective_log_softmax_tables",
    "gae": "gae.tables",
    "group_advantages": "advantages.tables",
    "tree_attention": "tree.tables",
    "tree_recurrence": "recurrence.tables",
    "policy_loss": "losses.policy_loss_tables",
    "rollout": "rollout.tables",
    "rollout_long": "rollout.long_tables",
    "mismatch": "mismatch.tables",
    "packing": "packing.tables",
    "growth": "growth.tables",
    "sample": "sampling.tables",
    "decode_attention": "decoding.tables",
    "decode_step": "decode_step.tables",
    "packed_linear": "packed_linear.tables",
    "grpo_step": "grpo_step.tables",
    "distillation_step": "distillation_step.tables",
    "images": "images.tables",
    "overhead": "scoring.overhead_tables",
}


def run(device: Device, only: str | None, with_peers: bool, quick: bool) -> Tables:
    for name, place in SUITES.items():
        if only in (None, name):
            module, function = place.split(".")
            yield from getattr(importlib.import_module(f"flashpo.bench.{module}"), function)(device, with_peers, quick)
