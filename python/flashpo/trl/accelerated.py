"""What the accelerated trainers have in common. Each is TRL's own class with some methods overridden.

Each has a module of its own, with its configuration: a TRL that lacks a trainer takes nothing from the others.
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
    """Decorates a method that does `what` in the place of TRL's, which runs where TRL does not meet the needs of it."""

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
    """Whether a method is neither ours nor of the TRL class: a subclass or the instance has one of its own."""
    if name in vars(trainer):
        return True
    owner = next(cls for cls in type(trainer).__mro__ if name in vars(cls))
    return owner not in trainer._trl_class.__mro__ and owner.__module__.partition(".")[0] != "flashpo"


class Accelerated(transformers.Trainer):
    """Opens the patch around the methods in which a TRL trainer runs its model on labels."""

    _trl_class: type

    @functools.cached_property  # a trainer may run before its constructor has, or without it
    def _phases(self) -> Phases:
        return Phases(on_cuda=self.accelerator.device.type == "cuda")

    def _why_not_parts(self) -> dict[str, str]:
        """Parts of FlashPO that a trainer of this class has, and why one of them does not run here, by what is known
        now; empty where it runs."""
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
        """Whether models are on their devices when the trainer is made, not loaded and sharded later."""
        return not (self.is_fsdp_enabled or self.is_deepspeed_enabled)


class Packed(Accelerated):
    """Its models run on token trees, see `flashpo.trl.tree_head`; `share_prefix` of its arguments says whether."""

    def __init__(self, *args, **kwargs):
        with heads_take_trees(self, self._trl_class) as self._heads:
            super().__init__(*args, **kwargs)
        if reason := why_not(self._trl_class, TREES):
            self._heads.sharing.allowed(reason)
        if self._has_whole_models:
            self._heads.try_out()

    def _why_not_parts(self):
        return super()._why_not_parts() | self._heads.sharing.parts | start.why_no_head()

    def compute_loss(self, *args, **kwargs):
        self._heads.try_out()
        return super().compute_loss(*args, **kwargs)


class PackedWithReference(Packed):
    """For trainers that can score the reference model for a whole dataset at once (`precompute_ref_log_probs`)."""

    def compute_ref_log_probs(self, *args, **kwargs):
        self._heads.try_out()
        with patched(), self._phases.of(SCORING):
            return super().compute_ref_log_probs(*args, **kwargs)  # type: ignore[misc]  # of the TRL class beside it
