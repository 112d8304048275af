"""GRPO and RLOO of TRL on `policy_loss` and `group_advantages`: the same results, any `LossSpec`, no host waits a step.

Metrics stay on the device until they are logged. Stock TRL reduces and reads a dozen numbers a micro-batch.
"""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from trl.trainer import grpo_trainer, rloo_trainer  # not trl's names: `flashpo run` replaces them
from trl.trainer.utils import nanstd

from flashpo.ops.group_advantages import group_advantages
from flashpo.ops.loss_spec import LOSSES, LossSpec
from flashpo.ops.policy_loss import PolicyLoss, policy_loss
from flashpo.ops.policy_stats import PolicyStats
from flashpo.trl.dynamic_sampling import replace_degenerate
from flashpo.trl.patch import active
from flashpo.trl.rollout import TrainerRollouts, importance_fields, mismatch, mismatch_metrics
from flashpo.trl.trainers import Accelerated

SCORING_INPUTS = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


if TYPE_CHECKING:
    Base = grpo_trainer.GRPOTrainer  # for the attributes that it shares with RLOOTrainer
else:
    Base = object


class PolicyTrainer(Accelerated, Base):
    """What the two share; beside a TRL class."""

    args: Any  # GRPOConfig or RLOOConfig, TRL's or ours
    model: Any
    router_aux_loss_coef: Any
    _logs: dict[str, Any]

    def __init__(self, *args, **kwargs):
        self._pending_stats: dict[str, list[PolicyStats]] = {"train": [], "eval": []}
        self._pending_mismatch: dict[str, list[Tensor]] = {"train": [], "eval": []}
        super().__init__(*args, **kwargs)
        self._rollouts = TrainerRollouts(self)

    # loss

    def _score(self, model, inputs, batch_size: int | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probs, entropies and auxiliary loss by TRL's own forward pass, of `batch_size` rows at once or of all."""
        return self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].shape[1],
            batch_size=batch_size,
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            **{name: inputs.get(name) for name in SCORING_INPUTS},
        )

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _note_mismatch(self, inputs, logprob: Tensor, mask: Tensor) -> None:
        """Compare the rollout's log-probs with the trainer's, where those are of the same policy."""
        sampled = inputs.get("sampling_per_token_logps")
        if self._rollouts.generated and sampled is not None and not self._takes_old_logprobs():
            trained = inputs.get("old_per_token_logps", logprob)
            self._pending_mismatch[self._mode].append(mismatch(trained, sampled, mask))

    def _accumulation(self) -> float:
        return self.current_gradient_accumulation_steps if self._mode == "train" else 1.0

    def _add_aux_loss(self, loss: Tensor, aux_loss: Tensor | None, scale: float) -> Tensor:
        if not self.aux_loss_enabled:
            return loss
        self._metrics[self._mode]["aux_loss"].append(self.accelerator.gather_for_metrics(aux_loss).mean().item())
        return loss + self.router_aux_loss_coef * aux_loss * scale

    def _metrics_of(self, stats: PolicyStats) -> dict[str, float]:
        """TRL's metrics of one micro-batch of all ranks."""
        raise NotImplementedError

    def flush_metrics(self) -> None:
        """Move the pending statistics into `_metrics`: two collectives and one copy for all micro-batches together."""
        for mode, pending in self._pending_stats.items():
            if not pending:
                continue
            table = PolicyStats(torch.stack([stats.values for stats in pending], dim=1))
            if self.accelerator.num_processes > 1:
                table = table.reduce()
            for values in table.values.cpu().unbind(1):
                for name, value in self._metrics_of(PolicyStats(values)).items():
                    self._metrics[mode][name].append(value)
            pending.clear()
        for mode, compared in self._pending_mismatch.items():
            if compared:
                rows = self.accelerator.gather(torch.stack(compared))
                for name, value in mismatch_metrics(rows).items():
                    self._metrics[mode][name].append(value)
                compared.clear()

    def log(self, logs, *args, **kwargs):
        self.flush_metrics()
        return super().log(logs, *args, **kwargs)

    # advantages

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

    def _generate(self, prompts):
        with self._rollouts.session():  # for the turns of a conversation with tools
            result = super()._generate(prompts)
        if self._rollouts.generated and self._takes_old_logprobs():
            self._rollouts.keep_as_old(self._sampled_logprobs(result))
        return result

    def _sampled_logprobs(self, generated: tuple) -> list[list[float]]:
        """Of each completion, from what `_generate` returned; 0 at tokens that tools wrote."""
        raise NotImplementedError

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        old = self._rollouts.take_old()
        return super()._get_per_token_logps_and_entropies(model, *args, **kwargs) if old is None else (old, None, None)

    def _generate_and_score_completions(self, inputs):
        if not active():
            return super()._generate_and_score_completions(inputs)
        if self._mode != "train" or not getattr(self.args, "dynamic_sampling", None):
            return self._generate_batch(inputs)[0]

        def generate(rows: list[dict]) -> tuple[dict, Tensor]:
            batch, rewards, group = self._generate_batch(rows)
            weights = self.reward_weights.to(rewards.device)
            return batch, group_advantages(rewards, group, reward_weights=weights).degenerate

        return replace_degenerate(self, *generate(inputs), generate)

    def _generate_batch(self, inputs: list[dict]) -> tuple[dict, Tensor, Tensor]:
        """TRL's batch with our advantages; rewards and group keys of the rows of all ranks."""
        rewards: list[Tensor] = []
        scored: list[Tensor] = []  # by the policy, then by the reference
        with (
            _seen(self, "_calculate_rewards", rewards.append),
            _seen(self, "_get_per_token_logps_and_entropies", lambda result: scored.append(result[0])),
        ):
            batch = super()._generate_and_score_completions(inputs)
        self._keep_scored(batch, scored)
        group = self._group_keys(inputs)
        advantages = self.compute_advantages(rewards[0], group, inputs, batch)
        if advantages.dim() == 1:
            self._log_advantages(advantages.tolist())  # TRL's own differ in groups of equal rewards
            here = self.accelerator.process_index * len(inputs)
            advantages = advantages[here : here + len(inputs)]
        batch["advantages"] = advantages
        return batch, rewards[0], group

    def _log_advantages(self, of_rows: list[float]) -> None:
        """In the table of completions, in place of those that TRL has just logged for the same rows of all ranks."""
        logged = self._logs["advantages"]
        for _ in range(min(len(of_rows), len(logged))):
            logged.pop()
        logged.extend(of_rows)

    def _takes_old_logprobs(self) -> bool:
        """Whether TRL scores the completions by the policy now, and the rollout's own log-probs are to stand for it."""
        return getattr(self.args, "old_logprobs", "trainer") == "rollout"

    def _keep_scored(self, batch: dict, scored: list[Tensor]) -> None:
        """For a trainer whose TRL class drops the log-probs of tokens."""

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
    """Let `look` see every result of the trainer's method within the block."""
    method, own = getattr(trainer, name), trainer.__dict__.get(name)

    def call(*args, **kwargs):
        result = method(*args, **kwargs)
        look(result)
        return result

    trainer.__dict__[name] = call
    try:
        yield
    finally:
        if own is None:
            del trainer.__dict__[name]
        else:
            trainer.__dict__[name] = own


