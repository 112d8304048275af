"""Which rows run, in which blocks, and what has to be prefilled: the rollout's decisions, without a tensor.

A row is one completion. Rows wait in the order given, start when blocks and places allow, and end with `finish`:

    scheduler = Scheduler(blocks, max_rows)
    for i, prompt in enumerate(prompts):
        scheduler.add(prompt, prompt_index=i, n=8, max_new_tokens=256)
    while scheduler.unfinished:
        plan = scheduler.plan()
        prefill(plan.prefill)                         # nodes and recomputed rows, parents first
        for row in plan.started:                      # from the logits of row.parent, or of the row if it was prefilled
            row.tokens.append(sample(row))
        for row in [row for row in scheduler.rows if ended(row)]:
            scheduler.finish(row)
        scheduler.grow(steps)                         # preempts where blocks were short
        decode(scheduler.rows, scheduler.shared)      # tables are uploaded when scheduler.version has changed
        for row in scheduler.rows:
            row.tokens.extend(sampled(row))           # at most `steps`
        ...                                           # finish, as above
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from flashpo.rollout.prefix_tree import Node, Segment


class Row(Segment):
    """One completion: a segment below its prompt's last node that grows by a token a step.

    tokens: sampled so far; the engine appends. All but the last lie in the cache: the last has not been fed yet.
    blocks: for max_new_tokens (worst case) or for what `grow` was asked for (optimistic); empty while it waits.
    """

    tokens: list[int]
    prompt_index: int  # as given to `add`
    index: int  # among the completions of its prompt
    max_new_tokens: int

    @property
    def position(self) -> int:
        """Of the token to be fed next, tokens[-1]."""
        raise NotImplementedError


class Plan(NamedTuple):
    prefill: list[Segment]  # to compute and cache, parents before children; a Row here: all its tokens so far
    started: list[
        Row
    ]  # to sample the next token from the last logits of the row, where it is in `prefill`, or its parent


class Shared(NamedTuple):
    """A node and the rows of `Scheduler.rows` that read it, [begin, end)."""

    node: Node
    begin: int
    end: int


@dataclass
class Counts:
    """What happened since the last `Scheduler.take_counts`: the material of RolloutStats."""

    prompt_tokens: int = 0  # what prefilling the prompt of every completion by itself would have cost
    prefill_tokens: int = 0
    peak_rows: int = 0
    peak_blocks: int = 0
    preemptions: int = 0


class Scheduler:
    """Admits rows to a fixed pool of blocks.

    Args:
        blocks: of the pool, block 0 (the waste block) included.
        max_rows: that run at once; may be lowered later (`preempt` the excess).
        whole_nodes_only: hybrid models, see PrefixTree.
        expected_tokens: None: a row starts when blocks for its max_new_tokens are free, and is never preempted. A
            number: when blocks for its expected length are free (this number, later the mean length of those finished);
            `grow` then preempts when blocks run out. A preempted row starts again only with its worst case reserved.

    Order: rows start in the order added, preempted ones before all others; nothing depends on hashes or addresses.
    A row at the head of the queue that does not fit holds back those behind it. When nothing runs, it fits.
    """

    max_rows: int
    rows: list[Row]  # that run now, in tree order: the rows below any node are contiguous
    version: int  # changes whenever rows, their blocks or `shared` change: upload the tables again

    def __init__(
        self, blocks: int, max_rows: int, *, whole_nodes_only: bool = False, expected_tokens: int | None = None
    ): ...

    def add(
        self, tokens: Sequence[int], *, prompt_index: int, n: int, max_new_tokens: int, space: Hashable = None
    ) -> list[Row]:
        """Queues n rows below the prompt `tokens`; those with equal `space` (adapter) share prefixes.

        Raises:
            ValueError: `tokens` is empty, `n` or `max_new_tokens` below 1.
            MemoryError: one row would not fit into the whole pool; names the blocks needed and available.
        """
        raise NotImplementedError

    @property
    def unfinished(self) -> int:
        """Rows that run or wait."""
        raise NotImplementedError

    def plan(self) -> Plan:
        """Starts the rows that fit. Everything in `Plan.prefill` counts as cached from now on: prefill it before the
        next call; if that fails for good, `reset`."""
        raise NotImplementedError

    @property
    def shared(self) -> list[Shared]:
        """Nodes that running rows read, parents before children, with their rows; then come the rows' own segments."""
        raise NotImplementedError

    def grow(self, steps: int) -> list[Row]:
        """Gives every running row the blocks for `steps` more tokens; returns rows that were preempted for it (they
        wait again). Their `tokens` must be complete. Returns [] always unless admission is optimistic."""
        raise NotImplementedError

    def preempt(self, row: Row) -> None:
        """Takes the row's blocks; it starts again, before all that wait, by a prefill of its tokens."""
        raise NotImplementedError

    def finish(self, row: Row, *, keep: bool = True) -> Node | None:
        """Ends a running row whose `tokens` are complete. While `keeping`, its cached tokens (all but the last) become
        a node below its prompt, which is returned: a hybrid's engine stores the row's states as its payload.
        keep=False: not this row (NaN)."""
        raise NotImplementedError

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """A session: within it, finished prompts and completions stay cached until blocks are short."""
        raise NotImplementedError
        yield

    def reset(self) -> None:
        """Forgets all rows and nodes, kept ones included: after a failure in the middle of a plan."""
        raise NotImplementedError

    def take_counts(self) -> Counts:
        """The counts since the last call; starts new ones."""
        raise NotImplementedError
