"""The decode step of all running rows: embedding, layers, head, sampling, and the tables of the next step.

Every buffer keeps its address, no shape depends on the length of a sequence, and the device never waits for the host.
The step can therefore be captured as a CUDA graph. On a CPU the same function runs directly.
"""

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashpo import _fallbacks, _recurrent
from flashpo._causal_lm import CausalLM
from flashpo._memory import out_of_memory
from flashpo.ops import decode_attention, sample
from flashpo.ops.sample import Sample
from flashpo.rollout.cache import BLOCK, KVCache
from flashpo.rollout.fused import FusedBackbone
from flashpo.rollout.hybrid import State, States, cache_keyword
from flashpo.rollout.params import SamplingParams
from flashpo.rollout.scheduler import Row, Shared
from flashpo.rollout.seam import in_charge

log = logging.getLogger("flashpo")


class Draw(NamedTuple):
    """How one row samples and when it ends."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    limit: int  # the largest number of tokens of the completion
    stop: Sequence[int]  # token ids that end it
    suppressed: Sequence[int] = ()  # token ids that are never drawn

    @classmethod
    def of(cls, p: SamplingParams, prompt_index: int, index: int) -> "Draw":
        seed = stream(p.seed, prompt_index, index)
        ends = p.max_new_tokens, p.stop_token_ids
        return cls(p.temperature, p.top_k, p.top_p, p.min_p, seed, *ends, p.suppress_token_ids)

    @staticmethod
    def tensors(draws: Sequence["Draw"], device: torch.device) -> dict[str, Tensor]:
        """The arguments of `draw_tokens` besides the logits and the positions, with a row for each draw."""
        settings = {
            name: torch.tensor([getattr(d, name) for d in draws], dtype=dtype, device=device)
            for name, dtype in SETTINGS.items()
        }
        wide = max(len(d.suppressed) for d in draws)
        suppressed = torch.tensor([padded(d.suppressed, wide) for d in draws], dtype=torch.int64, device=device)
        return settings | {"suppressed": suppressed}


SETTINGS = {
    "temperature": torch.float32,
    "top_k": torch.int64,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "seed": torch.int64,
}


def padded(ids: Sequence[int], wide: int) -> list[int]:
    return [*ids, *[-1] * (wide - len(ids))]


def draw_tokens(logits: Tensor, suppressed: Tensor, offset: Tensor, **settings: Tensor) -> Sample:
    """Draws a token for each row by `sample`, but never a token of `suppressed` (rows, K).

    Ids outside the vocabulary, such as the padding -1, have no effect. `logprob_full` is over the full vocabulary,
    suppressed tokens included, as a trainer computes it.
    """
    if suppressed.shape[1] == 0:
        return sample(logits, **settings, offset=offset)
    there = (suppressed >= 0) & (suppressed < logits.shape[1])
    index = suppressed.where(there, 0)
    most = torch.where(there, -torch.inf, torch.inf).to(logits.dtype)
    drawn = sample(logits.scatter_reduce(1, index, most, "amin"), **settings, offset=offset)
    temperature = settings["temperature"].where(settings["temperature"] > 0, 1.0)[:, None]
    left_out = (logits.gather(1, index) / temperature).masked_fill(~there, -torch.inf).logsumexp(1)
    chosen = (logits.gather(1, drawn.token[:, None]) / temperature)[:, 0]
    allowed = chosen - drawn.logprob_full  # log-sum-exp of the logits of all tokens that may be drawn
    return drawn._replace(logprob_full=drawn.logprob_full - F.softplus(left_out - allowed))


def stream(seed: int, prompt_index: int, index: int) -> int:
    """The key of a completion's random numbers, in [-2^63, 2^63): a hash of the three numbers by SplitMix64's
    finaliser."""
    x = seed
    for part in (prompt_index, index):
        x = (x + 0x9E3779B97F4A7C15 * (part + 1)) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        x ^= x >> 31
    return x - 2**64 if x >= 2**63 else x


class Sizes(NamedTuple):
    """The sizes of a step's buffers: exact on a CPU; rounded up on a GPU, so that more steps can use the same graph."""

    rows: int
    shared: int  # segments that several rows may read
    blocks: int  # blocks of the longest segment
    stop: int  # the largest number of token ids that end a row
    suppressed: int  # the largest number of token ids that a row never draws
    steps: int  # steps between two times that the host reads results

    @classmethod
    def of(cls, rows: Sequence[Row], shared: Sequence[Shared], draws: Sequence[Draw], steps: int) -> "Sizes":
        blocks = max(len(x.blocks) for x in (*rows, *(s.node for s in shared)))
        stop, suppressed = (max(len(getattr(d, name)) for d in draws) for name in ("stop", "suppressed"))
        return cls(len(rows), len(shared), blocks, max(1, stop), suppressed, steps)

    def rounded(self) -> "Sizes":
        rows, shared, blocks, stop = (1 << max(n - 1, 0).bit_length() for n in self[:4])
        suppressed = self.suppressed and 1 << (self.suppressed - 1).bit_length()  # 0 stays 0: it makes sampling faster
        return Sizes(rows, shared, blocks, stop, suppressed, self.steps)


