"""RolloutEngine: samples completions of prompts with the live weights of a model that is being trained.

This file checks the arguments of a call and decides whether the engine or transformers' `generate` answers it. pool.py
has the KV cache, generation.py runs a call, and weights.py provides the weights that a rollout computes with.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from flashpo import _fallbacks
from flashpo._causal_lm import CausalLM, Unsupported
from flashpo._hosts import sharding
from flashpo._hosts.peft import active_adapter, adapter_states, why_not_by_layers
from flashpo._memory import out_of_memory
from flashpo.ops.tree_attention import release as release_tree_tiles
from flashpo.packing.images import ImageRows, Images
from flashpo.packing.support import why_no_images
from flashpo.rollout import fallback as plain
from flashpo.rollout import parity
from flashpo.rollout.arguments import choice, flag, integer, items, kind, number, token_ids
from flashpo.rollout.call import Call, by_adapter, progress_bar
from flashpo.rollout.fused import fused_backbone
from flashpo.rollout.generation import Completion, Generation
from flashpo.rollout.images import Shown, of_prompts, padded, placeholders
from flashpo.rollout.params import Rollouts, SamplingParams
from flashpo.rollout.pool import Pool
from flashpo.rollout.runner import Runner
from flashpo.rollout.scheduler import Scheduler
from flashpo.rollout.seam import eval_mode, rollout_mode
from flashpo.rollout.support import structure, support
from flashpo.rollout.weights import LORA, MODES, WeightView

log = logging.getLogger("flashpo")


class RolloutEngine:
    """Samples completions with a KV cache in which each distinct prompt token is computed and stored once.

    The engine changes the model only while a rollout runs (the attention implementation in its configs, train and eval
    flags, forwards of linear layers) and restores all of it at the end. It never writes the weights. The model may be
    wrapped by PEFT. The engine uses the weights as they are at each call, so a trainer need not announce updates.

    Args:
        model: A causal language model of transformers.
        tokenizer: Needed only for `stop_strings`.
        kv_memory: The largest size of the KV cache in bytes. The default is half of the memory that is free when the
            cache is first needed. The cache never takes more than the call can use (within a session, four times what
            its first call can use). It stays for the next call; `release` frees it.
        max_sequences: The largest number of completions that run at once. The default is as many as fit.
        expected_tokens: The expected length of a completion, used where memory is short. A completion then starts as
            soon as there is room for this many tokens; as completions end, their mean length takes its place. Where
            this was too few, some completions are preempted and computed again. By default a completion starts only
            when there is room for `max_new_tokens`.
        prefill_tokens: The largest number of prompt tokens in one forward.
        autocast: The dtype of the autocast region in which the trainer runs its forward; None if there is none.
        weights: Which weights linear layers compute with. "alias": the parameters. "shadow": copies in a faster form
            wherever there is one. "auto": copies where the parameters cannot be used as they are, for example under
            autocast, and on CPUs packed copies of the larger weights.
        lora: How LoRA adapters are computed. "live": `W x + s B A x`, as in training. "merged": `(W + s B A) x`.
            "auto": merged where the sum stays in fp32.
        fallback: What happens if the engine cannot run the model, or if memory is too short for even one completion.
            "generate": transformers' `generate` answers, after a warning that names the reason. "error": raise.
        check: Compare a short rollout with the model's plain forward before the first rollout of a class and config
            (see parity.py). Only this finds models that compute something in a way that the engine does not know.

    Raises:
        TypeError, ValueError: An argument is wrong. The message names it.
        Unsupported: The engine cannot run the model, and fallback is "error". The message gives the reason.
        ModelInUse: Another rollout of the model has not ended.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer=None,
        kv_memory: int | None = None,
        max_sequences: int | None = None,
        expected_tokens: float | None = None,
        prefill_tokens: int = 8192,
        autocast: torch.dtype | None = None,
        weights: str = "auto",
        lora: str = "auto",
        fallback: str = "generate",
        check: bool = True,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, not {kind(model)}")
        if next(model.parameters(), None) is None:
            raise ValueError(f"model must have parameters, {kind(model)} has none")
        if tokenizer is not None and not callable(getattr(tokenizer, "decode", None)):
            raise TypeError(f"tokenizer must have a method decode, {kind(tokenizer)} has none")
        if autocast is not None and not isinstance(autocast, torch.dtype):
            raise TypeError(f"autocast must be a torch.dtype or None, not {autocast!r}")
        if autocast not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"autocast must be torch.bfloat16, torch.float16 or None, not {autocast}")
        choice("weights", weights, MODES)
        choice("lora", lora, LORA)
        self.model: Any = model
        self.tokenizer, self.autocast = tokenizer, autocast
        self.fallback, self.check = choice("fallback", fallback, ("generate", "error")), flag("check", check)
        kv_memory = None if kv_memory is None else integer("kv_memory", kv_memory, 1)
        max_sequences = None if max_sequences is None else integer("max_sequences", max_sequences, 1)
        expected_tokens = None if expected_tokens is None else number("expected_tokens", expected_tokens, 1)
        self.prefill_tokens = integer("prefill_tokens", prefill_tokens, 1)
        self.view = WeightView(model, weights, dtype=autocast, lora=lora)
        self.pool = Pool(model, kv_memory, max_sequences, expected_tokens)
        self.shown: Shown | None = None  # the images of the session, or of the running call
        self._said = ""  # the last reason given for falling back to `generate`: each is given once
        self._structure: Hashable = None
        self._look_at_the_model()
        if not self.support.ok:
            self._refuse(self.support.reason)

    def _look_at_the_model(self) -> None:
        """Finds out whether the engine can run the model, unless nothing has changed since the last look."""
        now = structure(self.model)
        if now == self._structure:
            return
        if self.pool.in_session and self._structure is not None:
            raise RuntimeError(
                "the model's modules or config changed within a session, which keeps what the earlier ones computed"
            )
        self.support, self.checked = support(self.model), not self.check
        self.pool.drop()
        self.view.release()
        self._structure = now

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        adapters: Sequence[str] | None = None,
        images: Mapping[str, Any] | Images | None = None,
        progress: bool = False,
    ) -> Rollouts:
        """Samples `params.n` completions of each prompt and returns them in the order of the prompts.

        Args:
            prompts: A list of token ids for each prompt, with at least one token each.
            params: One SamplingParams for all prompts, or one for each prompt.
            adapters: The name of the PEFT adapter that answers each prompt. By default the active adapters answer.
            images: The image tensors that the processor returned for these prompts, in the order of the prompts:
                `pixel_values`, and grids, sizes and masks under the processor's names. `num_images` gives the number of
                images of each prompt; it is needed where the prompts' tokens do not tell which image belongs to which
                prompt. The vision tower computes each distinct image once. Image placeholder tokens are never drawn.
            progress: Show a progress bar.

        Returns:
            The completions with the log-probabilities of their tokens, and what the call cost.

        Raises:
            TypeError: An argument has the wrong type. The message names it.
            ValueError: A prompt is empty, holds ids outside the vocabulary, leaves too few positions for its new
                tokens, or has other images than its tokens say.
            ModelInUse: Another rollout of the model has not ended, in another thread or further up in this one.
            Unsupported: The engine cannot run the model, and fallback is "error".
            MemoryError: A prompt with its `max_new_tokens` does not fit into the cache, and fallback is "error". The
                message gives the bytes that are needed and allowed.
        """
        prompts = token_ids("prompts", prompts)
        flag("progress", progress)
        self._look_at_the_model()
        params = [params] * len(prompts) if isinstance(params, SamplingParams) else items("params", params)
        for p in params:
            if not isinstance(p, SamplingParams):
                raise TypeError(f"params must be SamplingParams, not {kind(p)}")
        adapters = None if adapters is None else items("adapters", adapters)
        for name in adapters or ():
            if not isinstance(name, str):
                raise TypeError(f"adapters must be names, not {kind(name)}")
        if not (images is None or isinstance(images, Mapping | Images)):
            raise TypeError(f"images must be a dict of what the processor gives, or Images, not {kind(images)}")
        self._check(prompts, params, adapters)
        shown: Images | None = None
        if images is not None and prompts:
            params = [self._without_placeholders(p) for p in params]
            try:
                shown = images if isinstance(images, Images) else of_prompts(self.model, prompts, images)
            except (TypeError, ValueError) as error:
                raise type(error)(f"images: {error}") from None
        groups = [[Completion.of(p, i, index) for index in range(p.n)] for i, p in enumerate(params)]
        with progress_bar(sum(p.n for p in params), progress) as ended:
            call = Call(prompts, groups, by_adapter(adapters, len(prompts)), ended, shown)
            if prompts:
                reason = self._why_not_with(dict.fromkeys(adapters or ())) or self.why_not_images(prompts, call.images)
                self.view.take_gathered()  # do not count what the self-check gathered
                if not reason:
                    self._generate(call)
                else:
                    self._refuse(reason)
            self._generate_plainly(call)
            call.gathered = self.view.take_gathered()
        return call.rollouts()

    def why_not(self) -> str | None:
        """The reason why the engine cannot run its model, or None if it can.

        The first call also runs the self-check, which compares a short rollout with the model's plain forward.

        Raises:
            ModelInUse: The answer requires changing the model for a moment, and a rollout of it has not ended.
        """
        return self._why_not_with(()) or None

    def _why_not_with(self, names: Iterable[str]) -> str:
        """`why_not` under the active adapters and under each of the adapters `names`; empty if nothing prevents it."""
        self._look_at_the_model()
        if self.support.ok and not self.checked:
            try:
                reason = parity.check(self.model, self._roll, self.autocast)
            except (RuntimeError, MemoryError) as error:
                # Other ranks may still wait in a forward of FSDP2 that this rank has left: its error must end the run
                if not out_of_memory(error) or any(map(sharding.is_fsdp2_unit, self.model.modules())):
                    raise
                return f"there is no memory for its self-check: {error}"
            self.checked = True
            if reason:
                self.support = dataclasses.replace(self.support, ok=False, reason=reason)
        return why_not_by_layers(self.model, names) if self.support.ok else self.support.reason

    def why_not_images(self, prompts: Sequence[Sequence[int]], images: Images | None) -> str | None:
        """The reason why the engine cannot run prompts with these images, or None if it can."""
        if images is None:
            return None
        if reason := why_no_images(CausalLM.of(self.model).backbone):
            return reason
        sample = ImageRows.of(images, *padded(prompts, self.device)) if self.check else None
        if sample is None:
            return None
        try:
            return parity.check_images(self.model, self._roll, self.autocast, sample) or None
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            return f"there is no memory for its self-check with images: {error}"

    def _without_placeholders(self, params: SamplingParams) -> SamplingParams:
        ids = placeholders(CausalLM.of(self.model).base.config)
        return dataclasses.replace(params, suppress_token_ids=[*params.suppress_token_ids, *ids])

    def _generate(self, call: Call) -> None:
        """Runs the call on the engine, as far as memory allows.

        `rollout_mode` lets one rollout at a time have the model; this also protects the engine's pool and session.
        """
        with rollout_mode(self.model):
            try:
                with self.view:  # before the pool: ranks gather weights together even if one lacks memory for a pool
                    self._with_a_pool(call)
            except BaseException as error:
                self._without_memory(error)

    def _with_a_pool(self, call: Call) -> None:
        backbone: Any = CausalLM.of(self.model).backbone
        runner, scheduler = self.pool.admit(call, self.support, self.autocast or backbone.dtype)
        try:
            self._roll_out(call, runner, scheduler)
        except BaseException:
            scheduler.reset()  # it may count tokens as cached that were never computed
            raise
        finally:
            if not self.pool.in_session:
                self.shown = None
            call.counts, call.pool = scheduler.take_counts(), (runner.cache.bytes, runner.cache.blocks)

    def _roll_out(self, call: Call, runner: Runner, scheduler: Scheduler) -> None:
        for adapter, chosen in call.adapters:
            with self._adapter(adapter):
                runner.fused = fused_backbone(runner.parts.backbone, runner.cache.dtype)
                answering = adapter_states(self.model)
                runner.use(places(self.model, self.view), answering)
                shown = self._shown(call, runner.parts, answering)
                rows = call.queue(scheduler, chosen, answering)
                generation = Generation(
                    runner,
                    scheduler,
                    rows,
                    self.prefill_tokens,
                    self._decode,
                    call.ended,
                    self.support.hybrid,
                    None if shown is None else (shown, answering),
                )
                generation.run()
            call.steps += generation.steps
            call.row_steps += generation.row_steps

    def _shown(self, call: Call, parts: CausalLM, answering: Hashable) -> Shown | None:
        """The images of the call and of earlier calls of the session, after the vision tower has run on them with the
        adapters `answering`; None if there are none."""
        if call.images is not None:
            if self.shown is None or not self.pool.in_session:
                self.shown = Shown(parts, self.prefill_tokens)
            call.coded = self.shown.told_apart(call.prompts, call.images)
            self.shown.embed(answering)
        return self.shown if self.pool.in_session or call.images is not None else None

    def _without_memory(self, error: BaseException) -> None:
        """Frees the KV cache after an out-of-memory error, so that `generate` can answer; raises any other error, and
        every error with fallback="error"."""
        if out_of_memory(error):
            self.pool.drop()
        if self.fallback == "error" or not out_of_memory(error):
            raise error
        text = str(error)  # not the error itself: its traceback would keep the pool alive
        log.warning("the rollout goes on with transformers' generate: %s", text)
        _fallbacks.note(f"a rollout went on with transformers' generate: {text}")

    def _generate_plainly(self, call: Call) -> None:
        """Lets transformers' `generate` sample the completions that the engine has not finished."""
        for adapter, chosen in call.adapters:
            for i in chosen:
                missing = [completion for completion in call.groups[i] if not completion.reason]
                if missing:
                    with eval_mode(self.model), self._plain_view(), self._adapter(adapter):
                        beside = (
                            {} if call.images is None else call.images.beside(i, len(call.prompts[i]), len(missing))
                        )
                        plain.generate(self.model, call.prompts[i], missing, self._decode, beside)
                    call.ended(len(missing))

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Keeps prompts and completions cached between the calls within it, until their blocks are needed.

        A prompt that begins with an earlier prompt and its completion costs only its new tokens. Conversations with
        tools or agents have such prompts. Only what was computed under the same adapters is shared. The weights must
        not change within a session.

        Raises:
            RuntimeError: The engine is in a session already.
        """
        if self.pool.in_session:
            raise RuntimeError("session() must not be called within a session of the same engine")
        try:
            with self.pool.session():
                yield
        finally:
            self.shown = None

    def release(self) -> None:
        """Frees the KV cache, the CUDA graphs that read it and the copies of weights. The next call makes them again.

        Raises:
            RuntimeError: The engine is in a session.
        """
        if self.pool.in_session:
            raise RuntimeError("release() must not be called within a session, which reads what it would free")
        self.pool.drop()
        self.view.release()
        release_tree_tiles()

    def _roll(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        images: Mapping[str, Any] | None = None,
    ) -> Rollouts:
        """A rollout of the model, or of a small twin of it, for the self-check. It starts no self-check of its own."""
        own = model is self.model
        autocast = self.autocast if own else None
        engine = RolloutEngine(model, max_sequences=4, autocast=autocast, fallback="error", check=False)
        engine.view = self.view if own else WeightView(model, "shadow")
        return engine.generate(prompts, params, images=images)

    def _refuse(self, reason: str) -> None:
        if self.fallback == "error":
            raise Unsupported(reason)
        if self._said != reason:
            self._said = reason
            log.warning("rollouts by transformers' generate: %s", reason)
            _fallbacks.note(f"rollouts by transformers' generate: {reason}")

    def _plain_view(self):
        """The view of the weights for `generate`. Where the model's own hooks have to gather the weights there is no
        view, only an autocast region."""
        if not sharding.why_no_view(self.model):
            return self.view
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    @property
    def _decode(self) -> Callable[[list[int]], str] | None:
        return getattr(self.tokenizer, "decode", None)

    def _adapter(self, name: str | None):
        return contextlib.nullcontext() if name is None else self.view.adapter(name)

    def _check(self, prompts, params: list[SamplingParams], adapters: Sequence[str] | None) -> None:
        if len(params) != len(prompts):
            raise ValueError(
                f"params must be one SamplingParams or one for each of {len(prompts)} prompts, got {len(params)}"
            )
        if adapters is not None and len(adapters) != len(prompts):
            raise ValueError(f"adapters must have a name for each of {len(prompts)} prompts, not {len(adapters)}")
        for name in set(adapters or ()):
            with eval_mode(self.model), active_adapter(self.model, name):
                pass  # raises where there is no such adapter
        vocabulary = CausalLM.of(self.model).vocabulary
        longest = self.support.longest
        for i, (prompt, p) in enumerate(zip(prompts, params)):
            if len(prompt) == 0:
                raise ValueError(f"prompts[{i}] is empty: there is nothing to continue")
            if min(prompt) < 0 or max(prompt) >= vocabulary:
                raise ValueError(
                    f"prompts[{i}] holds ids outside [0, {vocabulary}): they range from {min(prompt)} to {max(prompt)}"
                )
            if longest is not None and len(prompt) + p.max_new_tokens > longest:
                raise ValueError(
                    f"prompts[{i}] has {len(prompt)} tokens: with max_new_tokens={p.max_new_tokens} it would pass the "
                    f"{longest} positions that the model has, or up to which they mean the same in every batch"
                )
            if p.stop_strings and self.tokenizer is None:
                raise ValueError("stop_strings need a tokenizer, and this engine was made with tokenizer=None")


def places(model: nn.Module, view: WeightView) -> tuple[int, ...]:
    """The addresses of all tensors that a forward reads."""
    tensors = (*model.parameters(), *model.buffers(), *view.buffers.values())
    return tuple(x.data_ptr() for x in tensors)
