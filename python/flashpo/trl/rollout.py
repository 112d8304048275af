"""Generation for GRPO, RLOO, PPO and distillation by `flashpo.rollout`, on the weights that the trainer is training.

A turn of generation comes with prompts as token ids, each as often as it is to be completed. The engine gets every
distinct one once. What it cannot do goes to TRL's own generation, with one warning that names the reason.
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
from flashpo.ops.masked_quantile import masked_quantile
from flashpo.packing.images import GENERATED, Images, shared
from flashpo.packing.support import why_no_images
from flashpo.rollout import RolloutEngine, Rollouts, SamplingParams, support
from flashpo.rollout.cache import out_of_memory
from flashpo.rollout.images import of_prompts
from flashpo.trl import switches
from flashpo.trl._fallback import Fallback
from flashpo.trl._precision import autocast_dtype
from flashpo.trl._text_only import beside_text
from flashpo.trl.images import KNOWN

log = logging.getLogger("flashpo")
SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "max_new_tokens", "eos_token_id", "stop_strings", "suppress_tokens",
    "do_sample",
)  # fmt: skip
# Options of transformers that change nothing in what is sampled.
STORAGE = (
    "pad_token_id", "bos_token_id", "decoder_start_token_id", "max_length", "use_cache", "cache_implementation",
    "cache_config", "disable_compile", "compile_config", "return_dict_in_generate", "transformers_version",
    "prefill_chunk_size", "_from_model_config", "_commit_hash",
)  # fmt: skip


class Unsupported(Exception):
    """Why the engine does not generate; the text is the reason."""


class TrainerRollouts:
    """The engine of one trainer, made when it is first needed."""

    def __init__(self, trainer):
        self.trainer = trainer
        switch = switches.current().why_no_rollout
        self.mode: str = "generate" if switch else getattr(_args(trainer), "rollout", "auto")
        self._off = switch or "rollout='generate'"
        self.engine: RolloutEngine | None = None
        self._said_uncorrected = False
        strict = "rollout='engine', but {reason}" if self.mode == "engine" else None
        self.refuse = Fallback("FlashPO's rollout engine does not generate here: {reason}. TRL does.", strict)
        self._session: contextlib.ExitStack | None = None  # open, whether or not there is an engine yet

    def why_not(self) -> str:
        """What is known to be against the engine before it generates, empty where nothing is."""
        trainer = self.trainer
        if self.mode == "generate" or self.refuse.first:
            return self.refuse.first if self.mode != "generate" else self._off
        try:
            self._check_turn([], None, None)
            if trainer._has_whole_models and not sharding.meets(trainer.model):  # no other rank asks
                sampling_params(trainer.model, trainer.generation_config)
                return support(trainer.model).reason
        except Unsupported as reason:
            return str(reason)
        return ""

    def generate(self, prompt_ids: list[list[int]], images, multimodal_fields) -> Rollouts | None:
        """One completion of each prompt, in their order; None: TRL has to generate."""
        rollouts = None if self.mode == "generate" else self._by_engine(prompt_ids, images, multimodal_fields)
        if self._session is None:
            self.forget_turns()
        self._turns.append(rollouts is not None)
        return rollouts

    @property
    def _turns(self) -> list[bool]:
        return self.trainer._pending.turns

    def forget_turns(self) -> None:
        """A new batch of generations begins."""
        self._turns.clear()

    @property
    def generated(self) -> bool:
        """Whether the last batch came from the engine, with all of its turns."""
        return bool(self._turns) and all(self._turns)

    def unknown(self, completion_ids: list[list[int]]) -> list[list[float]] | None:
        """For a turn that TRL has generated: NaN where TRL adds its log-probs to those of earlier turns."""
        behind = self._session is not None and any(self._turns)
        return [[math.nan] * len(ids) for ids in completion_ids] if behind else None

    def say_uncorrected(self) -> None:
        """Once, that the sampler's log-probs are not compared with those of a forward with dropout."""
        if not self._said_uncorrected and self.trainer.args.vllm_importance_sampling_correction:
            log.info(
                "The model trains with dropout or other noise, without which it samples: completions are not weighed "
                "by the mismatch between sampler and trainer. rollout_correction='scored' measures it without noise."
            )
        self._said_uncorrected = True

    def _by_engine(self, prompt_ids: list[list[int]], images, multimodal_fields) -> Rollouts | None:
        sharded_bytes, begin = sharding.zero3_bytes(self.trainer.model), time.perf_counter()
        try:
            # before weights are gathered
            shown = self._agreed(self._check_turn, prompt_ids, images, multimodal_fields)
            with generating(self.trainer, "flashpo.rollout") as model, torch.no_grad():
                gathered = sharding.Gathered(sharded_bytes, time.perf_counter() - begin)
                params = self._agreed(self._prepare, model, prompt_ids, shown)
                rollouts = self._agreed(self._generate, prompt_ids, params, shown)
        except Unsupported as reason:
            self.refuse(str(reason))
            return None
        shared[GENERATED] += shown is not None
        self._log(rollouts, gathered)
        return rollouts

    def _agreed(self, check: Callable, *arguments) -> Any:
        """What `check` returns. Where a forward has collectives, all ranks raise Unsupported if it does on one of them:
        ranks that generate in two ways, or score what others need not, would wait for each other."""
        result, reason = None, ""
        try:
            result = check(*arguments)
        except Unsupported as error:
            reason = str(error)
        if sharding.meets(self.trainer.model):
            reason = next(filter(None, gather_object([reason])), "")
        if reason:
            raise Unsupported(reason)
        return result

    def _check_turn(self, prompt_ids, images, multimodal_fields) -> Images | None:
        """The images of the prompts; Unsupported where they have something else beside their tokens."""
        for option in ("use_vllm", "use_transformers_continuous_batching"):
            if getattr(self.trainer, option, False):
                raise Unsupported(f"{option} is set")
        found = beside_text(self.trainer.model, multimodal_fields or {})
        if images is not None and any(images):  # a list for each prompt, or None
            if reason := why_no_images(CausalLM.of(self.trainer.model).backbone):
                raise Unsupported(f"the prompts have images: {reason}")
            if sharding.meets(self.trainer.model):  # ranks without images would not meet those that compare with some
                raise Unsupported("the prompts have images, and the weights are sharded")
            if "num_tiles" not in found and "pixel_attention_mask" not in found:
                found["num_images"] = [len(own or ()) for own in images]
            if "pixel_values" not in found:
                raise Unsupported("the prompts have images, of which the processor gave no pixel_values")
        if not found:
            return None
        if unknown := [name for name in found if name not in KNOWN or "pixel_values" not in found]:
            raise Unsupported(f"the prompts have {', '.join(unknown)}")
        try:
            return of_prompts(self.trainer.model, prompt_ids, found)
        except (TypeError, ValueError) as error:
            raise Unsupported(f"the prompts have images: {error}") from None

    def _prepare(self, model, prompt_ids: list[list[int]], shown: Images | None) -> SamplingParams:
        """An engine that can answer these prompts, or Unsupported."""
        trainer = self.trainer
        params = sampling_params(model, trainer.generation_config)
        if self.engine is None:
            found = support(model)
            if not found.ok:
                raise Unsupported(found.reason)
            options = getattr(_args(trainer), "rollout_options", None) or {}
            fallback = "error" if self.mode == "engine" else "generate"  # where memory runs out
            autocast = autocast_dtype(trainer.accelerator)
            options = {"tokenizer": trainer._tokenizer, "autocast": autocast, "fallback": fallback} | options
            if sharding.meets(trainer.model):
                options["fallback"] = "error"  # what one rank went on with alone would wait for the others' weights
            self.engine = RolloutEngine(model, **options)
            if self._session is not None:
                self._session.enter_context(self.engine.session())
        if reason := self.engine.why_not() or self.engine.why_not_images(prompt_ids, shown):
            raise Unsupported(reason)
        longest = self.engine.support.longest
        if longest is not None and max(map(len, prompt_ids), default=0) + params.max_new_tokens > longest:
            raise Unsupported(f"a prompt with max_completion_length passes the {longest} positions of the model")
        return params

    def _generate(self, prompt_ids: list[list[int]], params: SamplingParams, shown: Images | None) -> Rollouts:
        assert self.engine is not None
        rows_of: dict[tuple, list[int]] = {}
        for row, ids in enumerate(prompt_ids):
            images = () if shown is None else tuple(shown.code[row].tolist())
            rows_of.setdefault((tuple(ids), images), []).append(row)
        # Drawn from torch's generator: another one on every rank, and the same again after a resume.
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
            raise Unsupported(f"a process has no memory left for it: {error}") from None
        return rollouts.reordered([row for rows in rows_of.values() for row in rows])

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Within it a turn costs its new tokens only: what earlier turns computed stays in the cache.

        Behind it nothing does with `rollout_release`, nor any copy of weights.
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

    def keep_as_old(self, logprobs: list[list[float]]) -> None:
        """Let the scoring of these completions that comes next be answered by what they were sampled with."""
        rows = [torch.tensor(row, dtype=torch.float32, device=self.trainer.accelerator.device) for row in logprobs]
        old = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        missing = -old.shape[1] % (getattr(self.trainer, "pad_to_multiple_of", None) or 1)
        self.trainer._pending.old = torch.nn.functional.pad(old, (0, missing))

    def take_old(self) -> Tensor | None:
        pending = self.trainer._pending
        old, pending.old = pending.old, None
        return old

    def _log(self, rollouts: Rollouts, gathered: sharding.Gathered) -> None:
        """`gathered`: by TRL, around the engine."""
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
    """None of a trainer whose constructor did not run."""
    return getattr(trainer, "args", None)


