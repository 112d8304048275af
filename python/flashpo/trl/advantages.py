"""Batches of generations with FlashPO's advantages, for GRPO and RLOO.

TRL's `_generate_and_score_completions` generates, scores and rewards completions and computes advantages. We replace
these advantages by ours, which are exactly 0 in groups of equal rewards, follow the groups of `group_by`, and can be
overridden by a subclass. The two are compared until a batch with an advantage other than 0 has shown that they agree.
If they differ by more than rounding, TRL computes advantages in a way that FlashPO does not know, and TRL's are used.
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashpo._hosts.peft import adapter_states
from flashpo._hosts.trl import ADVANTAGES, version
from flashpo.ops.group_advantages import group_advantages
from flashpo.trl import options
from flashpo.trl._fallback import Fallback
from flashpo.trl._phases import REWARDS
from flashpo.trl.accelerated import in_place_of_trls, overridden
from flashpo.trl.dynamic_sampling import replace_degenerate
from flashpo.trl.patch import active
from flashpo.trl.reward_models import RewardModels
from flashpo.trl.sampling import Sampling

if TYPE_CHECKING:
    from trl.trainer.grpo_trainer import GRPOTrainer as Base  # for the attributes that it shares with RLOOTrainer
else:
    Base = object

ULPS = 8  # rewards are changed by so many units in the last place to measure how rounding moves an advantage


class GroupComparing(Sampling, Base):
    """The part of a policy trainer that computes advantages; to be combined with a TRL class."""

    _options: options.Known  # of the TRL class
    args: Any  # GRPOConfig or RLOOConfig, TRL's or ours
    model: Any
    _logs: dict[str, Any]
    _restates_advantages = True  # whether `compute_advantages` should give the same as TRL's code
    _agrees: bool | None = None  # whether it does; None: no batch has shown it yet
    _states_of_policy: tuple | None = None  # states of the adapters while a batch is generated and scored, else None

    @functools.cached_property
    def _keep_trls(self) -> Fallback:
        return Fallback("FlashPO leaves {reason}.")

    @functools.cached_property
    def _reward_models(self) -> RewardModels:
        return RewardModels(self)

    def compute_advantages(self, rewards: Tensor, group: Tensor, inputs: list[dict], batch: dict) -> Tensor:
        """Compute the advantages of a generated batch. Override it to give credit in another way.

        Args:
            rewards: (rows of all ranks, reward functions) fp32, NaN where a function returned None.
            group: (rows of all ranks,) int64; rows with the same key are compared with each other.
            inputs: this rank's rows of the dataset, with the fields that a rollout function added.
            batch: this rank's tensors (completion_mask, old_per_token_logps ...).

        Returns:
            One advantage for each row, (rows of all ranks,), or one for each token of this rank's rows,
            (this rank's rows, completion length).
        """
        raise NotImplementedError

    def _calculate_rewards(self, *args, **kwargs):
        with self._phases.of(REWARDS):
            return super()._calculate_rewards(*args, **kwargs)

    @in_place_of_trls(ADVANTAGES)
    def _generate_and_score_completions(self, inputs):
        if not active():
            return super()._generate_and_score_completions(inputs)
        if self._mode != "train" or not getattr(self.args, "dynamic_sampling", None):
            return self._generate_batch(inputs)[0]

        def generate(rows: list[dict]) -> tuple[dict, Tensor]:
            batch, rewards, group = self._generate_batch(rows)
            weighted = group_advantages(rewards, group, reward_weights=self.reward_weights.tolist())
            return batch, weighted.degenerate

        return replace_degenerate(self, *generate(inputs), generate)

    def _generate_batch(self, inputs: list[dict]) -> tuple[dict, Tensor, Tensor]:
        """TRL's batch with our advantages; and the rewards and group keys of the rows of all ranks."""
        rewards: list[Tensor] = []
        scored: dict[str, Tensor] = {}
        self._rollouts.forget_turns()
        self._pending.old = None
        self._reward_models.share_prompts()
        self._states_of_policy = adapter_states(self.model)

        def keep_scored(result: tuple, model: Any, *others: Any, **options: Any) -> None:
            scored["reference" if self._is_reference(model) else "policy"] = result[0]

        try:
            with (
                _seen(self, "_calculate_rewards", lambda result, *args, **kwargs: rewards.append(result)),
                _seen(self, "_get_per_token_logps_and_entropies", keep_scored),
            ):
                batch = super()._generate_and_score_completions(inputs)
        finally:
            self._states_of_policy = None
        self._complete(batch, scored)
        group = self._group_keys(inputs)
        if self._keeps_trls_advantages():
            return batch, rewards[0], group
        advantages = self._compared(rewards[0], group, inputs, batch)
        if advantages is None:
            return batch, rewards[0], group
        if advantages.dim() == 1:
            self._log_advantages(advantages.tolist())  # TRL's may differ from ours in groups of equal rewards
            advantages = self._of_this_rank(advantages, len(inputs))
        batch["advantages"] = advantages
        return batch, rewards[0], group

    def _complete(self, batch: dict, scored: dict[str, Tensor]) -> None:
        """Add what our loss or advantages need to TRL's batch.

        scored: the log-probs that were computed for the batch, under "policy" and "reference".
        """

    def _is_reference(self, model: Any) -> bool:
        """Whether a call scores with the reference: a separate model, or the policy's with other adapters active."""
        if model is getattr(self, "ref_model", None):
            return True
        return self._states_of_policy is not None and adapter_states(self.model) != self._states_of_policy

    def _of_this_rank(self, rows: Tensor, count: int) -> Tensor:
        begin = self.accelerator.process_index * count
        return rows[begin : begin + count]

    def _keeps_trls_advantages(self) -> bool:
        """Whether an option asks for advantages that `compute_advantages` does not know; if so, warns."""
        reason = options.why_trls_advantages(self, self._options)
        if not reason or overridden(self, "compute_advantages"):
            return False
        if getattr(self.args, "group_by", None):
            raise ValueError(f"group_by={self.args.group_by} needs FlashPO's advantages, but {reason}")
        self._keep_trls(f"the advantages to TRL: {reason}")
        return True

    def _compared(self, rewards: Tensor, group: Tensor, inputs: list[dict], batch: dict) -> Tensor | None:
        """What `compute_advantages` returns; None, after a warning, if TRL's differ from it by more than rounding."""
        own = overridden(self, "compute_advantages") or getattr(self.args, "group_by", None)
        if own or not self._restates_advantages or self._agrees:
            return self.compute_advantages(rewards, group, inputs, batch)
        if self._agrees is None:
            changed = rewards.clone()
            changed[::2] *= 1 + ULPS * torch.finfo(rewards.dtype).eps
            moved = self.compute_advantages(changed, group, inputs, batch)
            found = self.compute_advantages(rewards, group, inputs, batch)
            of_rank, rounding = (self._of_this_rank(x, len(inputs)) for x in (found, (found - moved).abs()))
            error = (of_rank - batch["advantages"]).abs() - 1e-3 * of_rank.abs() - 4 * rounding
            if self.accelerator.reduce((error > 1e-6).any().float()) == 0:  # on all ranks
                self._agrees = True if (found != 0).any() else None
                return found
            self._agrees = False
        self._keep_trls(f"the advantages to TRL: those of TRL {version()} are not what FlashPO computes")
        return None

    def _log_advantages(self, of_rows: list[float]) -> None:
        """Replace the advantages that TRL has just logged to its table of completions, for the rows of all ranks."""
        logged = self._logs["advantages"]
        for _ in range(min(len(of_rows), len(logged))):
            logged.pop()
        logged.extend(of_rows)

    def _group_keys(self, inputs: list[dict]) -> Tensor:
        """Group keys of the rows of all ranks. The completions of a prompt are a group, which `group_by` splits further
        by columns of the dataset or fields of the rollout."""
        generations = self.num_generations if self._mode == "train" else self.num_generations_eval
        first = self.accelerator.process_index * len(inputs)
        columns = getattr(self.args, "group_by", None) or ()
        if missing := [c for c in columns if c not in inputs[0]]:
            raise ValueError(f"group_by: neither dataset nor rollout has the columns {missing}")
        keys = [
            _stable_key((first + i) // generations, *(row[column] for column in columns))
            for i, row in enumerate(inputs)
        ]
        return self.accelerator.gather(torch.tensor(keys, device=self.accelerator.device))


def _stable_key(*parts) -> int:
    """An int64 that is the same on every rank."""
    if len(parts) == 1:
        return parts[0]
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@contextlib.contextmanager
def _seen(trainer, name: str, look: Callable) -> Iterator[None]:
    """Within the block, call `look(result, *arguments)` after every call of the trainer's method."""
    method, own = getattr(trainer, name), trainer.__dict__.get(name)

    def call(*args, **kwargs):
        result = method(*args, **kwargs)
        look(result, *args, **kwargs)
        return result

    trainer.__dict__[name] = call
    try:
        yield
    finally:
        if own is None:
            del trainer.__dict__[name]
        else:
            trainer.__dict__[name] = own


def scorable(unscorable: Tensor, group: Tensor) -> Tensor:
    """(rows,): for each row, how many rows of its group have a reward."""
    _, member = group.unique(return_inverse=True)
    return torch.zeros_like(group).index_add_(0, member, (~unscorable).to(group.dtype))[member]
