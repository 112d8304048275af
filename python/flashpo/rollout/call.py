"""The state of one call of `RolloutEngine.generate`: what it asks for, and what it has so far."""

import contextlib
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from flashpo._hosts import sharding
from flashpo.packing.images import Images
from flashpo.rollout.generation import Completion
from flashpo.rollout.params import Rollouts, RolloutStats
from flashpo.rollout.scheduler import Counts, Row, Scheduler


@dataclass
class Call:
    """One call of `RolloutEngine.generate`: its prompts, the completions so far, and what they cost."""

    prompts: Sequence[Sequence[int]]
    groups: list[list[Completion]]  # the completions of each prompt
    adapters: list[tuple[str | None, list[int]]]  # each adapter with the indices of its prompts
    ended: Callable[[int], object]  # called with the number of completions that have just ended
    images: Images | None = None
    coded: Sequence[Sequence[int]] | None = None  # prompts with images: codes in place of image tokens, see `Shown`
    begin: float = field(default_factory=time.perf_counter)
    counts: Counts = field(default_factory=Counts)
    pool: tuple[int, int] = 0, 1  # its bytes and blocks: numbers, as the pool may be freed before the call ends
    steps: int = 0
    row_steps: int = 0
    gathered: sharding.Gathered = field(default_factory=sharding.Gathered)

    def queue(self, scheduler: Scheduler, chosen: Sequence[int], answering: Hashable) -> dict[Row, Completion]:
        """Queues a row for each completion of the chosen prompts. Rows share only what the adapters `answering` have
        computed."""
        completions = {}
        for i in chosen:
            n, limit = len(self.groups[i]), self.groups[i][0].draw.limit
            prompt = (self.coded or self.prompts)[i]
            rows = scheduler.add(prompt, prompt_index=i, n=n, max_new_tokens=limit, space=answering)
            for row, completion in zip(rows, self.groups[i]):
                row.tokens = completion.tokens
                completions[row] = completion
        return completions

    def rollouts(self) -> Rollouts:
        completions = [completion for group in self.groups for completion in group]
        cache_bytes, blocks = self.pool
        stats = RolloutStats(
            tokens=sum(len(c.tokens) for c in completions),
            seconds=time.perf_counter() - self.begin,
            steps=self.steps,
            prefill_tokens=self.counts.prefill_tokens,
            prefill_tokens_saved=self.counts.prompt_tokens - self.counts.prefill_tokens,
            peak_rows=self.counts.peak_rows,
            mean_rows=self.row_steps / max(self.steps, 1),
            cache_bytes=cache_bytes,
            peak_cache_bytes=self.counts.peak_blocks * cache_bytes // blocks,
            preemptions=self.counts.preemptions,
            nan_rows=sum(c.reason == "nan" for c in completions),
            gather_bytes=self.gathered.size,
            gather_seconds=self.gathered.seconds,
        )
        return Rollouts(
            prompt_index=[c.prompt_index for c in completions],
            prompt_ids=[list(self.prompts[c.prompt_index]) for c in completions],
            completion_ids=[c.tokens for c in completions],
            logprobs=[c.logprobs for c in completions],
            truncated_logprobs=[c.truncated if c.params.truncated else c.logprobs for c in completions],
            finish_reasons=[c.reason for c in completions],
            stats=stats,
        )


def by_adapter(adapters: Sequence[str] | None, prompts: int) -> list[tuple[str | None, list[int]]]:
    """Each adapter with the indices of its prompts, in the order in which `adapters` first names them."""
    if adapters is None:
        return [(None, list(range(prompts)))]
    return [(name, [i for i, other in enumerate(adapters) if other == name]) for name in dict.fromkeys(adapters)]


@contextlib.contextmanager
def progress_bar(total: int, shown: bool) -> Iterator[Callable[[int], object]]:
    """Yields a function that takes the number of completions that have ended; it moves a bar if `shown`."""
    if not shown:
        yield lambda count: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="rollout", unit="completion") as bar:
        yield bar.update
