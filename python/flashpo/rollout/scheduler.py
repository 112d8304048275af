"""The scheduler of a rollout: it decides which rows run, in which cache blocks, and what has to be prefilled.

It computes no tensors. A row is one completion. Rows wait in the order in which they were added, start when there are
blocks and room in the decode batch, and end with `finish`:

    scheduler = Scheduler(blocks, max_rows)
    for i, prompt in enumerate(prompts):
        scheduler.add(prompt, prompt_index=i, n=8, max_new_tokens=256)
    while scheduler.unfinished:
        plan = scheduler.plan()
        prefill(plan.prefill)
        for row in plan.started:
            row.tokens.append(first_token(row))
        ...                                       # finish the rows that have ended with this token
        scheduler.grow(steps)
        decode(scheduler.rows, scheduler.shared)  # tables are uploaded when scheduler.version has changed
        for row in scheduler.rows:
            row.tokens.extend(sampled(row))       # at most `steps`
        for row in [row for row in scheduler.rows if ended(row)]:
            scheduler.finish(row)
"""

import itertools
import math
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from flashpo.rollout.prefix_tree import BLOCK, BlockAllocator, Node, PrefixTree, Segment, blocks_for


class Row(Segment):
    """One completion: a segment below the last node of its prompt, which grows by one token in each decode step.

    tokens: The tokens sampled so far, appended by the engine. All but the last are in the cache: the last one goes
        through the model in the next step.
    blocks: Enough for max_new_tokens tokens; under optimistic admission enough for the tokens that `grow` was asked
        for. Empty while the row does not run.
    """

    tokens: list[int]

    def __init__(self, prompt: Node, prompt_index: int, index: int, max_new_tokens: int, order: int):
        super().__init__(prompt, [])
        self.prompt_index = prompt_index  # as given to `add`
        self.index = index  # among the completions of its prompt
        self.max_new_tokens = max_new_tokens
        self.order = order  # among all rows

    @property
    def position(self) -> int:
        """The position of tokens[-1], which the next step feeds to the model."""
        return self.end - 1


class Plan(NamedTuple):
    prefill: list[Segment]  # to compute and cache: nodes before their children; preempted rows with all their tokens
    started: list[Row]  # to sample one token each, from the row's last logits if it is in `prefill`, else its parent's


class Shared(NamedTuple):
    """A node and the range [begin, end) of `Scheduler.rows` that read it."""

    node: Node
    begin: int
    end: int


@dataclass
class Counts:
    """Counts since the last `Scheduler.take_counts`."""

    prompt_tokens: int = 0  # what would have been prefilled if each completion had prefilled its prompt by itself
    prefill_tokens: int = 0
    peak_rows: int = 0
    peak_blocks: int = 0
    preemptions: int = 0


