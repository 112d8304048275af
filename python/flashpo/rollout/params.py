"""The types that a rollout takes and returns: SamplingParams, Rollouts and RolloutStats."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from flashpo.rollout.arguments import SMALLEST_NORMAL, integer, items, kind, number

MOST_COMPLETIONS = 2**20  # for one prompt; a Python object is made for each completion before any of them starts
FINISH_REASONS = ("stop", "length", "nan")


@dataclass(frozen=True)
class SamplingParams:
    """How the completions of one prompt are sampled, and when they end.

    The filters apply in the same order as in transformers: temperature, top-k, top-p, min-p. A completion ends with the
    first token that is in `stop_token_ids` or that completes a string of `stop_strings`, at the latest after
    `max_new_tokens` tokens. The token that ends it is part of the completion. The random number of a token depends on
    the seed, the index of the prompt in the call, the index of the completion within its prompt, and the token's
    position. It does not depend on what else runs at the same time.

    Args:
        n: The number of completions of the prompt, from 1 to 2^20.
        temperature: The logits are divided by it. 0 always takes the most probable token (greedy).
        top_k: Only this many of the most probable tokens can be drawn; at most 2^63 - 1. 0 keeps all tokens.
        top_p: Only the most probable tokens that together reach this probability can be drawn; in (0, 1]. 1 keeps all
            tokens.
        min_p: Only tokens can be drawn whose probability is at least `min_p` times that of the most probable token; in
            [0, 1]. 0 keeps all tokens.
        max_new_tokens: The largest number of tokens in a completion, from 1 to 2^31 - 1.
        stop_token_ids: Token ids that end a completion.
        stop_strings: Texts that end a completion. The engine needs a tokenizer to find them.
        suppress_token_ids: Token ids that are never drawn. Ids outside the vocabulary have no effect.
        seed: From 0 to 2^63 - 1.

    Raises:
        TypeError, ValueError: An argument is wrong. The message names it.
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
        object.__setattr__(self, name, value)  # the dataclass is frozen, and this runs while it is constructed

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def truncated(self) -> bool:
        """Whether a filter excludes tokens, so that `Rollouts.truncated_logprobs` differ from `logprobs`."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0 or len(self.suppress_token_ids) > 0


@dataclass(frozen=True, kw_only=True)
class RolloutStats:
    """What one call of `RolloutEngine.generate` cost.

    Attributes:
        tokens: The number of sampled tokens.
        seconds: The duration of the whole call.
        steps: The number of decode steps.
        prefill_tokens: Tokens computed by prefills. This includes tokens that were computed again after a preemption or
            after their cache blocks were freed.
        prefill_tokens_saved: How many more tokens would have been prefilled if each completion had prefilled its prompt
            by itself.
        peak_rows: The largest number of completions that were decoded at once.
        mean_rows: The mean number of completions in a decode step.
        cache_bytes: The size of the KV cache.
        peak_cache_bytes: The bytes of the KV cache that were in use when most of its blocks were.
        preemptions: How often a completion lost its blocks to others and had to be prefilled again.
        nan_rows: The number of completions that NaN logits ended.
        gather_bytes: The bytes of weights that FSDP2 brought to this rank; 0 where the weights are not sharded.
        gather_seconds: How long that took.
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
        """Sampled tokens per second of the whole call."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """The completions that a rollout has sampled, as lists with one entry for each completion.

    The completions of prompt 0 come first, then those of prompt 1, and so on; `reordered` changes the order.

    Attributes:
        prompt_index: The index of the completion's prompt in the call.
        prompt_ids: The token ids of the prompt.
        completion_ids: The sampled token ids, at least one, the stop token included.
        logprobs: The log-probability of each sampled token over the full vocabulary at the sampling temperature (for
            greedy sampling at temperature 1). A trainer computes the same quantity again.
        truncated_logprobs: The log-probability of each sampled token under the filtered and renormalised distribution
            that it was drawn from. Where nothing was filtered, an entry is the same list as in `logprobs`.
        finish_reasons: "stop", "length", or "nan" if NaN logits ended the completion.
        stats: What the call cost.

    Raises:
        ValueError: The lists have different lengths, a completion is empty, or a finish reason is unknown.
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
        """The same completions in another order: completion i becomes entry `places[i]` of the result.

        Args:
            places: A permutation of 0 to len(self) - 1.

        Raises:
            ValueError: `places` is no such permutation.
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
