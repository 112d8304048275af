"""What a rollout is asked for and what it returns: SamplingParams, Rollouts, RolloutStats."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from flashpo.rollout.arguments import SMALLEST_NORMAL, integer, items, kind, number

MOST_COMPLETIONS = 2**20  # of one prompt: each is an object from the beginning
FINISH_REASONS = ("stop", "length", "nan")


@dataclass(frozen=True)
class SamplingParams:
    """How one prompt is continued.

    The filters follow transformers' order: temperature, top-k, top-p, min-p. A completion ends with a token of
    `stop_token_ids` or with the token that completes a string of `stop_strings` (both are part of it), else after
    `max_new_tokens`. Its random numbers are keyed by (seed, index of the prompt in the call, index of the completion
    within its prompt) and by the token's position: they do not depend on what else runs.

    Args:
        n: completions of the prompt, up to 2^20.
        temperature: divides the logits; 0: the most probable token (greedy).
        top_k: keep this many tokens, below 2^63; 0: all.
        top_p: keep the most probable tokens until they hold this mass, in (0, 1]; 1: all.
        min_p: keep tokens at least this times as probable as the most probable, in [0, 1]; 0: all.
        max_new_tokens: longest completion, in [1, 2^31).
        stop_token_ids: ids that end a completion.
        stop_strings: texts that end a completion; they need the engine's tokenizer.
        suppress_token_ids: ids that are never drawn; those outside of the vocabulary change nothing.
        seed: in [0, 2^63).

    Raises:
        TypeError, ValueError: naming the argument.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 256
    stop_token_ids: Sequence[int] = ()
    stop_strings: Sequence[str] = ()
    suppress_token_ids: Sequence[int] = ()
    seed: int = 0

    def __post_init__(self):
        for name, low, high in (
            ("n", 1, MOST_COMPLETIONS),
            ("top_k", 0, 2**63 - 1),
            ("max_new_tokens", 1, 2**31 - 1),
            ("seed", 0, 2**63 - 1),
        ):
            self._set(name, integer(name, getattr(self, name), low, high))
        self._set("temperature", number("temperature", self.temperature, 0))
        if 0 < self.temperature < SMALLEST_NORMAL:
            raise ValueError(f"temperature must be 0 or at least {SMALLEST_NORMAL}, not {self.temperature}")
        self._set("top_p", number("top_p", self.top_p, 0, 1))
        if self.top_p < SMALLEST_NORMAL:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")
        self._set("min_p", number("min_p", self.min_p, 0, 1))
        for name in ("stop_token_ids", "suppress_token_ids"):
            ids = (integer(name, token, 0) for token in items(name, getattr(self, name)))
            self._set(name, tuple(dict.fromkeys(ids)))
        self._set("stop_strings", tuple(items("stop_strings", self.stop_strings)))
        for text in self.stop_strings:
            if not isinstance(text, str):
                raise TypeError(f"stop_strings must be strings, not {kind(text)}")
            if not text:
                raise ValueError("stop_strings must not be empty: an empty string would stop everything")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen; this is its construction

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def truncated(self) -> bool:
        """Whether some tokens can never be drawn, so that `Rollouts.truncated_logprobs` differ from `logprobs`."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0 or len(self.suppress_token_ids) > 0


@dataclass(frozen=True, kw_only=True)
class RolloutStats:
    """What a rollout cost.

    tokens: sampled. seconds: of the whole call. steps: decode steps. prefill_tokens: computed before decoding, those
    recomputed after a preemption or an eviction included. prefill_tokens_saved: what prefilling every completion's
    prompt by itself would have cost more. peak_rows and mean_rows: rows decoded at once. cache_bytes: of the block
    pool. peak_cache_bytes: of its blocks in use when it was fullest. preemptions: rows that lost their blocks to others
    and were recomputed. nan_rows: completions ended by NaN logits. gather_bytes, gather_seconds: of the weights that
    FSDP2 had to bring to this rank, and how long that took; 0 where weights are whole.
    """

    tokens: int
    seconds: float
    steps: int
    prefill_tokens: int
    prefill_tokens_saved: int
    peak_rows: int
    mean_rows: float
    cache_bytes: int
    peak_cache_bytes: int
    preemptions: int
    nan_rows: int
    gather_bytes: int = 0
    gather_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Completions, flat: prompt 0's, then prompt 1's, and so on (until `reordered`); every list has one entry for each.

    prompt_index: which prompt of the call. prompt_ids: its tokens. completion_ids: at least one token each, the stop
    token included. logprobs: of each token over the full vocabulary at the sampling temperature (greedy: at 1), which
    is what a trainer computes again. truncated_logprobs: under the filtered, renormalised distribution it was drawn
    from; the same object as `logprobs` where nothing was filtered. finish_reasons: "stop", "length" or "nan".

    Raises:
        ValueError: the lists disagree, or an entry is none that a rollout can have.
    """

    prompt_index: list[int]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    logprobs: list[list[float]]
    truncated_logprobs: list[list[float]]
    finish_reasons: list[str]
    stats: RolloutStats

    def __post_init__(self):
        for name in self._columns():
            if len(getattr(self, name)) != len(self):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {len(self)} completions")
        if any(not ids for ids in self.completion_ids):
            raise ValueError("completion_ids: every completion has at least one token")
        for name in ("logprobs", "truncated_logprobs"):
            if [len(x) for x in getattr(self, name)] != [len(ids) for ids in self.completion_ids]:
                raise ValueError(f"{name} must have one entry for each token of completion_ids")
        if wrong := set(self.finish_reasons) - set(FINISH_REASONS):
            raise ValueError(f"finish_reasons must be among {FINISH_REASONS}, not {sorted(wrong)}")

    def __len__(self) -> int:
        return len(self.prompt_index)

    def reordered(self, places: Sequence[int]) -> "Rollouts":
        """Completion i of these stands at places[i] of the result.

        Raises:
            ValueError: `places` is not a permutation of 0 to len - 1.
        """
        if sorted(places) != list(range(len(self))):
            raise ValueError(f"places must be a permutation of 0 to {len(self) - 1}")
        sources = sorted(range(len(self)), key=lambda i: places[i])
        columns: dict[str, Any] = {name: [getattr(self, name)[i] for i in sources] for name in self._columns()}
        if self.truncated_logprobs is self.logprobs:
            columns["truncated_logprobs"] = columns["logprobs"]
        return replace(self, **columns)

    def _columns(self) -> list[str]:
        return [field.name for field in fields(self) if field.name != "stats"]