class Step:
    """The buffers of up to `sizes.rows` rows. Calling the step advances all of them by one token.

    Rows that have ended and entries of the batch without a row are parked: their `live` is False, they write nothing to
    the cache, and their token, length and position do not change.
    """

    def __init__(self, parts: CausalLM, cache: KVCache, sizes: Sizes, fused: FusedBackbone | None = None):
        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=cache.device)

        rows, segments = sizes.rows, sizes.shared + sizes.rows
        self.parts, self.cache, self.sizes, self.fused = parts, cache, sizes, fused
        self.states: States | None = None  # the recurrent states of the rows of a hybrid model
        self.of_states: dict[str, Any] = {}  # the keywords by which its layers get them
        # the segments of decode_attention: shared segments first, then the segment of each row
        self.readers = zeros(segments, 2, dtype=torch.int32)
        self.start = zeros(segments, dtype=torch.int32)
        self.length = zeros(segments, dtype=torch.int32)
        self.blocks = zeros(segments, sizes.blocks, dtype=torch.int32)
        self.own_length, self.own_blocks = self.length[sizes.shared :], self.blocks[sizes.shared :]
        # the rows
        self.live = zeros(rows, dtype=torch.bool)
        self.token = zeros(rows, dtype=torch.int64)
        self.position = zeros(rows, dtype=torch.int32)
        self.ahead = zeros(rows, dtype=torch.int32)  # rotary position minus `position`; not 0 after images
        self.tables = self.readers, self.start, self.length, self.blocks, self.position
        self.limit = zeros(rows, dtype=torch.int32)
        self.stop = zeros(rows, sizes.stop, dtype=torch.int64)
        self.suppressed = zeros(rows, sizes.suppressed, dtype=torch.int64) - 1
        self.settings = {name: zeros(rows, dtype=dtype) for name, dtype in SETTINGS.items()}
        # what has been drawn since the host last read it
        self.at = zeros(1, dtype=torch.int64)
        self.tokens = zeros(sizes.steps, rows, dtype=torch.int64)
        self.logprobs = zeros(sizes.steps, 2, rows, dtype=torch.float32)
        self.slot = zeros(rows, dtype=torch.int64)

    def load(
        self, rows: Sequence[Row], shared: Sequence[Shared], draws: Sequence[Draw], ahead: Sequence[int] = ()
    ) -> None:
        """Fills the tables for these rows. The next step feeds the last token of each row to the model."""
        segments = [(s.begin, s.end, s.node.start, len(s.node.tokens), s.node.blocks) for s in shared]
        segments += [(0, 0, 0, 0, [])] * (self.sizes.shared - len(shared))
        segments += [(i, i + 1, row.start, len(row.tokens), row.blocks) for i, row in enumerate(rows)]
        begin, end, start, length, blocks = zip(*segments)
        wide = self.sizes.blocks
        fields = (
            (self.readers, list(zip(begin, end))),
            (self.start, start),
            (self.length, length),
            (self.blocks, [[*b[:wide], *[0] * (wide - len(b))] for b in blocks]),
            (self.live, [True] * len(rows)),
            (self.token, [row.tokens[-1] for row in rows]),
            (self.position, [row.position for row in rows]),
            (self.ahead, ahead or [0] * len(rows)),
            (self.limit, [d.limit for d in draws]),
            (self.stop, [padded(d.stop, self.sizes.stop) for d in draws]),
            (self.suppressed, [padded(d.suppressed, self.sizes.suppressed) for d in draws]),
            *((self.settings[name], [getattr(d, name) for d in draws]) for name in SETTINGS),
        )
        self.live.zero_()
        self.readers.zero_()
        for field, values in fields:
            field[: len(values)].copy_(torch.tensor(values, dtype=field.dtype, device="cpu"))
        self.at.zero_()

    def take(self) -> Iterator[tuple[list[int], list[list[float]]]]:
        """For each step since the last call: the token of each row, and its log-probs (full, truncated)."""
        tokens, logprobs = self.tokens.tolist(), self.logprobs.tolist()
        self.at.zero_()
        return zip(tokens, logprobs)

    def attend(self, layer, query, key, value, scale, softcap, sinks):
        cache = self.cache
        q, k, v = (x[:, :, 0].to(cache.dtype) for x in (query, key, value))
        cache.append(layer, k, v, self.slot)
        return self.attend_cached(layer, q, scale, softcap, sinks)[:, None].to(query.dtype)

    def attend_cached(
        self, layer: int, query: Tensor, scale: float, softcap: float = 0.0, sinks: Tensor | None = None
    ) -> Tensor:
        """query (N, Hq, D) -> (N, Hq, Dv). The tokens' own keys and values must be in the cache already."""
        caches = self.cache.keys[layer], self.cache.values[layer]
        window = self.cache.layers[layer].window
        out, _ = decode_attention(
            query, *caches, *self.tables, scale=scale, window=window, softcap=softcap, sinks=sinks
        )
        return out

    def _hidden(self) -> Tensor:
        if self.fused is not None:
            return self.fused(self)
        with in_charge(self):
            return self.parts.backbone(
                input_ids=self.token[:, None],
                position_ids=(self.position + self.ahead)[:, None].long(),
                use_cache=self.states is not None,
                **self.of_states,
            ).last_hidden_state[:, -1]

    def __call__(self) -> None:
        own = (self.own_length - 1).clamp(min=0).long()
        block = self.own_blocks.gather(1, (own // BLOCK)[:, None])[:, 0]
        self.slot.copy_((block * BLOCK + own % BLOCK).where(self.live, -1))
        logits = self.parts.logits(self._hidden())
        drawn = draw_tokens(logits, self.suppressed, self.position.long() + 1, **self.settings)
        self.tokens.index_copy_(0, self.at, drawn.token[None])
        self.logprobs.index_copy_(0, self.at, torch.stack((drawn.logprob_full, drawn.logprob))[None])
        self.at += 1
        ended = (drawn.token[:, None] == self.stop).any(1) | drawn.logprob_full.isnan()
        self.live &= ~(ended | (self.own_length + 1 >= self.limit))
        self.token.copy_(drawn.token.where(self.live, self.token))
        self.own_length += self.live
        self.position += self.live


class Runner:
    """Steps of all sizes over one cache. On CUDA each size is captured at its first use and replayed from then on.

    check_every: How many steps run before the host reads their results, for which it has to wait for the device.
    """

    def __init__(self, parts: CausalLM, cache: KVCache):
        self.parts, self.cache = parts, cache
        self.fused: FusedBackbone | None = None  # used in place of the backbone's own forward
        self.cuda = cache.device.type == "cuda"
        self.check_every = 16 if self.cuda else 1
        self._pool = torch.cuda.graph_pool_handle() if self.cuda else None  # all graphs share one memory pool
        self._weights: Hashable = None
        self._adapters: Hashable = None
        self._captured: dict[tuple[Hashable, Sizes], tuple[Step, Callable[[], object]]] = {}

    def use(self, weights: Hashable, adapters: Hashable) -> None:
        """Sets the addresses of the weights and the active adapters of the next steps.

        A graph is valid only for the addresses that it was captured with.
        """
        if weights != self._weights:
            self._captured.clear()
        self._weights, self._adapters = weights, adapters

    def load(
        self,
        rows: Sequence[Row],
        shared: Sequence[Shared],
        draws: Sequence[Draw],
        states: Sequence[State] | None = None,
        ahead: Sequence[int] = (),
    ) -> tuple[Step, Callable]:
        """A step whose tables hold these rows, and the function that advances it by one token.

        Args:
            states: In a hybrid model, the recurrent state of each row.
            ahead: For each row, its rotary position minus its number of tokens; empty if that is 0 for all rows.
        """
        sizes = Sizes.of(rows, shared, draws, self.check_every)
        if not self.cuda:  # new buffers cost next to nothing on a CPU
            step = self._step(sizes, states)
            advance: Callable[[], object] = step
        else:
            key = self._adapters, sizes.rounded()
            if key not in self._captured:
                self._captured[key] = self._capture(self._step(sizes.rounded(), states))
            step, advance = self._captured[key]
            if states is not None:
                assert step.states is not None
                step.states.load(states)
        step.load(rows, shared, draws, ahead)
        return step, advance

    def _step(self, sizes: Sizes, states: Sequence[State] | None) -> Step:
        step = Step(self.parts, self.cache, sizes, self.fused)
        if states is not None:  # entries of the batch without a row need some state, too
            places = [*states, *[states[0]] * (sizes.rows - len(states))]
            step.states = States(self.parts.base.config.get_text_config(), places)
            step.of_states = {cache_keyword(self.parts.backbone): step.states}
            step.of_states |= _recurrent.step_keywords(self.parts.text)
        return step

    def _capture(self, step: Step) -> tuple[Step, Callable[[], object]]:
        """Captures a step as a CUDA graph, or returns the step itself if that fails.

        All rows are parked meanwhile, so that warm-up and capture do not write to the cache. They do change recurrent
        states, which are loaded afterwards.
        """
        try:
            stream = torch.cuda.Stream(self.cache.device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # compiles kernels, makes workspaces
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                step()
            return step, graph.replay
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            log.warning("the decode step runs without a CUDA graph: %s", error)
            _fallbacks.note(f"the decode step runs without a CUDA graph: {error}")
            return step, step
