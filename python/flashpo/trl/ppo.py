"""PPO (arXiv 1707.06347) for language models, built on TRL's GRPOTrainer, which contributes rollouts, rewards, logging
and checkpoints.

After generation, one forward without gradient computes old log-probs and values of every token. The reward is paid at
each completion's last live token, and GAE gives advantages and returns. In each step, one forward of the wrapped module
gives log-probs and values, and

    loss = policy_loss("ppo") + vf_coef value_loss [+ beta KL] [- entropy_coef H]
"""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from flashpo._hosts.transformers import name_or_path
from flashpo._hosts.trl import ADVANTAGES, TREES, PatchError, disable_gradient_checkpointing, why_not
from flashpo.ops import LossSpec, gae, policy_loss, value_loss
from flashpo.ops._check import check_that
from flashpo.trl import critic as critics
from flashpo.trl.grpo import GRPOTrainer
from flashpo.trl.metrics import clip_metrics
from flashpo.trl.noise import RandomDraws
from flashpo.trl.ppo_config import PPOConfig

if TYPE_CHECKING:
    from peft import PeftModel


class PPOTrainer(GRPOTrainer):
    """Trains a policy and a critic by PPO (arXiv 1707.06347).

    The critic is `trainer.critic`, a part of the policy's module. Under PEFT all of its parameters are trained, and the
    reference is the policy without its adapters. `save_model` writes the policy, which `from_pretrained` can load, and
    the critic as `critic.safetensors` into the same folder; `load_critic(folder)` reads the latter. Completions for
    which every reward function returns None train neither policy nor critic, nor do truncated completions if
    `mask_truncated_completions` is set.

    Args:
        model, reward_funcs, **kwargs: as for `trl.GRPOTrainer`.
        args: a `PPOConfig`; None: its defaults.
        critic_model: a model whose backbone becomes the critic's; `PPOConfig.critic` must then have its default.
        optimizers: as for `trl.GRPOTrainer`, but the optimizer must be None: the critic's parameters do not exist yet.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        PatchError: the installed TRL's GRPOTrainer lacks something that PPOTrainer needs.
    """

    _restates_advantages = False
    _tag_names = ["trl", "ppo"]  # noqa: RUF012  # of the base class
    _name = "PPO"
    _paper = {  # noqa: RUF012
        "title": "Proximal Policy Optimization Algorithms",
        "id": "1707.06347",
        "citation": """\
@article{schulman2017proximal,
    title        = {{Proximal Policy Optimization Algorithms}},
    author       = {John Schulman and Filip Wolski and Prafulla Dhariwal and Alec Radford and Oleg Klimov},
    year         = 2017,
    eprint       = {arXiv:1707.06347},
}""",
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        reward_funcs=None,
        args: PPOConfig | None = None,
        *,
        critic_model: PreTrainedModel | None = None,
        optimizers: tuple = (None, None),
        **kwargs,
    ):
        if args is None:
            name = model if isinstance(model, str) else name_or_path(model.config)
            args = PPOConfig(f"{name.split('/')[-1]}-PPO")
        if not isinstance(args, PPOConfig):
            raise TypeError(f"args must be a PPOConfig, got {type(args).__name__}")
        if critic_model is not None and args.critic != "shared":
            raise ValueError(f"critic_model and PPOConfig.critic={args.critic!r} exclude each other")
        if optimizers[0] is not None:
            raise ValueError(
                "optimizers[0] must be None: made before the critic, it would not train it. Set PPOConfig.optim"
            )
        if reason := why_not(self._trl_class, TREES) or why_not(self._trl_class, ADVANTAGES):
            raise PatchError(f"PPOTrainer needs a GRPOTrainer of TRL that FlashPO knows: {reason}")
        super().__init__(model, reward_funcs, args, optimizers=optimizers, **kwargs)
        policy = self.model.get_base_model() if is_peft_model(self.model) else self.model
        backbone: Any = self._load_backbone(policy) if critic_model is None else critic_model.base_model
        # Before the critic is attached: its forward calls the model's, which must already take trees
        if self._has_whole_models:
            self._packed.prepare(backbone)
        else:
            self._packed.accept(backbone)
        self.critic = critics.attach_critic(policy, backbone)
        if self.args.disable_dropout:  # as TRL does in the policy
            for module in self.critic.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0

    def _load_backbone(self, policy: PreTrainedModel) -> PreTrainedModel | None:
        if self.args.critic == "shared":
            return None
        path = name_or_path(policy.config) if self.args.critic == "separate" else self.args.critic
        options = dict(self.args.model_init_kwargs or {})
        options.setdefault("dtype", policy.dtype)
        options.setdefault("attn_implementation", policy.config._attn_implementation)
        options.setdefault("trust_remote_code", self.args.trust_remote_code)
        if self.args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            options["device_map"] = None
        return AutoModel.from_pretrained(path, **options).base_model

    def _scored(self, model, *args, **kwargs):
        """Score, and keep the critic's values of the same forwards in `_pending` if the model has a critic."""
        values: list[Any] = []

        def watched(*inputs, **options):
            out = model(*inputs, **options)
            values.append(getattr(out, "state_values", None))
            return out

        with self.critic.asked():
            scores = super()._scored(watched, *args, **kwargs)
        if scores.state_values is None and None not in values:
            scores = scores._replace(state_values=torch.cat(values)[:, -scores.logprob.shape[1] :])
        if not self._is_reference(model):
            self._pending.values.append(scores.state_values)
        return scores

    def _generate_and_score_completions(self, inputs):
        self._pending.values.clear()
        return self._generate_batch(inputs)[0]

    def compute_advantages(self, rewards, group, inputs, batch):
        """GAE of this rank's completions. Adds old log-probs, old values and returns to `batch`."""
        if "old_per_token_logps" in batch:
            values = self._pending.values[-1]
        else:
            training, args = self._mode == "train", self.args
            size = args.per_device_train_batch_size if training else args.per_device_eval_batch_size
            with torch.no_grad(), disable_gradient_checkpointing(self.model, args.gradient_checkpointing_kwargs):
                batch["old_per_token_logps"] = self._score(self.model, batch, size)[0]
            values = self._pending.values[-1]
        here = self.accelerator.process_index * len(inputs)
        rewards = rewards[here : here + len(inputs)]
        mask = batch["completion_mask"] * batch.get("tool_mask", 1) * ~rewards.isnan().all(1, keepdim=True)
        mask = mask.bool()
        scores = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        check_that(scores.isfinite().all(), "rewards holds infinite values")
        positions = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask, positions, -1).amax(1, keepdim=True)
        paid = torch.where(positions == last, scores[:, None], 0.0)
        kl = None
        if self.beta != 0.0 and self.args.kl_in == "reward":
            kl = batch["old_per_token_logps"] - batch["ref_per_token_logps"]
            paid = paid - self.beta * kl
        whiten = self.args.whiten_advantages
        advantages, returns = gae(
            paid,
            values,
            mask,
            gamma=self.args.gamma,
            lam=self.args.lam,
            whiten=whiten,
            group=dist.group.WORLD if whiten and self.accelerator.num_processes > 1 else None,
        )
        batch |= {"mask": mask, "old_values": values, "returns": returns}
        batch["num_items_in_batch"] = self.accelerator.gather(mask.sum()).sum()
        self._log_generation(advantages, returns, values, kl, mask)
        return advantages

    def _log_generation(self, advantages: Tensor, returns: Tensor, values: Tensor, kl, mask: Tensor) -> None:
        """Log means over the live tokens of all processes, with one reduction and one copy to the host."""
        error = (returns - values).double()
        terms = [mask, returns, returns.double().square(), error, error.square(), values]
        if kl is not None:
            terms.append(kl)
        sums = torch.stack([torch.where(mask, x.double(), 0.0).sum() for x in terms])
        n, *totals = self.accelerator.reduce(sums, reduction="sum").tolist()
        mean_return, square, mean_error, error_square, mean_value, *mean_kl = (x / max(n, 1.0) for x in totals)
        spread, unexplained = square - mean_return**2, error_square - mean_error**2
        metrics = self._metrics[self._mode]
        metrics["returns/mean"].append(mean_return)
        metrics["values/mean"].append(mean_value)
        metrics["explained_variance"].append(1 - unexplained / spread if spread > 0 else math.nan)
        for value in mean_kl:
            metrics["kl"].append(value)
        of_sequences = advantages.sum(1) / mask.sum(1).clamp(min=1)
        self._log_advantages(self.accelerator.gather(of_sequences).tolist())

    def _loss_spec(self) -> LossSpec:
        spec = replace(super()._loss_spec(), entropy_mean="loss")
        return spec if self.args.kl_in == "loss" else replace(spec, kl_coef=0.0, kl_ratio_correction=False)

    def _compute_loss(self, model, inputs):
        mask, clip = inputs["mask"], self.args.cliprange_value
        draws = RandomDraws(self.accelerator.device)
        logprob, entropy, aux_loss = self._score(model, inputs, scored=mask)
        values = self._pending.values.pop()
        sampled = self._sampler_logprobs(inputs, logprob, mask, bool(draws))
        spec = self._weighed(self._spec_of(inputs), sampled)
        num_items = self._tokens_of_a_step(inputs)
        policy = policy_loss(
            logprob,
            inputs["old_per_token_logps"],
            inputs["advantages"],
            mask,
            loss=spec,
            ref_logprob=inputs["ref_per_token_logps"] if spec.kl_coef != 0 else None,
            rollout_logprob=sampled,
            entropy=entropy,
            num_items=num_items,
        )
        old_values, returns = inputs["old_values"], inputs["returns"]
        critic = value_loss(values, old_values, returns, mask, clip=clip, num_items=num_items)
        moved = (values.detach() - old_values).abs() > (math.inf if clip is None else clip)
        sums = [policy.stats.policy_loss * num_items, critic.detach() * num_items, (moved & mask).sum(), mask.sum()]
        self._pending.stats[self._mode].append(policy.stats)
        self._pending.sums[self._mode].append(torch.stack([x.float() for x in sums]))
        loss = policy.loss + self.args.vf_coef * critic
        return self._add_aux_loss(loss, aux_loss, 1 / self._accumulation())

    def flush_metrics(self) -> None:
        super().flush_metrics()
        for mode, pending in self._pending.sums.items():
            table = self.accelerator.reduce(torch.stack(pending), reduction="sum").tolist() if pending else []
            for *totals, tokens in table:
                for name, total in zip(("policy_loss", "value_loss", "value_clip_fraction"), totals):
                    self._metrics[mode][name].append(total / max(tokens, 1.0))
            pending.clear()

    def _metrics_of(self, stats):
        metrics = {"entropy": stats.entropy.item(), "approx_kl": stats.approx_kl.item(), **clip_metrics(stats)}
        return metrics | ({"kl": stats.kl.item()} if self._loss_spec().kl_coef != 0 else {})

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if state_dict is None:
            state_dict = self.accelerator.unwrap_model(self.model).state_dict()
        policy, critic = critics.split_state(state_dict)
        super()._save(output_dir, state_dict=policy)
        if self.args.should_save:
            critics.save_critic(critic, output_dir if output_dir is not None else self.args.output_dir)

    def load_critic(self, folder: str) -> None:
        """Load the critic that `save_model(folder)` or a checkpoint wrote.

        Raises:
            FileNotFoundError: the folder has no `critic.safetensors`.
        """
        critics.load_critic(self.critic, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # they load the critic with the wrapped module
            self.load_critic(resume_from_checkpoint)

    def _load_best_model(self):
        super()._load_best_model()
        assert self.state.best_model_checkpoint is not None
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self.load_critic(self.state.best_model_checkpoint)
