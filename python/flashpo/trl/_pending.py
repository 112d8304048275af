"""What trainers that sample keep from one of their methods for a later one, in one place."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from flashpo.ops.policy_stats import PolicyStats


def _of_modes() -> dict[str, list]:
    return {"train": [], "eval": []}


@dataclass
class Pending:
    """`trainer._pending`. `verify` lets each of its runs have a copy and puts the trainer's own back."""

    # on the device until they are logged; a micro-batch each
    stats: dict[str, list[PolicyStats]] = field(default_factory=_of_modes)
    mismatch: dict[str, list[Tensor]] = field(default_factory=_of_modes)
    sums: dict[str, list[Tensor]] = field(default_factory=_of_modes)  # PPO's, beside `stats`, and those of distillation

    turns: list[bool] = field(default_factory=list)  # of the last batch of generations: whether the engine answered
    old: Tensor | None = None  # log-probs of the rollout that stand for the next scoring of completions
    sampled: list[list[float]] = field(default_factory=list)  # RLOO's last rollout, whose log-probs TRL drops
    values: list[Any] = field(default_factory=list)  # PPO's, of each scoring; None: the model has no critic
    noisy: bool | None = None  # whether the last training forward drew random numbers, None before it
