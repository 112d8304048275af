"""One call of `RolloutEngine.generate` while it runs: computes what the scheduler decides, collects what is drawn."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flashpo.rollout.cache import BLOCK, Run, out_of_memory
from flashpo.rollout.hybrid import RowStates, State
from flashpo.rollout.images import Shown
from flashpo.rollout.params import SamplingParams
from flashpo.rollout.prefill import Piece, lineage, parent, prefill
from flashpo.rollout.prefix_tree import Node, Segment
from flashpo.rollout.runner import Draw, Runner, Step, draw_tokens
from flashpo.rollout.scheduler import Row, Scheduler

START_ROWS = 256  # rows whose logits are held at a time to draw their first tokens


@dataclasses.dataclass(eq=False)
class Completion:
    """One completion while it grows; while a row computes it, the row has the same list of tokens."""

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
        """Whether a stop string has just been completed: a token is at least a byte, save for special ones."""
        if not self.params.stop_strings:
            return False
        longest = max(len(text.encode()) for text in self.params.stop_strings)
        tail = decode(self.tokens[-longest - 4 :])
        return any(text in tail for text in self.params.stop_strings)


class Ending(NamedTuple):
    """What a cached node keeps of its end."""

    logits: Tensor | None  # where a prompt ends
    state: State | None  # of a hybrid model


class Generation:
    """The completions of one call.

    Args:
        decode: tokens to text, for stop strings.
        ended: called with the number of completions that have just ended.
        hybrid: the model keeps a state for each row, which has to follow it.
        images: those of the prompts, and under which adapters the tower has seen them.
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
        self._ahead: dict[Node, int] = {}  # of the rows of a prompt
        self.steps, self.row_steps = 0, 0

    def run(self) -> None:
        """Until every completion has ended."""
        while self.scheduler.unfinished:
            plan = self.scheduler.plan()
            logits = self._halving_prefill(plan.prefill)
            self._start(plan.started, logits)
            if not self._finish(self.scheduler.rows):
                self._decode()

    def _decode(self) -> None:
        """Steps until a row ends or has to leave: then others may start."""
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
        """How far their rotary positions are from numbers of tokens."""
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
        """Rows that have ended give their blocks back; their number."""
        ended = [row for row in rows if self.completions[row].reason]
        for row in ended:
            # the last token of a hybrid's row has no state: nothing can go on from there
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
        """Caches the segments; the logits behind those whose next token is wanted. Nodes keep theirs, too."""
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
        """Pieces of at most `prefill_tokens` together; True where the logits behind the piece are wanted."""
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
        """Whether one forward runs a piece with others: a hybrid model needs the state that it begins from."""
        if self.states is None:
            return True
        return self.states.trees and None not in (parent(piece, others), *(parent(p, []) for p in others[:1]))

    def _start(self, rows: Sequence[Row], logits: dict[Segment, Tensor]) -> None:
        """The next token of rows that start, drawn from the logits behind them or behind their prompts."""
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
    """All tokens up to its end."""
    return [*itertools.chain.from_iterable(node.tokens for node in segment.ancestors), *segment.tokens]
