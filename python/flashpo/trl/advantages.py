"""Batches of generations with FlashPO's advantages, for GRPO and RLOO.

TRL generates, scores and rewards by methods that ours override, and computes advantages of its own in between. Ours
take their place: they are exactly 0 in groups of equal rewards, know groups that `group_by` makes, and can be
overridden. On the first batch that teaches something the two are compared, so that a TRL that computes advantages in
another way keeps its own.
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

ULPS = 8  # by which rewards are changed to see how much rounding moves an advantage


class GroupComparing(Sampling, Base):
    """A policy trainer's part that is about advantages; beside a TRL class."""

    _options: options.Known  # of the TRL class
    args: Any  # GRPOConfig or RLOOConfig, TRL's or ours
    model: Any
    _logs: dict[str, Any]
    _restates_advantages = True  # whether `compute_advantages` is to give what TRL's code does
    _agrees: bool | None = None  # whether it does; None: no batch has shown it yet
    _states_of_policy: tuple | None = None  # of the adapters, while a batch is generated and scored

    @functools.cached_property
    def _keep_trls(self) -> Fallback:
        return Fallback("FlashPO leaves {reason}.")

    @functools.cached_property
    def _reward_models(self) -> RewardModels:
        return RewardModels(self)

    def compute_advantages(self, rewards: Tensor, group: Tensor, inputs: list[dict], batch: dict) -> Tensor:
        """Advantages of the generated batch; override to give credit in another way.

        Args:
            rewards: (rows of all ranks, reward functions), NaN where a function returned None.
            group: (rows of all ranks,) int64 keys; rows of one key are compared with each other.
            inputs: this rank's rows of the dataset, with what a rollout function added.
            batch: this rank's tensors (completion_mask, old_per_token_logps ...).

        Returns:
            (rows of all ranks,), or (this rank's rows, completion length): one advantage a token.
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
        """TRL's batch with our advantages; rewards and group keys of the rows of all ranks."""
        rewards: list[Tensor] = []
        scored: dict[str, Tensor] = {}
        self._rollouts.forget_turns()
        self._rollouts.take_old()
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
            self._log_advantages(advantages.tolist())  # TRL's own differ in groups of equal rewards
            advantages = self._of_this_rank(advantages, len(inputs))
        batch["advantages"] = advantages
        return batch, rewards[0], group

    def _complete(self, batch: dict, scored: dict[str, Tensor]) -> None:
        """Add to TRL's batch what our loss or advantages need; `scored`: log-probs by "policy" and "reference"."""

    def _is_reference(self, model: Any) -> bool:
        """Whether a call scores by the reference: another model, or the policy's under other adapters."""
        if model is getattr(self, "ref_model", None):
            return True
        return self._states_of_policy is not None and adapter_states(self.model) != self._states_of_policy

    def _of_this_rank(self, rows: Tensor, count: int) -> Tensor:
        begin = self.accelerator.process_index * count
        return rows[begin : begin + count]

    def _keeps_trls_advantages(self) -> bool:
        """Whether an option asks for advantages that `compute_advantages` does not know; says so."""
        reason = options.why_trls_advantages(self, self._options)
        if not reason or overridden(self, "compute_advantages"):
            return False
        if getattr(self.args, "group_by", None):
            raise ValueError(f"group_by={self.args.group_by} needs FlashPO's advantages, but {reason}")
        self._keep_trls(f"the advantages to TRL: {reason}")
        return True

    def _compared(self, rewards: Tensor, group: Tensor, inputs: list[dict], batch: dict) -> Tensor | None:
        """`compute_advantages`; None, after a warning, where TRL's are others by more than rounding."""
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
        """In the table of completions, in place of those that TRL has just logged for the same rows of all ranks."""
        logged = self._logs["advantages"]
        for _ in range(min(len(of_rows), len(logged))):
            logged.pop()
        logged.extend(of_rows)

    def _group_keys(self, inputs: list[dict]) -> Tensor:
        """A prompt's generations are a group; `group_by` splits it by columns of the dataset or the rollout."""
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
    """The same int64 on every rank."""
    if len(parts) == 1:
        return parts[0]
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@contextlib.contextmanager
def _seen(trainer, name: str, look: Callable) -> Iterator[None]:
    """Let `look(result, *arguments)` see every call of the trainer's method within the block."""
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
    """How many rows of each row's group have a reward."""
    _, member = group.unique(return_inverse=True)
    return torch.zeros_like(group).index_add_(0, member, (~unscorable).to(group.dtype))[member]
