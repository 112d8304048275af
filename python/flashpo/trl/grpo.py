"""GRPOTrainer: TRL's GRPO with the loss computed by `flashpo.policy_loss`, which also knows other policy losses."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import trl
from torch import Tensor
from trl.trainer import grpo_trainer  # not trl's names: `flashpo run` replaces them

from flashpo._hosts.trl import LOSS, ROLLOUTS, place_of
from flashpo.ops.group_advantages import group_advantages
from flashpo.ops.loss_spec import LossSpec, resolve
from flashpo.ops.policy_loss import PolicyLoss, policy_loss
from flashpo.ops.policy_stats import PolicyStats
from flashpo.trl import options
from flashpo.trl.accelerated import in_place_of_trls
from flashpo.trl.advantages import scorable
from flashpo.trl.config import GRPO_LOSS_OPTIONS, CorrectionOptions, PolicyOptions, documented
from flashpo.trl.metrics import clip_metrics
from flashpo.trl.noise import RandomDraws
from flashpo.trl.patch import active
from flashpo.trl.policy import PolicyTrainer
from flashpo.trl.rollout import importance_fields


@documented
@dataclass
class GRPOConfig(CorrectionOptions, PolicyOptions, trl.GRPOConfig):
    """Takes all arguments of `trl.GRPOConfig`, and those below."""

    _VALID_DICT_FIELDS = [*trl.GRPOConfig._VALID_DICT_FIELDS, "rollout_options"]  # noqa: RUF012  # as TRL has it

    def __post_init__(self):
        super().__post_init__()
        self._check_options(GRPO_LOSS_OPTIONS, options.GRPO)
        if self.loss is not None:
            self.beta = self.loss_spec().kl_coef  # TRL loads a reference model if beta is not 0

    def loss_spec(self) -> LossSpec:
        """The LossSpec that `loss` names.

        `beta` becomes its KL coefficient if it has none, and `max_completion_length` its length if it needs one.

        Raises:
            ValueError: `beta` and the KL coefficient of the spec contradict each other.
        """
        spec = resolve(self.loss, ())
        if spec.kl_coef == 0 and self.beta != 0:
            spec = replace(spec, kl_coef=self.beta)
        elif self.beta not in (0, spec.kl_coef):
            raise ValueError(f"beta={self.beta} and the loss's kl_coef={spec.kl_coef} contradict each other")
        return self._with_length(spec)


class GRPOTrainer(PolicyTrainer, grpo_trainer.GRPOTrainer):
    """TRL's GRPOTrainer with FlashPO's rollout engine, token trees, loss and advantages.

    It takes the arguments of `trl.GRPOTrainer`; `flashpo.trl.GRPOConfig` has the additional options. Override
    `compute_advantages` to give credit in another way.
    """

    _trl_class = grpo_trainer.GRPOTrainer
    _options = options.GRPO
    _loss_helpers = ("get_high_entropy_mask", "get_off_policy_mask", "get_gamma_weights")
    _entropy_window_stats: Any

    @in_place_of_trls(ROLLOUTS)
    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, *args, **kwargs):
        rollouts = self._rollouts.generate(prompt_ids, images, multimodal_fields) if active() else None
        if rollouts is None:
            ids, logprobs = super()._generate_single_turn(prompt_ids, images, multimodal_fields, *args, **kwargs)
            return ids, self._rollouts.unknown(ids) if logprobs is None else logprobs
        return rollouts.completion_ids, rollouts.logprobs

    def _sampled_logprobs(self, generated):
        return generated[place_of(self._trl_class, "_generate", "logprobs")]

    def _takes_old_logprobs(self):
        every = self.args.steps_per_generation * self.num_iterations
        return super()._takes_old_logprobs() and self.args.gradient_accumulation_steps % every != 0

    def _spec_of(self, inputs) -> LossSpec:
        """The loss of a micro-batch: `_loss_spec`, with weights for the mismatch if the engine sampled the batch."""
        spec = self._loss_spec()
        sampled = self._rollouts.generated and inputs.get("sampling_per_token_logps") is not None
        if not sampled or spec.importance != "none":
            return spec
        return replace(spec, **importance_fields(self.args, spec.surrogate))

    def _weighed(self, spec: LossSpec, sampled: Tensor | None) -> LossSpec:
        """`spec`; without weights for the mismatch if the engine sampled but its log-probs cannot be compared."""
        if sampled is not None or not self._rollouts.generated:
            return spec
        return replace(spec, importance="none", importance_min=None, importance_max=None)

    def _wants_quiet_logprobs(self, batch):
        by_spec = getattr(self.args, "loss", None) and self._loss_spec().importance != "none"
        if self._mode != "train" or not (by_spec or getattr(self.args, "rollout_correction", "auto") == "scored"):
            return False
        sampled = self._rollouts.generated and batch.get("sampling_per_token_logps") is not None
        wanted = torch.tensor(float(sampled and self._pending.noisy is not False), device=self.accelerator.device)
        return bool(self.accelerator.reduce(wanted) > 0)  # all ranks run this forward, or none does

    def _loss_spec(self) -> LossSpec:
        """The loss that the configuration asks for, with the current entropy coefficient."""
        if getattr(self.args, "loss", None):
            return self.args.loss_spec()
        args, loss = self.args, self.loss_type
        surrogate: Any = loss if loss in ("cispo", "sapo", "vespo") else "clip"
        numbers: dict[str, Any] = {
            "clip_low": self.epsilon_low,
            "clip_high": self.epsilon_high,
            "ratio_cap": args.delta,
        }
        if loss == "cispo":
            numbers = {"clip_low": None, "clip_high": self.epsilon_high - 1}  # TRL's epsilon_high is the cap itself
        elif loss == "sapo":
            numbers = {"sapo_temperatures": (args.sapo_temperature_pos, args.sapo_temperature_neg)}
        elif loss == "vespo":
            of_signs = (args.vespo_k_pos, args.vespo_lambda_pos), (args.vespo_k_neg, args.vespo_lambda_neg)
            numbers = {"vespo_gamma": of_signs}
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
            **numbers,
            kl_coef=self.beta,
            kl_ratio_correction=self.beta != 0 and bool(args.use_bias_correction_kl),
            off_policy_threshold=self.off_policy_mask_threshold,
            top_entropy=self.top_entropy_quantile,
            aggregation=aggregations.get(loss, "token_mean"),
            max_length=self.max_completion_length if loss == "dr_grpo" else None,
            entropy_coef=coef,
        )

    @in_place_of_trls(LOSS)
    def _compute_loss(self, model, inputs):
        spec = self._spec_or_none(inputs) if active() else None
        if spec is None:
            return super()._compute_loss(model, inputs)
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        mode, accumulation = self._mode, self._accumulation()
        draws = RandomDraws(self.accelerator.device)
        logprob, entropy, aux_loss = self._score_to_train(model, inputs, mask, spec)
        sampled = self._sampler_logprobs(inputs, logprob, mask, bool(draws))
        spec = self._weighed(spec, sampled)
        weighted = self.loss_type == "vespo" or (
            self.use_vllm and self.vllm_importance_sampling_correction
        )  # as in TRL
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
            rollout_logprob=sampled,
            importance_ratio=inputs.get("importance_sampling_ratio") if weighted else None,
            entropy=entropy,
            entropy_group=torch.distributed.group.WORLD if self.accelerator.num_processes > 1 else None,
            num_items=num_items,
            scale=scale,
        )
        self._pending.stats[mode].append(result.stats)
        if self._entropy_bonus_enabled:
            self._control_entropy(mode, result)
        return self._add_aux_loss(result.loss, aux_loss, 1 / accumulation)

    def _tokens_of_a_step(self, inputs) -> Tensor:
        """Live tokens of an optimizer step per process: the denominator of each of its micro-batches."""
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self._mode == "eval":
            return tokens
        return tokens * self._accumulation() / self.args.steps_per_generation

    def _control_entropy(self, mode: str, result: PolicyLoss) -> None:
        """TRL's controller: once per optimizer step it adapts the coefficient to the mean entropy of the tokens."""
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
        summed_first = self.multi_objective_aggregation == "sum_then_normalize"
        found = group_advantages(
            rewards,
            group,
            scale=self.scale_rewards if summed_first else "group",  # otherwise TRL ignores scale_rewards and normalises
            reward_weights=self.reward_weights.tolist(),
            aggregation=self.multi_objective_aggregation,
        )
        if self.scale_rewards != "batch" and summed_first:
            compared = scorable(rewards.isnan().all(dim=1), group) > 1
            alone = (self.num_generations if self._mode == "train" else self.num_generations_eval) == 1
            dead = found.degenerate & (compared | alone)  # TRL's std of equal rewards such as 0.9 may not be exactly 0
            if logged := self._metrics[self._mode].get("frac_reward_zero_std"):
                logged[-1] = dead.float().mean().item()
        return found.advantage
