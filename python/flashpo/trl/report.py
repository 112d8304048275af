"""The report at the end of `flashpo run`: which parts of FlashPO ran in which trainer, and how the time was spent.

While a script runs, the outermost call of `train`, `evaluate` or `predict` of each trainer records which operators ran
during the call, and keeps the trainer's `_phases`.
"""

import functools
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from flashpo import _fallbacks
from flashpo._op import stats
from flashpo.packing.images import GENERATED, SCORED, shared
from flashpo.trl import start
from flashpo.trl._phases import LABELS, Phases
from flashpo.trl.experimental import EXPERIMENTAL

# part of FlashPO -> prefixes of the operators that show that it ran
PARTS = {
    "rollout engine": ("decode_", "sample_rows", "kv_append", "recurrence_step"),
    "token trees": ("tree_",),
    "LM head": ("linear_logprob", "linear_divergence"),
    "log-probs of whole logits": ("selective_log_softmax",),
    "loss": ("policy_loss", "value_loss", "preference_loss", "kto_loss"),
    "advantages": ("group_advantages", "gae_"),
}
IMAGES = {GENERATED: "generation", SCORED: "token trees"}
_TREES, _HEADS = ("token trees",), ("token trees", "LM head")
_POLICY = ("rollout engine", "token trees", "LM head", "loss", "advantages")
OURS = {  # the parts that should run in each of our trainers
    **dict.fromkeys(("SFTTrainer", "DPOTrainer", "KTOTrainer"), _HEADS),
    "RewardTrainer": _TREES,
    **dict.fromkeys(("GRPOTrainer", "RLOOTrainer", "PPOTrainer"), _POLICY),
    "DistillationTrainer": ("rollout engine", *_HEADS),
}
METHODS = ("train", "evaluate", "predict")


@dataclass
class Run:
    """What was recorded of all trainers of one class."""

    ops: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    steps: int = 0
    phases: list[Phases] = field(default_factory=list)  # only FlashPO's trainers have them
    why_not: dict[str, str] = field(default_factory=dict)  # part -> why it did not run, as the trainers say
    gpu_bytes: int = 0

    @property
    def spent(self) -> Counter[str]:
        return sum((phases.read() for phases in self.phases), Counter())

    @property
    def counts(self) -> Counter[str]:
        return sum((phases.counts for phases in self.phases), Counter())


ran: dict[type, Run] = {}
after: list[Callable[[], None]] = []  # called whenever an outermost call has ended
_inside = False


def watch_trainers() -> None:
    """From now on record into `ran`. A second call does nothing."""
    for name in METHODS:
        method = getattr(transformers.Trainer, name)
        if not hasattr(method, "watched"):
            setattr(transformers.Trainer, name, _watched(name, method))


def _watched(name: str, method: Any) -> Any:
    @functools.wraps(method)
    def call(self, *args, **kwargs):
        global _inside
        if _inside:
            return method(self, *args, **kwargs)
        if name == "train" and not _is_ours(self):  # ours call it themselves, before they start their clock
            start.before_training(self)
        operators, step, begin, _inside = _calls(), self.state.global_step, time.perf_counter(), True
        try:
            return method(self, *args, **kwargs)
        finally:
            _inside = False
            run = ran.setdefault(type(self), Run())
            run.ops += _calls() - operators
            run.seconds += time.perf_counter() - begin
            run.steps += self.state.global_step - step
            if _is_ours(self):
                run.why_not |= self._why_not_parts()
                if self._phases not in run.phases:
                    run.phases.append(self._phases)
            if torch.cuda.is_available() and torch.cuda.is_initialized():
                run.gpu_bytes = torch.cuda.max_memory_allocated()
            for act in after:
                act()

    call.watched = True  # type: ignore[attr-defined]
    return call


def _is_ours(trainer: Any) -> bool:
    """Whether it is a trainer of FlashPO. Not by isinstance: TRL is still being imported when this module is, so the
    class cannot be imported here."""
    return hasattr(trainer, "_why_not_parts")


def _calls() -> Counter[str]:
    return Counter({op: sum(used.values()) for op, used in stats().items()}) + shared


