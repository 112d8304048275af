"""The main loop of a rollout: it computes what the scheduler decides and collects the sampled tokens."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flashpo._memory import out_of_memory
from flashpo.rollout.cache import BLOCK, Run
from flashpo.rollout.hybrid import RowStates, State
from flashpo.rollout.images import Shown
from flashpo.rollout.params import SamplingParams
from flashpo.rollout.prefill import Piece, lineage, parent, prefill
from flashpo.rollout.prefix_tree import Node, Segment
from flashpo.rollout.runner import Draw, Runner, Step, draw_tokens
from flashpo.rollout.scheduler import Row, Scheduler

START_ROWS = 256  # first tokens are drawn for so many rows at a time, which limits the memory for logits


@dataclasses.dataclass(eq=False)
class Completion:
    """One completion while it grows. `tokens` is the same list as in the scheduler's `Row` that computes it."""

    prompt_index: int
    params: SamplingParams
    draw: Draw
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    truncated: list[float] = dataclasses.field(default_factory=list)
    reason: str = ""

    @classmethod
    def of(cls, params: SamplingParams, prompt_index: int, index: int) -> "Completion":
        return cls(prompt_index, params, Draw.of(params, prompt_index, index))

    def restart(self) -> None:
        for values in (self.tokens, self.logprobs, self.truncated):
            values.clear()

    def append(self, token: int, logprob: float, truncated: float, decode: Callable | None) -> None:
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.truncated.append(truncated)
        if logprob != logprob:
            self.reason = "nan"
        elif token in self.draw.stop or (decode and self._at_stop_string(decode)):
            self.reason = "stop"
        elif len(self.tokens) == self.draw.limit:
            self.reason = "length"

    def _at_stop_string(self, decode: Callable) -> bool:
        """Whether the last token has completed a stop string.

        Only the last tokens are decoded: except for special tokens, each has at least one byte.
        """
        if not self.params.stop_strings:
            return False
        longest = max(len(text.encode()) for text in self.params.stop_strings)
        tail = decode(self.tokens[-longest - 4 :])
        return any(text in tail for text in self.params.stop_strings)


class Ending(NamedTuple):
    """What a cached node keeps about its last token."""

    logits: Tensor | None  # if a prompt ends there
    state: State | None  # the recurrent state of a hybrid model


