"""Which rows run, in which blocks, and what has to be prefilled: a rollout's decisions, without a tensor.

A row is one completion. Rows wait in the order given, start when blocks and places allow, and end with `finish`:

    scheduler = Scheduler(blocks, max_rows)
    for i, prompt in enumerate(prompts):
        scheduler.add(prompt, prompt_index=i, n=8, max_new_tokens=256)
    while scheduler.unfinished:
        plan = scheduler.plan()
        prefill(plan.prefill)
        for row in plan.started:
            row.tokens.append(first_token(row))
        ...                                       # finish the rows that have ended already
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
    """One completion: a segment below the last node of its prompt that grows by a token a step.

    tokens: sampled so far; the engine appends. All but the last are in the cache: the last has not been fed yet.
    blocks: for max_new_tokens tokens, or, under optimistic admission, for what `grow` was asked for; empty while it
        does not run.
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
        """Of tokens[-1], the token to be fed next."""
        return self.end - 1


class Plan(NamedTuple):
    prefill: list[Segment]  # to compute and cache: nodes before their children, and rows with all their tokens so far
    started: list[Row]  # to sample one token each: from its own last logits if it is in `prefill`, else its parent's


class Shared(NamedTuple):
    """A node and the rows of `Scheduler.rows` that read it, [begin, end)."""

    node: Node
    begin: int
    end: int


@dataclass
class Counts:
    """What happened since the last `Scheduler.take_counts`."""

    prompt_tokens: int = 0  # what prefilling the prompt of every completion by itself would have cost
    prefill_tokens: int = 0
    peak_rows: int = 0
    peak_blocks: int = 0
    preemptions: int = 0


class Scheduler:
    """Admits rows to a pool of blocks.

    Rows start in the order added, preempted ones before all others. The first row that does not fit holds back those
    behind it; when nothing runs it fits, so something always runs. Decisions depend on nothing but the calls made.

    Args:
        blocks: of the pool, block 0 (the waste block) included.
        max_rows: that run at once. May be lowered between plans, after preempting the rows in excess.
        whole_nodes_only: for hybrid models, see PrefixTree.
        expected_tokens: None: a row starts when blocks for all its max_new_tokens are free, and is never preempted. A
            number (optimistic admission): when blocks for the mean length of finished completions are free, of which
            this number counts as one; `grow` preempts when blocks run out after all. A preempted row starts again with
            blocks for all its max_new_tokens, so that it cannot be the cause of further preemptions.

    Attributes:
        rows: that run, in tree order: the rows below any node are contiguous.
        version: changes whenever `rows`, their blocks or `shared` change.
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
        self._lengths = 1  # in that mean
        self._counts = Counts()

    def add(
        self, tokens: Sequence[int], *, prompt_index: int, n: int, max_new_tokens: int, space: Hashable = None
    ) -> list[Row]:
        """Queues n rows below the prompt `tokens`. Only prompts of equal `space` (adapter) share anything.

        Raises:
            ValueError: `tokens` is empty, or `n` or `max_new_tokens` is below 1.
            MemoryError: a row would not even fit by itself; names the blocks needed and available.
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
        self.version += 1  # a node that running rows read may have been split
        return rows

    @property
    def unfinished(self) -> int:
        """Rows that run or wait."""
        return len(self.rows) + len(self._waiting)

    def plan(self) -> Plan:
        """Starts the rows that fit.

        All of `Plan.prefill` counts as cached from now on: it must be computed before anything else is asked of the
        scheduler, or everything be forgotten (`reset`).
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
        """The nodes that running rows read, parents before children; the rows' own segments come after them."""
        begin: dict[Node, int] = {}
        end: dict[Node, int] = {}
        for i, row in enumerate(self.rows):
            for node in row.ancestors:
                begin.setdefault(node, i)
                end[node] = i + 1
        return [Shared(node, begin[node], end[node]) for node in begin]

    def grow(self, steps: int) -> list[Row]:
        """Gives every running row blocks for `steps` more tokens, at most for max_new_tokens.

        Where they run out, the rows with the fewest tokens are preempted until the others have theirs; these rows are
        returned and wait again. All tokens sampled must have been appended before. Without optimistic admission rows
        have all their blocks, and nothing happens.
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
        """Takes the blocks of a running row, which waits again before all others; it starts by a prefill of its tokens.

        All its tokens sampled must have been appended before.
        """
        self._stop(row, waits=True)
        self._waiting.appendleft(row)
        self._counts.preemptions += 1

    def finish(self, row: Row, *, keep: bool = True) -> Node | None:
        """Ends a running row, whose tokens must be complete.

        While `keeping`, its cached tokens, all but the last, become a node below its prompt. This is returned, so that
        the states of a hybrid model can be put into its payload. keep=False: not this row; its cache holds NaN, say.
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
        """A session: within it, prompts and finished completions stay cached until their blocks are needed."""
        self._tree.keep = True
        try:
            yield
        finally:
            self._tree.keep = False
            self._tree.free_unwanted()

    def reset(self) -> None:
        """Forgets all rows and all that is cached."""
        self._tree.clear()
        self._waiting.clear()
        self.rows.clear()
        self.version += 1

    def take_counts(self) -> Counts:
        """The counts since the last call."""
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
