"""What GRPOTrainer and RLOOTrainer share: TRL's trainers on `policy_loss` and `group_advantages`.

Results are the same as TRL's, and every `LossSpec` can be trained with. Metrics stay on the device until they are
logged, so that the host does not wait for them at each step; TRL reduces and reads about a dozen numbers for each
micro-batch. In addition to TRL's metrics there are `ratio/q01` and `ratio/q99`: 98 % of the ratios lie between them,
see `PolicyStats.ratio_quantile`.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from flashpo._hosts.trl import (
    ADVANTAGES,
    DYNAMIC_SAMPLING,
    GROUPS,
    LOSS,
    OLD_LOGPROBS,
    TREES,
    disable_gradient_checkpointing,
    why_not,
    why_unknown,
)
from flashpo.ops.loss_spec import LossSpec
from flashpo.ops.policy_stats import PolicyStats
from flashpo.rollout.seam import eval_mode
from flashpo.trl import options, start
from flashpo.trl._metrics import ratio_metrics
from flashpo.trl._phases import REST, SCORING
from flashpo.trl.accelerated import in_place_of_trls, overridden
from flashpo.trl.advantages import GroupComparing
from flashpo.trl.images import SCORING_INPUTS
from flashpo.trl.packed import PackedScoring, groups_stay_together, tokens_of
from flashpo.trl.patch import active
from flashpo.trl.rollout import MISMATCH, merged, mismatch, mismatch_metrics

QUIET = "quiet_per_token_logps"  # key of a batch: log-probs of the completions by a forward without dropout


class PolicyTrainer(GroupComparing):
    """The common base of GRPOTrainer and RLOOTrainer; to be combined with a TRL class."""

    router_aux_loss_coef: Any
    _loss_helpers: tuple[str, ...] = ()  # methods that TRL's `_compute_loss` calls and ours does not
    # while `_score` runs: the token ids that it was called with, and which tokens are scored
    _to_score: tuple[Tensor, Tensor | None] | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._say_what_trl_lacks()
        if self._has_whole_models or why_not(self._trl_class, TREES):
            self._packed.ready()

    @functools.cached_property
    def _packed(self) -> PackedScoring:
        return PackedScoring(self)

    def _why_not_parts(self):
        return super()._why_not_parts() | self._packed.sharing.parts | start.why_no_head()

    def _say_what_trl_lacks(self) -> None:
        """Warn once of what TRL's own code does here; raise an error if the user has asked for ours."""
        for what, left, option, neutral in (
            (LOSS, "the loss", "loss", None),
            (ADVANTAGES, "the advantages", "group_by", None),
            (GROUPS, "the order of completions", "", None),
            (DYNAMIC_SAMPLING, "", "dynamic_sampling", 0),
            (OLD_LOGPROBS, "", "old_logprobs", "trainer"),
        ):
            if not (reason := why_not(self._trl_class, what)):
                continue
            if (value := getattr(self.args, option, neutral)) != neutral:
                raise ValueError(f"{option}={value!r} cannot be had: {reason}")
            if left:
                self._keep_trls(f"{left} to TRL: {reason}")

    # loss

    def _loss_spec(self) -> LossSpec:
        """The loss that the configuration asks for, by TRL's options or by ours.

        Raises:
            TypeError, ValueError: no LossSpec computes this loss.
        """
        raise NotImplementedError

    def _spec_of(self, inputs) -> LossSpec:
        """The loss of one micro-batch."""
        return self._loss_spec()

    def _spec_or_none(self, inputs) -> LossSpec | None:
        """What `_spec_of` returns; None, after a warning, if TRL's own `_compute_loss` must run."""
        if getattr(self.args, "loss", None):
            return self._spec_of(inputs)
        reason = self._why_trls_loss(inputs)
        if not reason:
            try:
                return self._spec_of(inputs)
            except (TypeError, ValueError) as error:  # an option has a value with which TRL's own code may train
                reason = str(error)
        self._keep_trls(f"the loss to TRL: {reason}")
        return None

    def _why_trls_loss(self, inputs) -> str:
        """Why no LossSpec computes TRL's loss of this micro-batch; empty if one does."""
        reason = options.why_trls_loss(self, self._options)
        theirs = [name for name in self._loss_helpers if overridden(self, name)]
        reason = reason or ", ".join(f"{type(self).__name__} has a {name} of its own" for name in theirs)
        return reason or next(filter(None, (why_unknown(self._trl_class, name) for name in self._loss_helpers)), "")

    def _score(
        self, model, inputs, batch_size: int | None = None, scored: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probs, entropies and auxiliary loss of the completions.

        Args:
            batch_size: how many rows run at once; None: all of them.
            scored: (rows, completion tokens), 1 for the tokens to score; None: all tokens that are not padding.
        """
        input_ids, attention_mask = tokens_of(inputs)
        rows = {} if batch_size is None else {"batch_size": batch_size}
        self._to_score = input_ids, scored  # not an argument, because a subclass may override with TRL's signature
        try:
            return self._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                inputs["completion_ids"].shape[1],
                **rows,
                compute_entropy=True,
                compute_aux_loss=self.aux_loss_enabled,
                **{name: inputs.get(name) for name in SCORING_INPUTS},
            )
        finally:
            self._to_score = None

    def _score_to_train(self, model, inputs, mask: Tensor, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor | None]:
        """`_score` the tokens under `mask`, in one forward, or in two if there are idle rows (`idle_rows`).

        Idle rows get no gradient and need log-probs only for the metrics. They run in a forward without gradient, which
        keeps no activations. It comes first, so that it does not add to the memory of the other rows' activations.
        """
        if not self._can_skip(spec):
            return self._score(model, inputs, scored=mask)
        idle = idle_rows(inputs["advantages"], mask, inputs["prompt_ids"])[:, None]
        padded = self._packed.takes({name: inputs.get(name) for name in SCORING_INPUTS}, *tokens_of(inputs)) is None
        # All ranks must run the same number of forwards: two if one of them has idle rows, one if any runs padded rows
        ranks_idle, ranks_padded = self.accelerator.reduce(
            torch.stack([idle.any(), torch.full_like(idle.any(), padded)]).long()
        )
        if ranks_idle == 0 or ranks_padded > 0:
            return self._score(model, inputs, scored=mask)
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            logprob, entropy, _ = self._score(model, inputs, scored=mask * idle)
        self._phases.count(tokens=-self._size(inputs), tokens_saved=-self._size(inputs))  # TRL runs these rows once
        torch.clear_autocast_cache()  # torch before pytorch#165068 would use casts that were made without gradient
        trained = self._score(model, inputs, scored=mask * ~idle)
        return logprob.where(idle, trained[0]), entropy.where(idle, trained[1]), None

    @staticmethod
    def _size(inputs) -> int:
        """The number of tokens of the padded rows."""
        return inputs["prompt_ids"].numel() + inputs["completion_ids"].numel()

    def _can_skip(self, spec: LossSpec) -> bool:
        """Whether idle rows get no gradient and can be left out of the training pass; the same on all ranks."""
        return (
            getattr(self.args, "skip_zero_advantage", True)
            and spec.zero_advantage_is_zero_gradient
            and not self.aux_loss_enabled
            and torch.is_grad_enabled()
            and not overridden(self, "_get_per_token_logps_and_entropies")  # an override gets all rows in one call
            and self._packed.ready()
        )

    @in_place_of_trls(TREES)
    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False,
        compute_aux_loss=False, **multimodal,
    ):  # fmt: skip
        old = self._rollouts.take_old()
        if old is not None:
            self._phases.ran(0, input_ids.numel(), on_tree=False)
            return old, None, None
        with self._phases.within(REST, SCORING):
            return self._scored(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, compute_aux_loss,
                **multimodal,
            )  # fmt: skip

    def _scored(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, compute_aux_loss,
        **multimodal,
    ):  # fmt: skip
        """Score on a token tree where possible, otherwise by TRL's code."""
        of_ids, scored = self._to_score or (None, None)
        scored = scored if of_ids is input_ids else None  # a subclass may call this for other rows, too
        if active():
            batch = self._packed.takes(multimodal, input_ids, attention_mask)
            of_batch = attention_mask[:, -logits_to_keep:] if scored is None else scored
            if self._packed.runs(batch, of_batch) and batch is not None:
                return self._packed.score(model, batch, of_batch, batch_size, compute_entropy, compute_aux_loss)
        if scored is not None:
            model = without_tokens(model, scored == 0)
        self._phases.ran(input_ids.numel(), input_ids.numel(), on_tree=False)
        padded: Any = super()._get_per_token_logps_and_entropies
        wanted = (batch_size, compute_entropy, compute_aux_loss)
        return padded(model, input_ids, attention_mask, logits_to_keep, *wanted, **multimodal)

    @in_place_of_trls(GROUPS)
    def _prepare_inputs(self, generation_batch):
        if self._packed.sharing.mode is False:
            return super()._prepare_inputs(generation_batch)
        with groups_stay_together(self._trl_class, self.num_generations or 1):
            return super()._prepare_inputs(generation_batch)

    def _sampler_logprobs(self, inputs, logprob: Tensor, mask: Tensor, random: bool) -> Tensor | None:
        """The sampler's log-probs in the form in which the loss compares them with the trainer's; None if it must not.

        The engine samples without dropout. Log-probs of a forward with dropout differ from the engine's by the noise of
        the dropout. This noise is not a mismatch between sampler and trainer: it must neither weigh sequences nor be
        logged as a mismatch. If the batch has log-probs of a forward without dropout, the mismatch is computed from
        them.

        Args:
            random: whether the trainer's forward drew random numbers.
        """
        if self._mode == "train":
            self._pending.noisy = random
        sampled = inputs.get("sampling_per_token_logps")
        if sampled is None or not self._rollouts.generated:
            return sampled
        trained = inputs.get("old_per_token_logps", logprob).detach()
        if QUIET in inputs:
            sampled = trained - (inputs[QUIET] - sampled)
        elif random:
            self._rollouts.say_uncorrected()
            return None
        if not self._takes_old_logprobs():
            self._pending.mismatch[self._mode].append(mismatch(trained, sampled, mask))
        return sampled

    def _accumulation(self) -> float:
        return self.current_gradient_accumulation_steps if self._mode == "train" else 1.0

    def _add_aux_loss(self, loss: Tensor, aux_loss: Tensor | None, scale: float) -> Tensor:
        if not self.aux_loss_enabled:
            return loss
        self._metrics[self._mode]["aux_loss"].append(self.accelerator.gather_for_metrics(aux_loss).mean().item())
        return loss + self.router_aux_loss_coef * aux_loss * scale

    def _metrics_of(self, stats: PolicyStats) -> dict[str, float]:
        """TRL's metrics of one micro-batch, from the statistics of all ranks."""
        raise NotImplementedError

    def flush_metrics(self) -> None:
        """Move the pending statistics into `_metrics`, with two collectives for all micro-batches together."""
        for mode, pending in self._pending.stats.items():
            if not pending:
                continue
            table = PolicyStats(torch.stack([stats.values for stats in pending], dim=1))
            if self.accelerator.num_processes > 1:
                table = table.reduce()
            for values in table.values.cpu().unbind(1):
                stats = PolicyStats(values)
                for name, value in (self._metrics_of(stats) | ratio_metrics(stats)).items():
                    self._metrics[mode][name].append(value)
            pending.clear()
            if self._rollouts.mode != "generate":
                self._flush_mismatch(mode)

    def _flush_mismatch(self, mode: str) -> None:
        """Log the mismatch. Every rank contributes a row, with 0 tokens if it compared none: the engine may have
        generated on some ranks only."""
        compared = self._pending.mismatch[mode]
        none = torch.zeros(len(MISMATCH) + 1, device=self.accelerator.device)
        rows = self.accelerator.gather(merged(torch.stack(compared or [none]))[None])
        for name, value in mismatch_metrics(rows).items():
            self._metrics[mode][name].append(value)
        compared.clear()

    def log(self, logs, *args, **kwargs):
        self.flush_metrics()
        return super().log(logs, *args, **kwargs)

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if overridden(self, "log"):
            self.flush_metrics()  # the subclass's `log` may read `_metrics` before it calls ours, or never call it
        return loss

    # generation

    def _generate(self, *args, **kwargs):
        result = super()._generate(*args, **kwargs)
        if self._rollouts.generated and self._takes_old_logprobs():
            self._rollouts.keep_as_old(self._sampled_logprobs(result))
        return result

    def _sampled_logprobs(self, generated: tuple) -> list[list[float]]:
        """The sampler's log-probs of each completion, from what `_generate` returned; 0 at tokens that tools wrote."""
        raise NotImplementedError

    def _wants_quiet_logprobs(self, batch: dict) -> bool:
        """Whether the loss needs log-probs of a forward without dropout to compute the rollout's mismatch."""
        return False

    def _quiet_logprobs(self, batch: dict) -> Tensor:
        """Log-probs (B, C) of the completions by the model in eval mode, which is what the engine samples from."""
        if active():
            self._packed.prepare()  # before eval_mode: it looks at the adapters, and needs the model to itself for it
        self._phases.count(tokens=-self._size(batch), tokens_saved=-self._size(batch))  # TRL has no such forward
        with eval_mode(self.model), self.accelerator.autocast():
            return self._score(self.model, batch, self.args.per_device_train_batch_size)[0]

    def _takes_old_logprobs(self) -> bool:
        """Whether TRL scores the completions by the policy now, and the rollout's log-probs are to be used instead."""
        return getattr(self.args, "old_logprobs", "trainer") == "rollout"

    def _complete(self, batch, scored):
        if self._wants_quiet_logprobs(batch):
            batch[QUIET] = self._quiet_logprobs(batch)


def idle_rows(advantages: Tensor, mask: Tensor, prompts: Tensor) -> Tensor:
    """(B,) bool: the rows whose prompt has no row with an advantage other than 0 at a token under `mask`.

    A row with advantage 0 is not idle if another row of its prompt has an advantage: on their common tree it costs
    little more than its completion, and in the other forward its prompt would be computed again.
    """
    trains = ((advantages.view(len(mask), -1) != 0) & (mask != 0)).any(1)
    _, group = prompts.unique(dim=0, return_inverse=True)
    of_group = torch.zeros_like(group).index_add_(0, group, trains.long())
    return (of_group[group] == 0) & (mask != 0).any(1)


def without_tokens(model, dead: Tensor):
    """A function that calls `model` with labels that ignore the `dead` tokens, so that these skip the LM head.

    dead: (B, C) bool, for the completion tokens.
    """

    def call(*args, labels=None, **kwargs):
        if labels is None:  # TRL before 1.15 projects every token
            return model(*args, **kwargs)
        labels = labels.clone()
        labels[:, -dead.shape[1] :].masked_fill_(dead, -100)
        return model(*args, labels=labels, **kwargs)

    return call
