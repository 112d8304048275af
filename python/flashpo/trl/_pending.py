"""What one method of a trainer that samples keeps for a later method, all in one object."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from flashpo.ops.policy_stats import PolicyStats


def _of_modes() -> dict[str, list]:
    return {"train": [], "eval": []}


@dataclass
class Pending:
    """The object in `trainer._pending`. `verify` gives each of its runs a copy and restores the original afterwards."""

    # one entry for each micro-batch; the entries stay on the device until they are logged
    stats: dict[str, list[PolicyStats]] = field(default_factory=_of_modes)
    mismatch: dict[str, list[Tensor]] = field(default_factory=_of_modes)
    sums: dict[str, list[Tensor]] = field(default_factory=_of_modes)  # of distillation; of PPO, in addition to `stats`

    turns: list[bool] = field(default_factory=list)  # for each turn of the last generation: did the engine generate it
    old: Tensor | None = None  # log-probs of the rollout, which the next scoring of completions returns
    sampled: list[list[float]] = field(default_factory=list)  # log-probs of RLOO's last rollout, which TRL drops
    values: list[Any] = field(default_factory=list)  # of PPO's critic, for each scoring; None if it had no critic
    noisy: bool | None = None  # whether the last training forward drew random numbers; None: there was none yet
