"""What a rollout is asked for and what it returns: SamplingParams, Rollouts, RolloutStats."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

FINISH_REASONS = ("stop", "length", "nan")


@dataclass(frozen=True)
class SamplingParams:
    """How one prompt is continued.

    The filters follow transformers' order: temperature, top-k, top-p, min-p. A completion ends with a token of
    `stop_token_ids` or with the token that completes a string of `stop_strings` (both are part of it), else after
    `max_new_tokens`. Its random numbers are keyed by (seed, index of the prompt in the call, index of the completion
    within its prompt) and by the token's position: they do not depend on what else runs.

    Args:
        n: completions of the prompt.
        temperature: divides the logits; 0: the most probable token (greedy).
        top_k: keep this many tokens; 0: all.
        top_p: keep the most probable tokens until they hold this mass, in (0, 1]; 1: all.
        min_p: keep tokens at least this times as probable as the most probable, in [0, 1]; 0: all.
        max_new_tokens: longest completion, at least 1.
        stop_token_ids: ids that end a completion.
        stop_strings: texts that end a completion; they need the engine's tokenizer.
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
    seed: int = 0

    def __post_init__(self):
        for name, low in (("n", 1), ("top_k", 0), ("max_new_tokens", 1), ("seed", 0)):
            self._set(name, _integer(name, getattr(self, name), low))
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2^63, not {self.seed}")
        for name in ("temperature", "top_p", "min_p"):
            self._set(name, _number(name, getattr(self, name)))
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], not {self.min_p}")
        self._set("stop_token_ids", tuple(_integer("stop_token_ids", x, 0) for x in _items(self, "stop_token_ids")))
        self._set("stop_strings", _items(self, "stop_strings"))
        for text in self.stop_strings:
            if not isinstance(text, str):
                raise TypeError(f"stop_strings must be strings, not {type(text).__name__}")
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
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def _items(params: SamplingParams, name: str) -> tuple:
    value = getattr(params, name)
    if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
        raise TypeError(f"{name} must be a sequence, not {type(value).__name__}")
    return tuple(value)


def _integer(name: str, value: Any, low: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
    value = operator.index(value)
    if value < low:
        raise ValueError(f"{name} must be at least {low}, not {value}")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool | str) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, not {value}")
    return float(value)


@dataclass(frozen=True, kw_only=True)
class RolloutStats:
    """What a rollout cost.

    tokens: sampled. seconds: of the whole call. steps: decode steps. prefill_tokens: computed before decoding, those
    recomputed after a preemption or an eviction included. prefill_tokens_saved: what prefilling every completion's
    prompt by itself would have cost more. peak_rows and mean_rows: rows decoded at once. cache_bytes: of the block
    pool. peak_cache_bytes: of its blocks in use when it was fullest. preemptions: rows that lost their blocks to others
    and were recomputed. nan_rows: completions ended by NaN logits.
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
