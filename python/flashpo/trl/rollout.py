"""Generation for GRPO, RLOO, PPO and distillation by `flashpo.rollout`, with the weights that the trainer trains.

In each turn of generation TRL passes prompts as token ids, each prompt as many times as it is to be completed. The
engine gets each distinct prompt once. If the engine cannot generate, TRL does, after one warning with the reason.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from flashpo._causal_lm import CausalLM
from flashpo._hosts import sharding
from flashpo._hosts.transformers import default_generation_params, merged_generation_config
from flashpo._hosts.trl import generating
from flashpo._memory import out_of_memory
from flashpo.ops.masked_quantile import masked_quantile
from flashpo.packing.images import GENERATED, Images, shared
from flashpo.packing.support import why_no_images
from flashpo.rollout import RolloutEngine, Rollouts, SamplingParams, support
from flashpo.rollout.images import of_prompts
from flashpo.trl import switches
from flashpo.trl._fallback import Fallback
from flashpo.trl._precision import autocast_dtype
from flashpo.trl._text_only import beside_text
from flashpo.trl.images import KNOWN, counted

log = logging.getLogger("flashpo")
SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "max_new_tokens", "eos_token_id", "stop_strings", "suppress_tokens",
    "do_sample",
)  # fmt: skip
# Options of transformers that do not change what is sampled
STORAGE = (
    "pad_token_id", "bos_token_id", "decoder_start_token_id", "max_length", "use_cache", "cache_implementation",
    "cache_config", "disable_compile", "compile_config", "return_dict_in_generate", "transformers_version",
    "prefill_chunk_size", "_from_model_config", "_commit_hash",
)  # fmt: skip


class CannotGenerate(Exception):
    """The engine cannot generate this turn, so TRL does; the text is the reason. It never leaves this file."""


class TrainerRollouts:
    """The rollout engine of one trainer, which is made when it is first needed."""

    def __init__(self, trainer):
        self.trainer = trainer
        switch = switches.current().why_no_rollout
        self.mode: str = "generate" if switch else getattr(_args(trainer), "rollout", "auto")
        self._off = switch or "rollout='generate'"
        self.engine: RolloutEngine | None = None
        self._said_uncorrected = False
        strict = "rollout='engine', but {reason}" if self.mode == "engine" else None
        self.refuse = Fallback("FlashPO's rollout engine does not generate here: {reason}. TRL does.", strict)
        self._session: contextlib.ExitStack | None = None  # not None within a session, even if there is no engine yet

    def why_not(self) -> str:
        """Why the engine will not generate, as far as that is known now; empty if nothing prevents it."""
        trainer = self.trainer
        if self.mode == "generate" or self.refuse.first:
            return self.refuse.first if self.mode != "generate" else self._off
        try:
            self._check_turn([], None, None)
            # `support` runs the model, and the other ranks do not call it now
            if trainer._has_whole_models and not sharding.meets(trainer.model):
                sampling_params(trainer.model, trainer.generation_config)
                return support(trainer.model).reason
        except CannotGenerate as reason:
            return str(reason)
        return ""

    def generate(self, prompt_ids: list[list[int]], images, multimodal_fields) -> Rollouts | None:
        """One completion for each prompt, in the order of the prompts; None if TRL has to generate."""
        rollouts = None if self.mode == "generate" else self._by_engine(prompt_ids, images, multimodal_fields)
        if self._session is None:
            self.forget_turns()
        self._turns.append(rollouts is not None)
        return rollouts

    @property
    def _turns(self) -> list[bool]:
        return self.trainer._pending.turns

    def forget_turns(self) -> None:
        """Called when a new batch of generations begins."""
        self._turns.clear()

    @property
    def generated(self) -> bool:
        """Whether the engine generated all turns of the last batch."""
        return bool(self._turns) and all(self._turns)

    def unknown(self, completion_ids: list[list[int]]) -> list[list[float]] | None:
        """Log-probs for a turn that TRL generated without any: NaN for each token if the engine generated an earlier
        turn, because TRL then joins the log-probs of all turns; otherwise None."""
        behind = self._session is not None and any(self._turns)
        return [[math.nan] * len(ids) for ids in completion_ids] if behind else None

    def say_uncorrected(self) -> None:
        """Log once that the sampler's log-probs are not compared with those of a forward with dropout."""
        if not self._said_uncorrected and self.trainer.args.vllm_importance_sampling_correction:
            log.info(
                "The model trains with dropout or other noise, without which it samples: completions are not weighed "
                "by the mismatch between sampler and trainer. rollout_correction='scored' measures it without noise."
            )
        self._said_uncorrected = True

    def _by_engine(self, prompt_ids: list[list[int]], images, multimodal_fields) -> Rollouts | None:
        sharded_bytes, begin = sharding.zero3_bytes(self.trainer.model), time.perf_counter()
        try:
            # this check comes before weights are gathered
            shown = self._agreed(self._check_turn, prompt_ids, images, multimodal_fields)
            self._all_show(shown is not None)
            with generating(self.trainer, "flashpo.rollout") as model, torch.no_grad():
                gathered = sharding.Gathered(sharded_bytes, time.perf_counter() - begin)
                params = self._agreed(self._prepare, model, prompt_ids, shown)
                rollouts = self._agreed(self._generate, prompt_ids, params, shown)
        except CannotGenerate as reason:
            self.refuse(str(reason))
            return None
        shared[GENERATED] += shown is not None
        self._log(rollouts, gathered)
        return rollouts

    def _agreed(self, check: Callable, *arguments) -> Any:
        """What `check` returns.

        If the model's forwards have collectives, and `check` raises CannotGenerate on one rank, all ranks raise it.
        Ranks that generated in different ways would wait for each other forever.
        """
        result, reason = None, ""
        try:
            result = check(*arguments)
        except CannotGenerate as error:
            reason = str(error)
        if sharding.meets(self.trainer.model):
            reason = next(filter(None, gather_object([reason])), "")
        if reason:
            raise CannotGenerate(reason)
        return result

    def _all_show(self, shows: bool) -> None:
        """Raise CannotGenerate if forwards have collectives and only some ranks have images: the others would not join
        the comparison with images."""
        if sharding.meets(self.trainer.model) and len({*gather_object([shows])}) > 1:
            raise CannotGenerate("only some processes have prompts with images, and the model is sharded over them")

    def _check_turn(self, prompt_ids, images, multimodal_fields) -> Images | None:
        """The images of the prompts, if they have any.

        Raises:
            CannotGenerate: the engine cannot read the images or other inputs of the prompts, or an option excludes it.
        """
        for option in ("use_vllm", "use_transformers_continuous_batching"):
            if getattr(self.trainer, option, False):
                raise CannotGenerate(f"{option} is set")
        found = beside_text(self.trainer.model, multimodal_fields or {})
        if images is not None and any(images):  # for each prompt a list of images, or None
            if reason := why_no_images(CausalLM.of(self.trainer.model).backbone):
                raise CannotGenerate(f"the prompts have images: {reason}")
            if reason := sharding.why_no_tower(self.trainer.model):
                raise CannotGenerate(f"the prompts have images: {reason}")
            if "pixel_values" not in found:
                raise CannotGenerate("the prompts have images, of which the processor gave no pixel_values")
            found |= counted(found, images)
        if not found:
            return None
        if unknown := [name for name in found if name not in KNOWN or "pixel_values" not in found]:
            raise CannotGenerate(f"the prompts have {', '.join(unknown)}")
        try:
            return of_prompts(self.trainer.model, prompt_ids, found)
        except (TypeError, ValueError) as error:
            raise CannotGenerate(f"the prompts have images: {error}") from None

    def _prepare(self, model, prompt_ids: list[list[int]], shown: Images | None) -> SamplingParams:
        """Make the engine if there is none yet, and check that it can complete these prompts.

        Raises:
            CannotGenerate: it cannot.
        """
        trainer = self.trainer
        params = sampling_params(model, trainer.generation_config)
        if self.engine is None:
            found = support(model)
            if not found.ok:
                raise CannotGenerate(found.reason)
            options = getattr(_args(trainer), "rollout_options", None) or {}
            fallback = "error" if self.mode == "engine" else "generate"  # what to do if memory runs out
            autocast = autocast_dtype(trainer.accelerator)
            options = {"tokenizer": trainer._tokenizer, "autocast": autocast, "fallback": fallback} | options
            if sharding.meets(trainer.model):
                options["fallback"] = "error"  # a rank that generated alone would wait for the weights of the others
            self.engine = RolloutEngine(model, **options)
            if self._session is not None:
                self._session.enter_context(self.engine.session())
        if reason := self.engine.why_not() or self.engine.why_not_images(prompt_ids, shown):
            raise CannotGenerate(reason)
        longest = self.engine.support.longest
        if longest is not None and max(map(len, prompt_ids), default=0) + params.max_new_tokens > longest:
            raise CannotGenerate(f"a prompt with max_completion_length passes the {longest} positions of the model")
        return params

    def _generate(self, prompt_ids: list[list[int]], params: SamplingParams, shown: Images | None) -> Rollouts:
        assert self.engine is not None
        rows_of: dict[tuple, list[int]] = {}
        for row, ids in enumerate(prompt_ids):
            images = () if shown is None else tuple(shown.code[row].tolist())
            rows_of.setdefault((tuple(ids), images), []).append(row)
        # Drawn from torch's generator, so that each rank has another seed and a resumed run has the same one
        params = replace(params, seed=int(torch.randint(2**62, ())))
        first = torch.tensor([rows[0] for rows in rows_of.values()], device="cpu")
        try:
            rollouts = self.engine.generate(
                [list(ids) for ids, _ in rows_of],
                [replace(params, n=len(rows)) for rows in rows_of.values()],
                images=None if shown is None else shown.rows(first),
            )
        except (RuntimeError, MemoryError) as error:
            if not (out_of_memory(error) and sharding.meets(self.trainer.model)):
                raise
            raise CannotGenerate(f"a process has no memory left for it: {error}") from None
        return rollouts.reordered([row for rows in rows_of.values() for row in rows])

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Within the block the KV cache keeps what earlier turns computed, so that a turn costs only its new tokens.

        If `rollout_release` is set, the cache and all copies of weights are freed at the end.
        """
        with contextlib.ExitStack() as self._session:
            self.forget_turns()
            if self.engine is not None:
                self._session.enter_context(self.engine.session())
            try:
                yield
            finally:
                self._session = None
        if self.engine is not None and getattr(_args(self.trainer), "rollout_release", False):
            self.engine.release()

    def _log(self, rollouts: Rollouts, gathered: sharding.Gathered) -> None:
        """Log the statistics of a rollout. `gathered`: the weights that TRL gathered for it."""
        metrics, stats, phases = self.trainer._metrics[self.trainer._mode], rollouts.stats, self.trainer._phases
        prompts = stats.prefill_tokens + stats.prefill_tokens_saved
        phases.count(prefill=prompts, prefill_saved=stats.prefill_tokens_saved, sampled=stats.tokens)
        phases.cache_bytes = max(phases.cache_bytes, stats.cache_bytes)
        gathered += sharding.Gathered(stats.gather_bytes, stats.gather_seconds)
        if gathered.size:
            metrics["rollout/gather_bytes"].append(gathered.size)
            metrics["rollout/gather_seconds"].append(gathered.seconds)
        metrics["rollout/tokens_per_second"].append(stats.tokens_per_second)
        metrics["rollout/prefill_tokens_saved"].append(stats.prefill_tokens_saved)
        metrics["rollout/cache_bytes"].append(stats.cache_bytes)
        metrics["rollout/nan_completions"].append(rollouts.finish_reasons.count("nan"))


def _args(trainer) -> Any:
    """The trainer's arguments; None if its constructor did not run."""
    return getattr(trainer, "args", None)