def lines(finished: bool = True) -> list[str]:
    """A table for each class of trainers that ran, and the fallbacks.

    finished: False if the script failed or was stopped. The table then does not say why a part did not run.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized() and finished:
        torch.cuda.synchronize()  # so that the events of the last phases can be read
    found = [line for cls, run in ran.items() for line in _table(cls, run, finished)]
    if _fallbacks.said:
        found += ["left to TRL or transformers:", *(f"  {sentence}" for sentence in _fallbacks.said)]
    return found


def as_dict() -> dict[str, Any]:
    """The numbers of `lines` as a dict that can be written as JSON."""
    return {
        "trainers": [
            {
                "class": f"{cls.__module__}.{cls.__qualname__}",
                "by_flashpo": _parts(run),
                "seconds": run.seconds,
                "steps": run.steps,
                "phases": {phase: run.spent[phase] for phase in LABELS if run.spent[phase]},
                "tokens": dict(run.counts),
                "kv_cache_bytes": max((phases.cache_bytes for phases in run.phases), default=0),
                "peak_gpu_bytes": run.gpu_bytes or None,
            }
            for cls, run in ran.items()
        ],
        "peak_process_bytes": _process_bytes(),
        "left_to_other_code": list(_fallbacks.said),
        "operators": stats(),
    }


def _table(cls: type, run: Run, finished: bool) -> list[str]:
    name = f"{cls.__name__} ({cls.__module__})"
    rows = [f"{name}: {_said(cls, run, finished)}"]
    steps = f"{run.steps} steps in " if run.steps else ""
    rows.append(f"  {steps}{run.seconds:,.2f} s; {_memory(run)}")
    spent, counts = run.spent, run.counts
    total = sum(spent.values())
    for phase, label in LABELS.items():
        if spent[phase]:
            row = f"  {label:28s}{spent[phase]:10,.2f} s{spent[phase] / total:6.0%}"
            rows.append(f"{row}   {note}" if (note := _of_phase(phase, spent[phase], counts)) else row)
    if any(phases.on_trees for phases in run.phases):
        tokens, saved = counts["tokens"], counts["tokens_saved"]
        share = f" ({saved / tokens:.0%} saved)" if tokens else ""
        rows.append(f"  tokens scored and trained on: {tokens - saved:,} computed of {tokens:,} that TRL would{share}")
    return rows


def _of_phase(phase: str, seconds: float, counts: Counter[str]) -> str:
    if phase != "generation" or not counts["sampled"]:
        return ""
    sampled, prompts, saved = (counts[name] for name in ("sampled", "prefill", "prefill_saved"))
    return (
        f"{sampled:,} tokens, {sampled / seconds:,.0f} a second; "
        f"prefill: {prompts - saved:,} of {prompts:,} prompt tokens ({saved / max(prompts, 1):.0%} saved)"
    )


def _memory(run: Run) -> str:
    peak = f"{_size(run.gpu_bytes)} on the GPU" if run.gpu_bytes else f"{_size(_process_bytes())} of the process"
    cache = max((phases.cache_bytes for phases in run.phases), default=0)
    return f"peak memory {peak}" + (f", KV cache {_size(cache)}" if cache else "")


def _process_bytes() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _parts(run: Run) -> list[str]:
    found = [part for part, begins in PARTS.items() if any(op.startswith(begins) for op in run.ops)]
    if run.phases and not any(phases.on_trees for phases in run.phases):  # tree_attention ran only in prefills
        return [part for part in found if part != "token trees"]
    return found


def _said(cls: type, run: Run, finished: bool) -> str:
    found = _parts(run)
    by_us = f"{', '.join(found)} by FlashPO" if found else "nothing by FlashPO"
    if shown := [part for name, part in IMAGES.items() if name in run.ops]:
        by_us += f"; equal images once in {' and in '.join(shown)}"
    reason = why_not_more(cls, found, run.why_not) if finished else ""
    return f"{by_us}; {reason}" if reason else by_us


def why_not_more(cls: type, found: list[str], reasons: dict[str, str]) -> str:
    """Why no more parts of FlashPO than `found` run in a trainer of this class; empty if nothing is missing.

    reasons: part -> reason, as far as the trainer knows them.
    """
    for base in cls.__mro__:
        package, name = base.__module__.split(".")[0], base.__name__
        if package == "flashpo" and name in OURS:
            missing = [part for part in OURS[name] if part not in found]
            return "; ".join(f"not {part}: {reasons.get(part) or 'see below'}" for part in missing)
        if base.__module__.startswith("trl.experimental."):
            known = EXPERIMENTAL.get(base.__module__.split(".")[2])
            return known.rest if known else "FlashPO does not know this trainer of TRL"
        if package == "trl" and name in OURS:
            return f"it is TRL's own {name}, whose scoring alone is replaced: take flashpo.trl.{name} for the rest"
    return "FlashPO does not know this trainer"
