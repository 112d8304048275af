"""What all accelerated trainers share. Each of them is a subclass of TRL's trainer that overrides some methods.

Each trainer has its own module, together with its configuration, so that the others work with a TRL version that lacks
it.
"""

import functools
from collections.abc import Callable
from typing import TypeVar, cast

import torch
import transformers

from flashpo._hosts.trl import TREES, why_not
from flashpo.trl import start
from flashpo.trl._phases import EVALUATION, REST, SCORING, TRAINING, Phases
from flashpo.trl.patch import patched
from flashpo.trl.tree_head import heads_take_trees

Method = TypeVar("Method", bound=Callable)


def in_place_of_trls(what: str) -> Callable[[Method], Method]:
    """Decorator of a method that does `what` in place of TRL's method of the same name.

    TRL's method runs instead if the installed TRL lacks something that `what` needs (`why_not`).
    """

    def decorate(method: Method) -> Method:
        return cast(Method, _InPlaceOfTrls(what, method))

    return decorate


class _InPlaceOfTrls:
    def __init__(self, what: str, method: Callable):
        self.what, self.method = what, method

    def __set_name__(self, owner: type, name: str) -> None:
        method, what = self.method, self.what

        @functools.wraps(method)
        def call(self, *args, **kwargs):
            if why_not(self._trl_class, what):
                return getattr(super(owner, self), name)(*args, **kwargs)
            return method(self, *args, **kwargs)

        setattr(owner, name, call)


def overridden(trainer, name: str) -> bool:
    """Whether a user's subclass, or the instance itself, has overridden a method of the trainer."""
    if name in vars(trainer):
        return True
    owner = next(cls for cls in type(trainer).__mro__ if name in vars(cls))
    return owner not in trainer._trl_class.__mro__ and owner.__module__.partition(".")[0] != "flashpo"


class Accelerated(transformers.Trainer):
    """Base of all: activates the patch in the methods in which a TRL trainer runs its model on labels, and measures how
    the time is spent (`_phases`)."""

    _trl_class: type

    @functools.cached_property  # not in a constructor: methods may run before it has finished, or without it
    def _phases(self) -> Phases:
        return Phases(on_cuda=self.accelerator.device.type == "cuda")

    def _why_not_parts(self) -> dict[str, str]:
        """The parts of FlashPO that this class of trainers has, each with the reason why it does not run here, as far
        as that is known now. The reason is empty for a part that runs."""
        return {}

    def train(self, *args, **kwargs):
        start.before_training(self)
        with self._phases.of(REST):
            return super().train(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        with self._phases.of(EVALUATION):
            return super().evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs):
        with self._phases.of(EVALUATION):
            return super().predict(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        self._phases.step_begins(self.state.global_step)
        with patched(), self._phases.of(TRAINING):
            return super().training_step(*args, **kwargs)

    def _prepare_inputs(self, *args, **kwargs):
        with self._phases.within(TRAINING, REST):
            return super()._prepare_inputs(*args, **kwargs)

    def prediction_step(self, *args, **kwargs):
        with patched():
            return super().prediction_step(*args, **kwargs)

    def compute_loss(self, *args, **kwargs):
        with patched():
            return super().compute_loss(*args, **kwargs)

    def log(self, logs, *args, **kwargs):
        if cast(torch.nn.Module, self.model).training:
            logs.update(self._phases.metrics(self.state.global_step))
        return super().log(logs, *args, **kwargs)

    @property
    def _has_whole_models(self) -> bool:
        """Whether models are on their devices when the constructor ends; FSDP and DeepSpeed place them later."""
        return not (self.is_fsdp_enabled or self.is_deepspeed_enabled)


class Packed(Accelerated):
    """A trainer whose models run on token trees through TRL's fused head (`flashpo.trl.tree_head`).

    `share_prefix` of its arguments says whether they do.
    """

    def __init__(self, *args, **kwargs):
        with heads_take_trees(self, self._trl_class) as self._heads:
            super().__init__(*args, **kwargs)
        if reason := why_not(self._trl_class, TREES):
            self._heads.sharing.allowed(reason)
        if self._has_whole_models:
            self._heads.try_out()

    def _why_not_parts(self):
        return super()._why_not_parts() | self._heads.sharing.parts | start.head_part()

    def compute_loss(self, *args, **kwargs):
        self._heads.try_out()
        return super().compute_loss(*args, **kwargs)


class PackedWithReference(Packed):
    """A Packed trainer that can score the whole dataset by the reference model first (`precompute_ref_log_probs`)."""

    def compute_ref_log_probs(self, *args, **kwargs):
        self._heads.try_out()
        with patched(), self._phases.of(SCORING):
            return super().compute_ref_log_probs(*args, **kwargs)  # type: ignore[misc]  # a method of the TRL class