def _scorable(unscorable: Tensor, group: Tensor) -> Tensor:
    """How many rows of each row's group have a reward."""
    _, member = group.unique(return_inverse=True)
    return torch.zeros_like(group).index_add_(0, member, (~unscorable).to(group.dtype))[member]


def clip_metrics(stats: PolicyStats) -> dict[str, float]:
    extremes = {"low_min": stats.clip_low_min.item(), "high_max": stats.clip_high_max.item()}
    return {
        "clip_ratio/low_mean": stats.clip_low.item(),
        "clip_ratio/high_mean": stats.clip_high.item(),
        "clip_ratio/region_mean": (stats.clip_low + stats.clip_high).item(),
        **{f"clip_ratio/{name}": x if math.isfinite(x) else math.nan for name, x in extremes.items()},
    }


class GRPOTrainer(PolicyTrainer, grpo_trainer.GRPOTrainer):
    """TRL's GRPOTrainer with FlashPO's ops and rollout engine; `flashpo.trl.GRPOConfig` has their options."""

    _entropy_window_stats: Any

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, *args, **kwargs):
        rollouts = self._rollouts.generate(prompt_ids, images, multimodal_fields) if active() else None
        if rollouts is None:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, *args, **kwargs)
        return rollouts.completion_ids, rollouts.logprobs

    def _sampled_logprobs(self, generated):
        return generated[4]

    def _takes_old_logprobs(self):
        every = self.args.steps_per_generation * self.num_iterations
        return super()._takes_old_logprobs() and self.args.gradient_accumulation_steps % every != 0

    def _loss_spec(self) -> LossSpec:
        """What the configuration asks for, with the entropy coefficient of this moment; corrected for the sampler."""
        spec = self._configured_loss()
        if not self._rollouts.generated or spec.importance != "none":
            return spec
        return replace(spec, **importance_fields(self.args, spec.surrogate))

    def _configured_loss(self) -> LossSpec:
        if getattr(self.args, "loss", None):
            return self.args.loss_spec()
        args, loss = self.args, self.loss_type
        surrogate: Any = loss if loss in ("cispo", "sapo", "vespo") else "clip"
        clip: dict[str, Any] = {"clip_low": self.epsilon_low, "clip_high": self.epsilon_high, "ratio_cap": args.delta}
        if loss == "cispo":
            clip = {"clip_low": None, "clip_high": self.epsilon_high - 1}  # TRL's epsilon_high is the cap itself
        elif loss in ("sapo", "vespo"):
            clip = {}
        aggregations: dict[str, Any] = {
            "grpo": "sequence_mean", "sapo": "sequence_mean", "luspo": "sequence_sum", "bnpo": "local_token_mean",
            "dr_grpo": "fixed_length",
        }  # fmt: skip
        coef = self.entropy_coef
        if self.use_adaptive_entropy and self._last_world_entropy > args.entropy_target:
            coef = 0.0
        return LossSpec(
            ratio=self.importance_sampling_level,  # type: ignore[arg-type]  # checked by LossSpec
            surrogate=surrogate,
            **clip,
            sapo_temperatures=(args.sapo_temperature_pos, args.sapo_temperature_neg),
            vespo_gamma=(
                (args.vespo_k_pos, args.vespo_lambda_pos),
                (args.vespo_k_neg, args.vespo_lambda_neg),
            ),
            kl_coef=self.beta,
            kl_ratio_correction=self.beta != 0 and args.use_bias_correction_kl,
            off_policy_threshold=self.off_policy_mask_threshold,
            top_entropy=self.top_entropy_quantile,
            aggregation=aggregations.get(loss, "token_mean"),
            max_length=self.max_completion_length if loss == "dr_grpo" else None,
            entropy_coef=coef,
        )

    def _compute_loss(self, model, inputs):
        if not active():
            return super()._compute_loss(model, inputs)
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
            model = without_tokens(model, inputs["tool_mask"] == 0)
        logprob, entropy, aux_loss = self._score(model, inputs)
        mode, accumulation, spec = self._mode, self._accumulation(), self._loss_spec()
        self._note_mismatch(inputs, logprob, mask)
        num_items, scale = None, 1 / accumulation
        if spec.aggregation == "token_mean":
            num_items = self._tokens_of_a_step(inputs)
            scale, spec = 1.0, replace(spec, entropy_coef=spec.entropy_coef / accumulation)
        result = policy_loss(
            logprob,
            inputs.get("old_per_token_logps"),
            inputs["advantages"],
            mask,
            loss=spec,
            ref_logprob=inputs["ref_per_token_logps"] if spec.kl_coef != 0 else None,
            rollout_logprob=inputs.get("sampling_per_token_logps"),
            importance_ratio=inputs.get("importance_sampling_ratio"),
            entropy=entropy,
            entropy_group=torch.distributed.group.WORLD if self.accelerator.num_processes > 1 else None,
            num_items=num_items,
            scale=scale,
        )
        self._pending_stats[mode].append(result.stats)
        if self._entropy_bonus_enabled:
            self._control_entropy(mode, result)
        return self._add_aux_loss(result.loss, aux_loss, 1 / accumulation)

    def _tokens_of_a_step(self, inputs) -> Tensor:
        """Live tokens of an optimizer step, a process: what each of its micro-batches is divided by."""
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self._mode == "eval":
            return tokens
        return tokens * self._accumulation() / self.args.steps_per_generation

    def _control_entropy(self, mode: str, result: PolicyLoss) -> None:
        """TRL's controller: once an optimisation step, the coefficient follows the mean entropy of its tokens."""
        if mode != "train":
            return
        if self.use_adaptive_entropy:
            tokens = result.stats.high_entropy_tokens
            window = torch.stack([result.stats.high_entropy * tokens, tokens])
            self._entropy_window_stats = (
                window if self._entropy_window_stats is None else self._entropy_window_stats + window
            )
            if self.accelerator.sync_gradients:
                total, tokens = self.accelerator.reduce(self._entropy_window_stats, reduction="sum")
                self._last_world_entropy = (total / tokens.clamp(min=1.0)).item()
                low, high = self.args.entropy_coef_min, self.args.entropy_coef_max
                step = self.args.entropy_coef_delta
                if self._last_world_entropy <= self.args.entropy_target:
                    self.entropy_coef = min(self.entropy_coef + step, high)
                else:
                    self.entropy_coef = max(self.entropy_coef - step, low)
                self._entropy_window_stats = None
        if self.accelerator.sync_gradients:
            self._metrics[mode]["entropy_coef"].append(self.entropy_coef)

    def _metrics_of(self, stats: PolicyStats) -> dict[str, float]:
        spec = self._loss_spec()
        metrics = {"entropy": stats.entropy.item()}
        if spec.kl_coef != 0:
            metrics["kl"] = stats.kl.item()
        if self._entropy_bonus_enabled:
            metrics["policy_loss"] = stats.policy_loss.item() / self.accelerator.num_processes
        if spec.surrogate == "cispo":
            metrics["cispo_clip_ratio"] = stats.clip_high.item()
        elif spec.surrogate == "vespo":
            metrics["vespo/phi_seq_mean"] = stats.phi.item()
        elif spec.surrogate in ("clip", "gmpo", "dppo_tv", "dppo_kl"):
            metrics |= clip_metrics(stats)
        return metrics

    def compute_advantages(self, rewards, group, inputs, batch):
        found = group_advantages(
            rewards,
            group,
            scale=self.scale_rewards,
            reward_weights=self.reward_weights.to(rewards.device),
            aggregation=self.multi_objective_aggregation,
        )
        if self.scale_rewards != "batch" and self.multi_objective_aggregation == "sum_then_normalize":
            dead = found.degenerate & (_scorable(rewards.isnan().all(dim=1), group) > 1)  # TRL misses equal 0.9s
            self._metrics[self._mode]["frac_reward_zero_std"][-1] = dead.float().mean().item()
        return found.advantage