class Generation:
    """Computes completions until all have ended.

    Args:
        completions: The completion that each row of the scheduler computes.
        prefill_tokens: The largest number of tokens in one prefill.
        decode: Token ids to text, for stop strings.
        ended: Called with the number of completions that have just ended.
        hybrid: Whether the model keeps a recurrent state for each row. The state then moves with the row.
        images: The images of the prompts, and a key of the adapters under which the vision tower has computed them.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        completions: dict[Row, Completion],
        prefill_tokens: int,
        decode: Callable | None,
        ended: Callable[[int], object],
        hybrid: bool = False,
        images: tuple[Shown, Hashable] | None = None,
    ):
        self.runner, self.scheduler, self.prefill_tokens = runner, scheduler, prefill_tokens
        self.completions = completions
        self.decode, self.ended = decode, ended
        self.states = RowStates(runner.parts) if hybrid else None
        self.images = images
        self._ahead: dict[Node, int] = {}  # for each prompt's last node, see `_ahead_of`
        self.steps, self.row_steps = 0, 0

    def run(self) -> None:
        """Runs until every completion has ended."""
        while self.scheduler.unfinished:
            plan = self.scheduler.plan()
            logits = self._halving_prefill(plan.prefill)
            self._start(plan.started, logits)
            if not self._finish(self.scheduler.rows):
                self._decode()

    def _decode(self) -> None:
        """Runs decode steps until a row ends or is preempted, so that other rows may start."""
        version, rows = None, self.scheduler.rows
        while True:
            try:
                if self.scheduler.grow(self.runner.check_every):
                    return
                if self.scheduler.version != version:
                    version, rows = self.scheduler.version, list(self.scheduler.rows)
                    running = [self.completions[row] for row in rows]
                    draws = [c.draw for c in running]
                    states = None if self.states is None else self.states.of(rows)
                    step, advance = self.runner.load(rows, self.scheduler.shared, draws, states, self._ahead_of(rows))
                    if self.states is not None:
                        self.states.run(step.states, rows)
                for _ in range(self.runner.check_every):
                    advance()
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or len(rows) == 1:
                    raise
                return self._halve_rows()
            self.steps += self.runner.check_every
            self.row_steps += self.runner.check_every * len(rows)
            self._collect(step, running)
            if self._finish(rows):
                return

    def _ahead_of(self, rows: Sequence[Row]) -> list[int]:
        """For each row, its rotary position minus its number of tokens. They differ after images."""
        if self.images is None:
            return []
        for row in rows:
            if row.parent not in self._ahead:
                self._ahead[row.parent] = self.images[0].ahead(_path(row.parent))
        return [self._ahead[row.parent] for row in rows]

    def _collect(self, step: Step, rows: list[Completion]) -> None:
        for tokens, (full, truncated) in step.take():
            for i, completion in enumerate(rows):
                if not completion.reason:
                    completion.append(tokens[i], full[i], truncated[i], self.decode)

    def _finish(self, rows: Sequence[Row]) -> int:
        """Frees the blocks of the rows that have ended and returns how many these are."""
        ended = [row for row in rows if self.completions[row].reason]
        for row in ended:
            # in a hybrid model there is no state after the cached tokens, so that no prompt could continue from them
            self.scheduler.finish(row, keep=self.completions[row].reason != "nan" and self.states is None)
        if ended:
            self.ended(len(ended))
        return len(ended)

    def _halve_rows(self) -> None:
        self.scheduler.max_rows = len(self.scheduler.rows) // 2
        kept = self.scheduler.max_rows if self.states is None else 0  # the step may have moved some layers' states
        for row in self.scheduler.rows[kept:]:
            self.scheduler.preempt(row)

    def _halving_prefill(self, segments: Sequence[Segment]) -> dict[Segment, Tensor]:
        while True:
            try:
                return self._prefill(segments)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or self.prefill_tokens <= BLOCK:
                    raise
                self.prefill_tokens = min(self.prefill_tokens, sum(len(x.tokens) for x in segments)) // 2

    def _prefill(self, segments: Sequence[Segment]) -> dict[Segment, Tensor]:
        """Computes and caches the segments. Returns the logits after each segment whose next token is wanted.

        A node also keeps the logits after its last token.
        """
        logits: dict[Segment, Tensor] = {}
        parts, device = self.runner.parts, self.runner.cache.device
        ends: dict[Segment, State] = {}
        for chunk in self._chunks(segments):
            pieces = [piece for _, piece, _ in chunk]
            if self.states is None:
                hidden = prefill(parts, self.runner.cache, pieces, self.runner.fused, placed=self._placed)
            else:
                some = [segment for segment, _, _ in chunk]
                states = lineage(pieces, device) if self._joins(pieces[0], []) else self.states.behind(some[0], ends)
                hidden = prefill(parts, self.runner.cache, pieces, states=states, placed=self._placed)
                ends |= zip(some, self.states.taken(states, len(some)))
            wanted = [i for i, (_, _, last) in enumerate(chunk) if last]
            if wanted:
                logits |= zip((chunk[i][0] for i in wanted), parts.logits(hidden[wanted]))
        for segment in segments:
            if isinstance(segment, Node):
                segment.payload = Ending(logits.get(segment), ends.get(segment))
            elif self.states is not None:
                self.states.fresh[segment] = ends[segment]
        return logits

    @property
    def _placed(self) -> Callable | None:
        return None if self.images is None else functools.partial(self.images[0].placed, space=self.images[1])

    def _chunks(self, segments: Sequence[Segment]) -> Iterator[list[tuple[Segment, Piece, bool]]]:
        """The pieces of each forward, at most `prefill_tokens` tokens together.

        Each piece comes with its segment and with whether the logits after it are wanted.
        """
        chunk: list[tuple[Segment, Piece, bool]] = []
        room = self.prefill_tokens
        for segment in segments:
            tokens, begin = segment.tokens, 0
            above = [Run(node.blocks, len(node.tokens)) for node in segment.ancestors]
            turns = None if self.images is None else self.images[0].turns(_path(segment), segment.start)
            while begin < len(tokens):
                end = min(begin + room, len(tokens))
                own = None if turns is None else turns[:, begin:end]
                piece = Piece(tokens[begin:end], [*above, Run(segment.blocks, end)], own)
                wanted = end == len(tokens) and (not isinstance(segment, Node) or segment.ends)
                if chunk and not self._joins(piece, [p for _, p, _ in chunk]):
                    yield chunk
                    chunk, room = [], self.prefill_tokens
                chunk.append((segment, piece, wanted))
                room -= end - begin
                begin = end
                if room <= 0:
                    yield chunk
                    chunk, room = [], self.prefill_tokens
        if chunk:
            yield chunk

    def _joins(self, piece: Piece, others: Sequence[Piece]) -> bool:
        """Whether `piece` may run in one forward with `others`.

        In a hybrid model it may only if the forward itself computes every state that its pieces begin from.
        """
        if self.states is None:
            return True
        return self.states.trees and None not in (parent(piece, others), *(parent(p, []) for p in others[:1]))

    def _start(self, rows: Sequence[Row], logits: dict[Segment, Tensor]) -> None:
        """Draws the next token of rows that start, from the logits after the row's last token or after its prompt."""
        for begin in range(0, len(rows), START_ROWS):
            some = rows[begin : begin + START_ROWS]
            stacked = torch.stack([logits.get(row, row.parent.payload.logits) for row in some])
            position = torch.tensor([row.start + len(row.tokens) for row in some], device=stacked.device)
            completions = [self.completions[row] for row in some]
            drawn = draw_tokens(stacked, offset=position, **Draw.tensors([c.draw for c in completions], stacked.device))
            columns = drawn.token.tolist(), drawn.logprob_full.tolist(), drawn.logprob.tolist()
            for completion, token, full, truncated in zip(completions, *columns):
                completion.append(token, full, truncated, self.decode)


def _path(segment: Segment) -> list[int]:
    """All tokens of the sequence up to the end of the segment."""
    return [*itertools.chain.from_iterable(node.tokens for node in segment.ancestors), *segment.tokens]