def sampling_params(model: PreTrainedModel, config: GenerationConfig) -> SamplingParams:
    """What `model.generate(generation_config=config)` would do, or Unsupported naming the option."""
    merged = merged_generation_config(model, config)
    neutral = default_generation_params()
    for name, value in merged.to_diff_dict().items():
        if name not in SAMPLING + STORAGE and value not in (None, False, neutral.get(name)):
            raise Unsupported(f"the generation option {name}={value!r} is set")
    total = config.max_length, model.generation_config.max_length  # None: the default counts new tokens
    if merged.max_new_tokens is None and any(length is not None for length in total):
        raise Unsupported("max_length is set without max_new_tokens: it counts the padded prompt, too")
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
    """How far the trainer's log-probs are from the rollout's over live tokens: the numbers of MISMATCH, and the tokens.

    mean and max of |trained - sampled|; quantiles of the ratio w = exp(trained - sampled); (sum w)^2 / (n sum w^2).
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
    """The row for several micro-batches or ranks: the maximum of the maxima, token-weighted means of the others."""
    tokens = rows[:, -1].sum()
    row = (rows * rows[:, -1:]).sum(0) / tokens.clamp(min=1)
    row[MISMATCH.index("max")] = rows[:, MISMATCH.index("max")].max()
    row[-1] = tokens
    return row


def mismatch_metrics(rows: Tensor) -> dict[str, float]:
    """Of micro-batches or ranks, (rows, numbers); none where no token was compared."""
    *values, tokens = merged(rows.double()).tolist()
    return {f"rollout/mismatch/{name}": value for name, value in zip(MISMATCH, values)} if tokens else {}


def importance_fields(args: Any, surrogate: str) -> dict[str, Any]:
    """Fields of a LossSpec for r = pi_trainer / pi_rollout, by TRL's options for the same mismatch of vLLM."""
    if not args.vllm_importance_sampling_correction:
        return {}
    mode = args.vllm_importance_sampling_mode
    return {
        # vespo gathers the weights of tokens into its sequence's own
        "importance": mode.replace("sequence", "token") if surrogate == "vespo" else mode,
        "importance_min": args.vllm_importance_sampling_clip_min,
        "importance_max": args.vllm_importance_sampling_clip_max,
    }
