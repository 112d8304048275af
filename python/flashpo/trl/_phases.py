"""How a trainer spends its time and tokens: the metrics `flashpo/...`, and the table at the end of `flashpo run`.

At each moment of a training exactly one phase is timed: an inner phase pauses the outer one, so that the seconds of all
phases add up to the whole. On a CPU the host's clock is used. On CUDA each change of phase records an event in the
stream, and the events are read after the device has passed them, so that nothing waits for the device. A phase thus
has the time that the device spent on it, not the time that the host took to queue its kernels.
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
HEADS = ("linear_logprob", "linear_divergence", "selective_log_softmax")  # prefixes of the head's operators
COUNTS = ("tokens", "tokens_saved", "prefill", "prefill_saved", "sampled")


class Phases:
    """Times and counts of one trainer.

    seconds: by phase.
    counts: only of training, not of evaluation. `tokens`: how many tokens TRL would run through the models to score and
        to train; `tokens_saved`: how many of these did not have to run; `prefill`, `prefill_saved`: the same for the
        prompts of the rollout engine; `sampled`: how many tokens the engine has sampled.
    """

    def __init__(self, on_cuda: bool = False):
        self.seconds: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.cache_bytes = 0  # the largest KV cache
        self.on_trees = False  # whether a token tree has run
        self._mark: Callable[[], Any] = _event if on_cuda else time.perf_counter
        self._now: str | None = None
        self._since: Any = None
        self._passing: list[tuple[str, Any, Any]] = []  # phases whose events the device may not have passed yet
        # the step of the last log, with the seconds and counts at that time
        self._logged: tuple[int, Counter[str], Counter[str]] | None = None
        self._stopped = False

    @contextlib.contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Time the block as `phase`. An evaluation is a single phase: within it other phases are not distinguished."""
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
        """Time the block as `phase` if the current phase is `outer`; otherwise the current phase goes on."""
        return self.of(phase) if self._now == outer else contextlib.nullcontext()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Within the block nothing is counted and no phase begins. For work that is done only to compare."""
        before, self._stopped = self._stopped, True
        try:
            yield
        finally:
            self._stopped = before

    def step_begins(self, step: int) -> None:
        """Called at each training step. The first call sets where the first log's time begins: at step 0, or at the
        step of a checkpoint."""
        if self._logged is None:
            self._logged = step, Counter(), Counter()

    def count(self, **numbers: int) -> None:
        """Add to the `counts` of these names."""
        if not self._stopped and self._now != EVALUATION:
            self.counts.update(numbers)

    def ran(self, tokens: int, of: int, on_tree: bool = True) -> None:
        """Called when a forward has run `tokens` tokens, where TRL would run `of`."""
        if not self._stopped and self._now != EVALUATION:
            self.on_trees |= on_tree
            self.counts.update(tokens=of, tokens_saved=of - tokens)

    def reference_begins(self) -> str | None:
        """Called before a forward in a training pass: a forward without gradient is that of the reference, and is timed
        as scoring.

        Returns:
            What to pass to `reference_ends`.
        """
        before = self._now
        if before == TRAINING and not self._stopped and not torch.is_grad_enabled():
            self._switch(SCORING)
        return before

    def reference_ends(self, before: str | None) -> None:
        if before != self._now:
            self._switch(before)

    def read(self) -> Counter[str]:
        """`seconds`, with all events that the device has passed by now."""
        with contextlib.suppress(RuntimeError):  # from a device that has failed: earlier times stay valid
            while self._passing and self._passing[0][2].query():
                phase, begin, end = self._passing[0]
                self.seconds[phase] += begin.elapsed_time(end) / 1000
                del self._passing[0]
        return self.seconds

    def metrics(self, step: int) -> dict[str, float]:
        """For the training log: seconds per optimizer step since the last log, and the share of saved tokens."""
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
        if mark is None:  # a CUDA graph is being captured, and nothing runs now
            return
        if self._now is not None and isinstance(mark, float):
            self.seconds[self._now] += mark - self._since
        elif self._now is not None:
            self._passing.append((self._now, self._since, mark))
        self._now, self._since = phase, mark


_running: Phases | None = None  # not thread-local, because the backward pass on CUDA runs in threads of torch


def _event() -> Any:
    if torch.cuda.is_current_stream_capturing():
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _head(kernel: Callable, *args: Any) -> Any:
    """Wraps each operator of the head, forward and backward, to time it as HEAD."""
    phases = _running
    if phases is None or phases._now not in (SCORING, TRAINING):
        return kernel(*args)
    with phases.of(HEAD):
        return kernel(*args)


for _name, _operator in _op.OPS.items():
    if _name.startswith(HEADS):
        _operator.around = _head
