"""Where a trainer's time and tokens go: what it logs as `flashpo/...`, and the table at the end of `flashpo run`.

At every moment of a training one phase has the clock: a phase within another stops the outer one, so that the seconds
of all phases add up to the whole. On a CPU the clock is the host's. On CUDA a change of phase records an event in the
stream, and times are read once the device has passed it, so that nothing waits: a phase has what the device did in it,
not what the host has queued.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

from flashpo import _op

GENERATION, SCORING, TRAINING, HEAD, REWARDS = "generation", "scoring", "training", "head", "rewards"
COMPILING, EVALUATION, REST = "compiling", "evaluation", "rest"
LABELS = {  # in the order of the table
    GENERATION: "generation",
    SCORING: "old and reference scoring",
    TRAINING: "training pass",
    HEAD: "LM head",
    REWARDS: "rewards",
    COMPILING: "compiling layers",
    EVALUATION: "evaluation",
    REST: "rest",
}
HEADS = ("linear_logprob", "linear_divergence", "selective_log_softmax")  # operators of the head begin so
COUNTS = ("tokens", "tokens_saved", "prefill", "prefill_saved", "sampled")


class Phases:
    """Of one trainer.

    seconds: by phase. counts: of training alone. tokens: that TRL would run through the models to score and to train;
    tokens_saved: those of them that did not have to be run. prefill and prefill_saved: the same of the prompts of the
    rollout engine. sampled: tokens that the engine has sampled.
    """

    def __init__(self, on_cuda: bool = False):
        self.seconds: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.cache_bytes = 0  # the largest KV cache
        self.on_trees = False  # whether a token tree has run
        self._mark: Callable[[], Any] = _event if on_cuda else time.perf_counter
        self._now: str | None = None
        self._since: Any = None
        self._passing: list[tuple[str, Any, Any]] = []  # phases whose events the device may not have passed
        # the step of the last log, and the seconds and counts of then
        self._logged: tuple[int, Counter[str], Counter[str]] | None = None
        self._stopped = False

    @contextlib.contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """`phase` for the length of the block. Within an evaluation, which is one phase, nothing else is told apart."""
        global _running
        before, runner = self._now, _running
        if self._stopped or before == EVALUATION:
            yield
            return
        self._switch(phase)
        _running = self
        try:
            yield
        finally:
            self._switch(before)
            _running = runner

    def within(self, outer: str, phase: str) -> contextlib.AbstractContextManager[None]:
        """`phase` if the block stands directly in `outer`, else what it stands in."""
        return self.of(phase) if self._now == outer else contextlib.nullcontext()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Within it nothing is counted, and no phase begins: for what is done twice, or for a comparison."""
        before, self._stopped = self._stopped, True
        try:
            yield
        finally:
            self._stopped = before

    def step_begins(self, step: int) -> None:
        """Of training: the first one is where the time of the first log begins, 0 or that of a checkpoint."""
        if self._logged is None:
            self._logged = step, Counter(), Counter()

    def count(self, **numbers: int) -> None:
        """Add to `counts`, by their names."""
        if not self._stopped and self._now != EVALUATION:
            self.counts.update(numbers)

    def ran(self, tokens: int, of: int, on_tree: bool = True) -> None:
        """A forward has run so many tokens in the place of `of` that TRL would run."""
        if not self._stopped and self._now != EVALUATION:
            self.on_trees |= on_tree
            self.counts.update(tokens=of, tokens_saved=of - tokens)

    def reference_begins(self) -> str | None:
        """Of a forward in a training pass: without gradient it is the reference's. Gives what `ends` is to be told."""
        before = self._now
        if before == TRAINING and not self._stopped and not torch.is_grad_enabled():
            self._switch(SCORING)
        return before

    def reference_ends(self, before: str | None) -> None:
        if before != self._now:
            self._switch(before)

    def read(self) -> Counter[str]:
        """`seconds`, with all that the device has passed by now."""
        with contextlib.suppress(RuntimeError):  # of a device that has failed: what it passed before stays known
            while self._passing and self._passing[0][2].query():
                phase, begin, end = self._passing[0]
                self.seconds[phase] += begin.elapsed_time(end) / 1000
                del self._passing[0]
        return self.seconds

    def metrics(self, step: int) -> dict[str, float]:
        """For the log of a training: seconds of an optimizer step since the last log, and the share of tokens saved."""
        if self._logged is None or step <= self._logged[0]:
            return {}
        last, seconds_then, counts_then = self._logged
        self._switch(self._now)
        steps, seconds, counts = step - last, self.read().copy(), self.counts.copy()
        self._logged = step, seconds, counts
        spent = {phase: seconds[phase] - seconds_then[phase] for phase in LABELS if phase != EVALUATION}
        metrics = {f"flashpo/seconds/{phase}": x / steps for phase, x in spent.items() if x > 0}
        tokens, saved = (counts[name] - counts_then[name] for name in ("tokens", "tokens_saved"))
        return metrics | ({"flashpo/tokens_saved": saved / tokens} if tokens and self.on_trees else {})

    def _switch(self, phase: str | None) -> None:
        mark = self._mark()
        if mark is None:  # of a CUDA graph that is being captured, in which no time passes
            return
        if self._now is not None and isinstance(mark, float):
            self.seconds[self._now] += mark - self._since
        elif self._now is not None:
            self._passing.append((self._now, self._since, mark))
        self._now, self._since = phase, mark


_running: Phases | None = None  # not of a thread: CUDA's backward runs in threads of torch


def _event() -> Any:
    if torch.cuda.is_current_stream_capturing():
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _head(kernel: Callable, *args: Any) -> Any:
    """Around an operator of the head, forward and backward."""
    phases = _running
    if phases is None or phases._now not in (SCORING, TRAINING):
        return kernel(*args)
    with phases.of(HEAD):
        return kernel(*args)


for _name, _operator in _op.OPS.items():
    if _name.startswith(HEADS):
        _operator.around = _head
