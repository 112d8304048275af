"""What all trainers that sample completions share: `flashpo.rollout` generates in place of TRL where it can."""

import contextlib
import functools
from typing import Any

import torch

from flashpo._hosts.trl import ROLLOUTS, why_not
from flashpo.packing.attention import uninstalled
from flashpo.trl._pending import Pending
from flashpo.trl._phases import GENERATION
from flashpo.trl.accelerated import Accelerated
from flashpo.trl.patch import active
from flashpo.trl.processing import DistinctPrompts
from flashpo.trl.rollout import TrainerRollouts


class Sampling(Accelerated):
    """Base class to combine with a TRL class that generates by `_generate`, which calls `_generate_single_turn` for
    each turn."""

    model: Any

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if (reason := why_not(self._trl_class, ROLLOUTS)) and self._rollouts.mode != "generate":
            self._rollouts.refuse(reason)

    # The properties below are made when first needed: methods may run before the constructor has finished, or without
    # it.

    @functools.cached_property
    def _pending(self) -> Pending:
        return Pending()

    @functools.cached_property
    def _rollouts(self) -> TrainerRollouts:
        return TrainerRollouts(self)

    @functools.cached_property
    def _distinct_prompts(self) -> DistinctPrompts:
        return DistinctPrompts()

    def _why_not_parts(self):
        return super()._why_not_parts() | {"rollout engine": self._rollouts.why_not()}

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _generate_and_score_completions(self, inputs):
        with self._distinct_prompts.processed_once(self) if active() else contextlib.nullcontext():
            return super()._generate_and_score_completions(inputs)  # type: ignore[misc]  # a method of the TRL class

    def _generate(self, *args, **kwargs):
        self._rollouts.forget_turns()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._phases.of(GENERATION))
            if active():
                stack.enter_context(self._rollouts.session())  # so that turns of a conversation share one cache
            if isinstance(self.model, torch.nn.Module):
                stack.enter_context(uninstalled(self.model))  # continuous batching looks at the attention's name
            return super()._generate(*args, **kwargs)  # type: ignore[misc]  # a method of the TRL class
