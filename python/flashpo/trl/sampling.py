"""What the trainers share that sample completions: `flashpo.rollout` answers TRL's generation where it can."""

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
from flashpo.trl.rollout import TrainerRollouts


class Sampling(Accelerated):
    """Beside a TRL class that generates by `_generate`, one turn after the other by `_generate_single_turn`."""

    model: Any

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if (reason := why_not(self._trl_class, ROLLOUTS)) and self._rollouts.mode != "generate":
            self._rollouts.refuse(reason)

    # made when they are first needed: a trainer may run before its constructor has, or without it

    @functools.cached_property
    def _pending(self) -> Pending:
        return Pending()

    @functools.cached_property
    def _rollouts(self) -> TrainerRollouts:
        return TrainerRollouts(self)

    def _why_not_parts(self):
        return super()._why_not_parts() | {"rollout engine": self._rollouts.why_not()}

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _generate(self, *args, **kwargs):
        self._rollouts.forget_turns()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._phases.of(GENERATION))
            if active():
                stack.enter_context(self._rollouts.session())  # for the turns of a conversation with tools
            if isinstance(self.model, torch.nn.Module):
                stack.enter_context(uninstalled(self.model))  # continuous batching knows attentions by name
            return super()._generate(*args, **kwargs)  # type: ignore[misc]  # of the TRL class beside it