def without_tokens(model, dead: Tensor):
    """`model`, called with labels that leave out those tokens of the completions: they do not reach the LM head."""

    def call(*args, labels, **kwargs):
        labels = labels.clone()
        labels[:, -dead.shape[1] :].masked_fill_(dead, -100)
        return model(*args, labels=labels, **kwargs)

    return call


class RLOOTrainer(PolicyTrainer, rloo_trainer.RLOOTrainer):  # type: ignore[misc]  # the Base of type checkers is GRPO's
    """TRL's RLOOTrainer with FlashPO's ops and rollout engine; `flashpo.trl.RLOOConfig` has their options."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
        rollouts = self._rollouts.generate(prompt_ids, images, multimodal_fields) if active() else None
        if rollouts is None:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields)
        self._sampled = rollouts.logprobs
        return rollouts.completion_ids

    def _sampled_logprobs(self, generated):
        return self._sampled  # TRL's RLOO has no place for them

    def _keep_scored(self, batch, scored):
        batch["old_per_token_logps"] = scored[0]
        if self.beta != 0.0:
            batch["ref_per_token_logps"] = scored[1]

    def _loss_spec(self) -> LossSpec:
        if getattr(self.args, "loss", None):
            return self.args.loss_spec()
        return replace(LOSSES["rloo"], clip_low=self.epsilon_low, clip_high=self.epsilon_high)

    def _compute_loss(self, model, inputs):
        if not active():
            return super()._compute_loss(model, inputs)
        logprob, entropy, aux_loss = self._score(model, inputs)
        spec = self._loss_spec()
        result = policy_loss(
            logprob,
            inputs["old_per_token_logps"],
            inputs["advantages"],
            inputs["completion_mask"],
            loss=spec,
            ref_logprob=inputs["ref_per_token_logps"] if spec.kl_coef != 0 else None,
            entropy=entropy,
        )
        self._pending_stats[self._mode].append(result.stats)
        return self._add_aux_loss(result.loss, aux_loss, 1.0)  # the Trainer divides by the accumulation steps

    def _metrics_of(self, stats):
        return {"entropy": stats.entropy.item(), **clip_metrics(stats)}

    def compute_advantages(self, rewards, group, inputs, batch):
        unscorable = rewards.isnan().all(dim=1)
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1).masked_fill(unscorable, torch.nan)
        if self.reward_clip_range:
            total = total.clamp(*self.reward_clip_range)
        if self.beta != 0.0:
            k1 = (batch["old_per_token_logps"] - batch["ref_per_token_logps"]) * batch["completion_mask"]
            total = total - self.beta * self.accelerator.gather(k1.sum(-1))
        advantage = group_advantages(total, group, baseline="leave_one_out", scale="none").advantage
        if self.normalize_advantages:  # over the completions that were compared with others
            compared = advantage.masked_fill(unscorable | (_scorable(unscorable, group) < 2), torch.nan)
            advantage = (compared - compared.nanmean()) / (nanstd(compared) + 1e-4)
        return advantage.nan_to_num(nan=0.0)
