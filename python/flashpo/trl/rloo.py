"""RLOOTrainer: TRL's RLOO with the loss computed by `flashpo.policy_loss`."""

from dataclasses import dataclass, replace

import torch
import trl
from trl.trainer import rloo_trainer  # not trl's names: `flashpo run` replaces them

from flashpo._hosts.trl import LOSS, ROLLOUTS
from flashpo.ops.group_advantages import group_advantages
from flashpo.ops.loss_spec import LOSSES, LossSpec, resolve
from flashpo.ops.policy_loss import policy_loss
from flashpo.trl import options
from flashpo.trl.accelerated import in_place_of_trls
from flashpo.trl.advantages import scorable
from flashpo.trl.config import PolicyOptions, documented
from flashpo.trl.metrics import clip_metrics
from flashpo.trl.patch import active
from flashpo.trl.policy import PolicyTrainer

LOSS_OPTIONS = ("epsilon", "epsilon_high")  # TRL's options that a LossSpec replaces


@documented
@dataclass
class RLOOConfig(PolicyOptions, trl.RLOOConfig):
    """Takes all arguments of `trl.RLOOConfig`, and those below."""

    _VALID_DICT_FIELDS = [*trl.RLOOConfig._VALID_DICT_FIELDS, "rollout_options"]  # noqa: RUF012

    def __post_init__(self):
        super().__post_init__()
        self._check_options(LOSS_OPTIONS, options.RLOO)
        if self.loss is not None:
            self.loss_spec()

    def loss_spec(self) -> LossSpec:
        spec = resolve(self.loss, ())
        if spec.kl_coef != 0:
            raise ValueError(f"RLOO has its KL in the reward (beta): the loss must not have kl_coef={spec.kl_coef}")
        if spec.aggregation == "token_mean":
            spec = replace(spec, aggregation="local_token_mean")  # RLOO does not count the tokens of the global batch
        return self._with_length(spec)


class RLOOTrainer(PolicyTrainer, rloo_trainer.RLOOTrainer):  # type: ignore[misc]  # the Base of type checkers is GRPO's
    """TRL's RLOOTrainer with FlashPO's rollout engine, token trees, loss and advantages.

    It takes the arguments of `trl.RLOOTrainer`; `flashpo.trl.RLOOConfig` has the additional options. Override
    `compute_advantages` to give credit in another way.
    """

    _trl_class = rloo_trainer.RLOOTrainer
    _options = options.RLOO

    @in_place_of_trls(ROLLOUTS)
    def _generate_single_turn(self, *turn):  # type: ignore[override]  # prompt_ids, images, multimodal_fields
        rollouts = self._rollouts.generate(*turn) if active() else None
        if rollouts is None:
            return super()._generate_single_turn(*turn)
        self._pending.sampled = rollouts.logprobs
        return rollouts.completion_ids

    def _sampled_logprobs(self, generated):
        return self._pending.sampled  # TRL's RLOOTrainer does not return them from `_generate`

    def _complete(self, batch, scored):
        super()._complete(batch, scored)
        batch["old_per_token_logps"] = scored["policy"]
        if self.beta != 0.0:
            batch["ref_per_token_logps"] = scored["reference"]

    def _loss_spec(self) -> LossSpec:
        if getattr(self.args, "loss", None):
            return self.args.loss_spec()
        return replace(LOSSES["rloo"], clip_low=self.epsilon_low, clip_high=self.epsilon_high)

    def _why_trls_loss(self, inputs):
        if "old_per_token_logps" not in inputs:
            return f"{type(self).__name__}'s batch has old log-probs of sequences only"
        return super()._why_trls_loss(inputs)

    @in_place_of_trls(LOSS)
    def _compute_loss(self, model, inputs):
        spec = self._spec_or_none(inputs) if active() else None
        if spec is None:
            return super()._compute_loss(model, inputs)
        logprob, entropy, aux_loss = self._score_to_train(model, inputs, inputs["completion_mask"], spec)
        result = policy_loss(
            logprob,
            inputs["old_per_token_logps"],
            inputs["advantages"],
            inputs["completion_mask"],
            loss=spec,
            ref_logprob=inputs["ref_per_token_logps"] if spec.kl_coef != 0 else None,
            entropy=entropy,
        )
        self._pending.stats[self._mode].append(result.stats)
        return self._add_aux_loss(result.loss, aux_loss, 1.0)  # transformers divides by the accumulation steps

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
        if self.normalize_advantages:  # over the completions that were compared with at least one other
            compared = advantage.masked_fill(unscorable | (scorable(unscorable, group) < 2), torch.nan)
            centred = compared - compared.nanmean()
            std = (centred.square().nansum() / (compared.isfinite().sum() - 1)).sqrt()
            advantage = centred / (std + 1e-4)
        return advantage.nan_to_num(nan=0.0)
