"""What of FlashPO ran in which trainer: the last lines of `flashpo run`.

While a script runs under it, the outermost `train`, `evaluate` or `predict` of a trainer notes the operators that ran
meanwhile.
"""

import functools
from collections import Counter
from typing import Any

import transformers

from flashpo._op import stats
from flashpo.packing.images import GENERATED, SCORED, shared
from flashpo.trl.experimental import EXPERIMENTAL

# what an operator stands for, by how its name begins
PARTS = {
    "generation": ("decode_", "sample_rows", "kv_append"),
    "token trees": ("tree_",),
    "LM head": ("linear_logprob", "linear_divergence"),
    "log-probs of whole logits": ("selective_log_softmax",),
    "loss": ("policy_loss", "value_loss", "preference_loss", "kto_loss"),
    "advantages": ("group_advantages", "gae_"),
}
IMAGES = {GENERATED: "generation", SCORED: "token trees"}
_TREES, _HEADS = ("token trees",), ("token trees", "LM head")
_POLICY = ("generation", "token trees", "LM head", "loss", "advantages")
OURS = {  # what should run in a trainer of ours
    **dict.fromkeys(("SFTTrainer", "DPOTrainer", "KTOTrainer"), _HEADS),
    "RewardTrainer": _TREES,
    **dict.fromkeys(("GRPOTrainer", "RLOOTrainer", "PPOTrainer"), _POLICY),
    "DistillationTrainer": ("generation", *_HEADS),
}
METHODS = ("train", "evaluate", "predict")
ran: dict[type, Counter[str]] = {}  # operators by the class of the trainer
_inside = False


def watch_trainers() -> None:
    """From now on `ran` is filled. A second call does nothing."""
    for name in METHODS:
        method = getattr(transformers.Trainer, name)
        if not hasattr(method, "watched"):
            setattr(transformers.Trainer, name, _watched(method))


def _watched(method: Any) -> Any:
    @functools.wraps(method)
    def call(self, *args, **kwargs):
        global _inside
        if _inside:
            return method(self, *args, **kwargs)
        before, _inside = _calls(), True
        try:
            return method(self, *args, **kwargs)
        finally:
            _inside = False
            ran[type(self)] = ran.get(type(self), Counter()) + (_calls() - before)

    call.watched = True  # type: ignore[attr-defined]
    return call


def _calls() -> Counter[str]:
    return Counter({op: sum(used.values()) for op, used in stats().items()}) + shared


def lines() -> list[str]:
    """One for each class of trainers that ran."""
    return [f"flashpo: {_name(cls)}: {_said(cls, ops)}" for cls, ops in ran.items()]


def _name(cls: type) -> str:
    return f"{cls.__name__} ({cls.__module__})"


def _said(cls: type, ops: Counter[str]) -> str:
    found = [part for part, begins in PARTS.items() if any(op.startswith(begins) for op in ops)]
    by_us = f"{', '.join(found)} by FlashPO" if found else "nothing by FlashPO"
    if shown := [part for name, part in IMAGES.items() if name in ops]:
        by_us += f"; equal images once in {' and in '.join(shown)}"
    return f"{by_us}; {reason}" if (reason := _why_not_more(cls, found)) else by_us


def _why_not_more(cls: type, found: list[str]) -> str:
    for base in cls.__mro__:
        package, name = base.__module__.split(".")[0], base.__name__
        if package == "flashpo" and name in OURS:
            missing = [part for part in OURS[name] if part not in found]
            return f"not {', '.join(missing)}: see the warnings above" if missing else ""
        if base.__module__.startswith("trl.experimental."):
            known = EXPERIMENTAL.get(base.__module__.split(".")[2])
            return known.rest if known else "FlashPO does not know this trainer of TRL"
        if package == "trl" and name in OURS:
            return f"it is TRL's own {name}, whose scoring alone is replaced: take flashpo.trl.{name} for the rest"
    return "FlashPO does not know this trainer"