def sampling_params(model: PreTrainedModel, config: GenerationConfig) -> SamplingParams:
    """The SamplingParams that do what `model.generate(generation_config=config)` does.

    Raises:
        CannotGenerate: an option has no counterpart; the message names it.
    """
    merged = merged_generation_config(model, config)
    neutral = default_generation_params()
    for name, value in merged.to_diff_dict().items():
        if name not in SAMPLING + STORAGE and value not in (None, False, neutral.get(name)):
            raise CannotGenerate(f"the generation option {name}={value!r} is set")
    total = config.max_length, model.generation_config.max_length  # if both are None, the default counts new tokens
    if merged.max_new_tokens is None and any(length is not None for length in total):
        raise CannotGenerate("max_length is set without max_new_tokens: it counts the padded prompt, too")
    stop = merged.eos_token_id
    stop_strings = merged.stop_strings or ()
    return SamplingParams(
        temperature=merged.temperature if merged.do_sample else 0.0,
        top_k=merged.top_k or 0,
        top_p=1.0 if merged.top_p is None else merged.top_p,
        min_p=merged.min_p or 0.0,
        max_new_tokens=merged.max_length if merged.max_new_tokens is None else merged.max_new_tokens,
        stop_token_ids=() if stop is None else tuple(torch.as_tensor(stop).reshape(-1).tolist()),
        stop_strings=(stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings),
        suppress_token_ids=tuple(merged.suppress_tokens or ()),
    )


