"""Scoring for GRPO, RLOO and PPO: log-probs and entropies of completions, on token trees where that is possible.

Rows that get no gradient are scored without one, and tokens outside of the loss skip the LM head.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from flashpo._hosts.trl import GROUPS, TREES, disable_gradient_checkpointing
from flashpo.ops.loss_spec import LossSpec
from flashpo.trl import start
from flashpo.trl._phases import REST, SCORING
from flashpo.trl.accelerated import in_place_of_trls, overridden
from flashpo.trl.advantages import GroupComparing
from flashpo.trl.images import SCORING_INPUTS
from flashpo.trl.packed import PackedScoring, Scores, groups_stay_together, tokens_of
from flashpo.trl.patch import active


class PolicyScoring(GroupComparing):
    """The part of a policy trainer that scores completions; to be combined with a TRL class."""

    # while `_score` runs: the token ids that it was called with, and which tokens are scored
    _to_score: tuple[Tensor, Tensor | None] | None = None

    @functools.cached_property
    def _packed(self) -> PackedScoring:
        return PackedScoring(self)

    def _why_not_parts(self):
        return super()._why_not_parts() | self._packed.sharing.parts | start.head_part()

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
        old, self._pending.old = self._pending.old, None
        if old is not None:
            self._phases.ran(0, input_ids.numel(), on_tree=False)
            return old, None, None
        with self._phases.within(REST, SCORING):
            scores = self._scored(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, compute_aux_loss,
                **multimodal,
            )  # fmt: skip
        return scores.logprob, scores.entropy, scores.aux_loss

    def _scored(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, compute_aux_loss,
        **multimodal,
    ) -> Scores:  # fmt: skip
        """Score on a token tree where possible, otherwise by TRL's code."""
        of_ids, scored = self._to_score or (None, None)
        scored = scored if of_ids is input_ids else None  # a subclass may call this for other rows, too
        if active():
            batch = self._packed.takes(multimodal, input_ids, attention_mask)
            of_batch = attention_mask[:, -logits_to_keep:] if scored is None else scored
            if (batch := self._packed.agreed(batch, of_batch)) is not None:
                return self._packed.score(model, batch, of_batch, batch_size, compute_entropy, compute_aux_loss)
        if scored is not None:
            model = without_tokens(model, scored == 0)
        self._phases.ran(input_ids.numel(), input_ids.numel(), on_tree=False)
        padded: Any = super()._get_per_token_logps_and_entropies
        wanted = (batch_size, compute_entropy, compute_aux_loss)
        return Scores(*padded(model, input_ids, attention_mask, logits_to_keep, *wanted, **multimodal))

    @in_place_of_trls(GROUPS)
    def _prepare_inputs(self, generation_batch):
        if self._packed.sharing.mode is False:
            return super()._prepare_inputs(generation_batch)
        with groups_stay_together(self._trl_class, self.num_generations or 1):
            return super()._prepare_inputs(generation_batch)


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