class Scheduler:
    """Admits rows to a pool of cache blocks.

    Rows start in the order in which they were added, and preempted rows start before all others. A row that does not
    fit holds back all rows after it. Any row fits when no other row runs, so that some row always runs. The decisions
    depend only on the calls made.

    Args:
        blocks: The number of blocks in the pool, including block 0, the waste block.
        max_rows: The largest number of rows that run at once. It may be lowered between two plans, after the rows in
            excess have been preempted.
        whole_nodes_only: True for hybrid models, see `PrefixTree`.
        expected_tokens: None: a row starts when blocks for all of its max_new_tokens are free, and is never preempted.
            A number (optimistic admission): a row starts when blocks for the mean length of finished completions are
            free, where this number counts as one finished completion. If blocks run out later, `grow` preempts rows. A
            preempted row starts again only with blocks for all of its max_new_tokens, so that it cannot cause further
            preemptions.

    Attributes:
        rows: The running rows in tree order: the rows below any node are contiguous.
        version: Changes whenever `rows`, their blocks or `shared` change.
    """

    def __init__(
        self, blocks: int, max_rows: int, *, whole_nodes_only: bool = False, expected_tokens: float | None = None
    ):
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, not {max_rows}")
        if expected_tokens is not None and not expected_tokens > 0:
            raise ValueError(f"expected_tokens must be positive, not {expected_tokens}")
        self.max_rows = max_rows
        self.rows: list[Row] = []
        self.version = 0
        self._allocator = BlockAllocator(blocks)
        self._tree = PrefixTree(self._allocator, whole_nodes_only=whole_nodes_only)
        self._waiting: deque[Row] = deque()
        self._order = itertools.count()
        self._mean_length = expected_tokens
        self._lengths = 1  # how many lengths the mean is taken over
        self._counts = Counts()

    def add(
        self, tokens: Sequence[int], *, prompt_index: int, n: int, max_new_tokens: int, space: Hashable = None
    ) -> list[Row]:
        """Queues n rows below the prompt `tokens`. Only prompts of equal `space` (the adapters) share cache blocks.

        Raises:
            ValueError: `tokens` is empty, or `n` or `max_new_tokens` is below 1.
            MemoryError: A row does not fit even if it runs alone. The message gives the blocks needed and available.
        """
        if not tokens:
            raise ValueError(f"tokens: prompt {prompt_index} is empty")
        for name, value in (("n", n), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        own, available = blocks_for(max_new_tokens), self._allocator.capacity
        if blocks_for(len(tokens)) + own > available:
            raise MemoryError(
                f"prompt {prompt_index} of {len(tokens)} tokens and {max_new_tokens} new tokens needs "
                f"{blocks_for(len(tokens))} + {own} blocks of {BLOCK} tokens, the cache has {available}"
            )
        prompt = self._tree.insert(tuple(tokens), space, n, available - own)
        rows = [Row(prompt, prompt_index, i, max_new_tokens, next(self._order)) for i in range(n)]
        self._waiting.extend(rows)
        self._counts.prompt_tokens += n * len(tokens)
        self.version += 1  # the insertion may have split a node that running rows read
        return rows

    @property
    def unfinished(self) -> int:
        """How many rows run or wait."""
        return len(self.rows) + len(self._waiting)

    def plan(self) -> Plan:
        """Starts the rows that fit.

        From now on the scheduler counts all of `Plan.prefill` as cached. The caller must compute it before the next
        call of the scheduler, or `reset` the scheduler if that fails.
        """
        prefill: list[Segment] = []
        started: list[Row] = []
        while self._waiting and len(self.rows) < self.max_rows and self._fits(self._waiting[0]):
            row = self._waiting.popleft()
            prefill += self._tree.start(row.parent)
            row.blocks = self._allocator.take(self._blocks_to_start(row))
            if row.tokens:
                prefill.append(row)
            started.append(row)
            self.rows.append(row)
        if started:
            self.rows.sort(key=lambda row: ([node.order for node in row.ancestors], row.order))
            self.version += 1
            self._counts.prefill_tokens += sum(len(segment.tokens) for segment in prefill)
            self._counts.peak_rows = max(self._counts.peak_rows, len(self.rows))
        return Plan(prefill, started)

    @property
    def shared(self) -> list[Shared]:
        """The nodes that running rows read, parents before children. The rows themselves are not included."""
        begin: dict[Node, int] = {}
        end: dict[Node, int] = {}
        for i, row in enumerate(self.rows):
            for node in row.ancestors:
                begin.setdefault(node, i)
                end[node] = i + 1
        return [Shared(node, begin[node], end[node]) for node in begin]

    def grow(self, steps: int) -> list[Row]:
        """Gives each running row blocks for `steps` more tokens, up to its max_new_tokens.

        Where blocks run out, the rows with the fewest tokens are preempted until there are enough for the others. The
        preempted rows are returned; they wait again. All sampled tokens must have been appended before. Without
        optimistic admission every row has all of its blocks from the start, and this does nothing.
        """
        preempted = []
        for row in list(self.rows):
            wanted = blocks_for(min(len(row.tokens) + steps, row.max_new_tokens))
            while row.blocks and len(row.blocks) < wanted:
                if self._tree.make_room(wanted - len(row.blocks)):
                    row.blocks += self._allocator.take(wanted - len(row.blocks))
                    self.version += 1
                else:
                    preempted.append(min(self.rows, key=lambda row: (len(row.tokens), -row.order)))
                    self.preempt(preempted[-1])
        return preempted

    def preempt(self, row: Row) -> None:
        """Frees the blocks of a running row, which then waits again, before all other rows.

        When it starts again, its tokens so far are prefilled. All of its sampled tokens must have been appended before.
        """
        self._stop(row, waits=True)
        self._waiting.appendleft(row)
        self._counts.preemptions += 1

    def finish(self, row: Row, *, keep: bool = True) -> Node | None:
        """Ends a running row, whose tokens must be complete.

        Within `keeping`, its cached tokens (all but the last) become a node below its prompt, which is returned. With
        keep=False they do not, for example because they hold NaN.
        """
        node = None
        cached = tuple(row.tokens[:-1])
        if cached and keep and self._tree.keep:
            used = blocks_for(len(cached))
            node = self._tree.adopt(row.parent, cached, row.blocks[:used])
            row.blocks = row.blocks[used:]
        self._stop(row, waits=False)
        if self._mean_length is not None:
            self._lengths += 1
            self._mean_length += (len(row.tokens) - self._mean_length) / self._lengths
        return node

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """A session: prompts and finished completions stay cached until their blocks are needed or the session ends."""
        self._tree.keep = True
        try:
            yield
        finally:
            self._tree.keep = False
            self._tree.free_unwanted()

    def reset(self) -> None:
        """Forgets all rows and everything that is cached."""
        self._tree.clear()
        self._waiting.clear()
        self.rows.clear()
        self.version += 1

    def take_counts(self) -> Counts:
        """Returns the counts since the last call and starts new ones."""
        counts, self._counts = self._counts, Counts(peak_rows=len(self.rows))
        counts.peak_blocks, self._allocator.peak = self._allocator.peak, self._allocator.used
        return counts

    def _blocks_to_start(self, row: Row) -> int:
        if self._mean_length is None or row.tokens:
            return blocks_for(row.max_new_tokens)
        return blocks_for(min(row.max_new_tokens, math.ceil(self._mean_length)))

    def _fits(self, row: Row) -> bool:
        missing = sum(blocks_for(len(node.tokens)) for node in row.ancestors if not node.blocks)
        return self._tree.make_room(missing + self._blocks_to_start(row), spare=set(row.ancestors))

    def _stop(self, row: Row, *, waits: bool) -> None:
        if row not in self.rows:
            raise ValueError(f"row: completion {row.index} of prompt {row.prompt_index} does not run")
        self.rows.remove(row)
        self._allocator.release(row.blocks)
        row.blocks = []
        self._tree.stop(row.parent, waits=waits)
        self.version += 1