MISMATCH = ("mean", "max", "ratio_q01", "ratio_q50", "ratio_q99", "effective_sample_size")


def mismatch(trained: Tensor, sampled: Tensor, mask: Tensor) -> Tensor:
    """How far the trainer's log-probs are from the rollout's over live tokens: (numbers of MISMATCH, number of tokens).

    The numbers are mean and maximum of |trained - sampled|, three quantiles of the ratio w = exp(trained - sampled),
    and the effective sample size as a share, (sum w)^2 / (n sum w^2).
    """
    live = (mask != 0) & ~sampled.isnan()
    log_ratio = torch.where(live, trained.detach() - sampled, 0.0)
    tokens = live.sum()
    w = log_ratio.exp() * live
    quantiles = masked_quantile(log_ratio, live, (0.01, 0.5, 0.99)).exp().nan_to_num(nan=1.0)
    size = w.sum() ** 2 / (tokens * (w * w).sum()).clamp(min=torch.finfo(w.dtype).tiny)
    error = log_ratio.abs()
    return torch.stack([error.sum() / tokens.clamp(min=1), error.max(), *quantiles, size, tokens.float()])


def merged(rows: Tensor) -> Tensor:
    """Merge the rows of several micro-batches or ranks: the maximum of the maxima, means of the other numbers weighted
    by tokens."""
    tokens = rows[:, -1].sum()
    row = (rows * rows[:, -1:]).sum(0) / tokens.clamp(min=1)
    row[MISMATCH.index("max")] = rows[:, MISMATCH.index("max")].max()
    row[-1] = tokens
    return row


def mismatch_metrics(rows: Tensor) -> dict[str, float]:
    """The metrics of several micro-batches or ranks. Empty if no token was compared.

    rows: (micro-batches or ranks, numbers of `mismatch`).
    """
    *values, tokens = merged(rows.double()).tolist()
    return {f"rollout/mismatch/{name}": value for name, value in zip(MISMATCH, values)} if tokens else {}


def importance_fields(args: Any, surrogate: str) -> dict[str, Any]:
    """The fields of a LossSpec that weigh by r = pi_trainer / pi_rollout, from TRL's options for vLLM's mismatch."""
    if not args.vllm_importance_sampling_correction:
        return {}
    mode = args.vllm_importance_sampling_mode
    return {
        # vespo itself combines the weights of tokens into the weight of their sequence
        "importance": mode.replace("sequence", "token") if surrogate == "vespo" else mode,
        "importance_min": args.vllm_importance_sampling_clip_min,
        "importance_max": args.vllm_importance_sampling_clip_max,
    }
