"""RolloutEngine: completions of prompts by a model that is being trained, on its live weights."""

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
from flashpo.ops.tree_attention import release as release_tree_tiles
from flashpo.packing.images import ImageRows, Images
from flashpo.packing.support import why_no_images
from flashpo.rollout import fallback as plain
from flashpo.rollout import parity
from flashpo.rollout.arguments import choice, flag, integer, items, kind, number, token_ids
from flashpo.rollout.cache import out_of_memory
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
    """Generates with a KV cache in which every distinct prompt token is computed and stored once.

    The model is used as it is and left as it was: attention implementation, train and eval flags, weights. It may be
    wrapped by PEFT. Updates of its weights between calls need no notice.

    Args:
        model: a causal language model of transformers.
        tokenizer: needed for `stop_strings` only.
        kv_memory: bytes for keys and values; default: half of what is free when they are first needed. Never more is
            taken than a call can use. The pool stays for the next call; `release` frees it.
        max_sequences: completions that run at once; default: as many as fit.
        expected_tokens: where memory is short, completions start when there is room for this length, later for the mean
            length of those that have ended; some are preempted and computed again if that was too few. Default: when
            there is room for max_new_tokens.
        prefill_tokens: prompt tokens of one forward.
        autocast: the dtype of the autocast region that the trainer runs its forward in, None without one.
        weights, lora: how weights are viewed, see WeightView.
        fallback: what to do with a model that the engine cannot run, or where memory is too short for even a single
            row: "generate" with transformers, after a warning that names the reason, or raise an "error".
        check: compare with a plain forward before the first rollout of a class and config (see parity.py), which is
            the only way to know of a model that does something unheard of.

    Raises:
        TypeError, ValueError: naming the argument.
        Unsupported: with fallback="error", naming the reason.
        ModelInUse: a rollout of the model has not ended.
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
        self.shown: Shown | None = None  # the images of the session, or of the call that runs
        self._said = ""  # why something else answers
        self._structure: Hashable = None
        self._look_at_the_model()
        if not self.support.ok:
            self._refuse(self.support.reason)

    def _look_at_the_model(self) -> None:
        """Finds out what the engine knows of its model, unless that still holds."""
        now = structure(self.model)
        if now == self._structure:
            return
        if self.pool.in_session and self._structure is not None:
            raise RuntimeError("the model's modules or config have changed within a session")
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
        """Completions of `prompts` (lists of token ids), `params.n` of each, in the order of the prompts.

        Args:
            prompts: at least one token each.
            params: for all prompts, or one for each.
            adapters: the PEFT adapter that answers each prompt; default: those that are active.
            images: what the processor gives beside the ids of these prompts, in their order: pixel_values, and under
                their names grids, sizes, masks, and num_images where the prompts do not tell whose the images are. The
                tower sees each image once; placeholders of images are never drawn.
            progress: show a progress bar.

        Raises:
            TypeError: prompts, params, adapters or images are none.
            ValueError: a prompt is empty, holds ids outside the vocabulary, leaves no place for its new tokens, or has
                other images than its tokens say.
            ModelInUse: another rollout of the model has not ended, in another thread or further up in this one.
            Unsupported, MemoryError: with fallback="error". A prompt that with its max_new_tokens does not fit into the
                cache is told in bytes.
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
                self.view.take_gathered()  # what the self-check had to gather is not of this call
                if not reason:
                    self._generate(call)
                else:
                    self._refuse(reason)
            self._generate_plainly(call)
            call.gathered = self.view.take_gathered()
        return call.rollouts()

    def why_not(self) -> str | None:
        """Why the engine cannot run its model, None if it can. Compares with a plain forward when it is first asked.

        Raises:
            ModelInUse: the question changes the model for a moment, and a rollout of it has not ended.
        """
        return self._why_not_with(())

    def _why_not_with(self, names: Iterable[str]) -> str | None:
        """Why not under the active adapters, or under one of those that are named."""
        self._look_at_the_model()
        if self.support.ok and not self.checked:
            try:
                reason = parity.check(self.model, self._roll, self.autocast)
            except (RuntimeError, MemoryError) as error:
                # Other ranks may be in a forward of FSDP2, which this one has left: its error has to end the run
                if not out_of_memory(error) or any(map(sharding.is_fsdp2_unit, self.model.modules())):
                    raise
                return f"there is no memory for its self-check: {error}"
            self.checked = True
            if reason is not None:
                self.support = dataclasses.replace(self.support, ok=False, reason=reason)
        reason = why_not_by_layers(self.model, names) if self.support.ok else self.support.reason
        return reason or None

    def why_not_images(self, prompts: Sequence[Sequence[int]], images: Images | None) -> str | None:
        """`why_not` for prompts with such images."""
        if images is None:
            return None
        if reason := why_no_images(CausalLM.of(self.model).backbone):
            return reason
        sample = ImageRows.of(images, *padded(prompts, self.device)) if self.check else None
        if sample is None:
            return None
        try:
            return parity.check_images(self.model, self._roll, self.autocast, sample)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            return f"there is no memory for its self-check with images: {error}"

    def _without_placeholders(self, params: SamplingParams) -> SamplingParams:
        ids = placeholders(CausalLM.of(self.model).base.config)
        return dataclasses.replace(params, suppress_token_ids=[*params.suppress_token_ids, *ids])

    def _generate(self, call: Call) -> None:
        """As far as memory allows. Whoever has the model has the engine's pool and session, too."""
        with rollout_mode(self.model):
            try:
                with self.view:  # before the pool: ranks gather weights together, whatever memory one of them lacks
                    self._with_a_pool(call)
            except BaseException as error:
                self._without_memory(error)

    def _with_a_pool(self, call: Call) -> None:
        backbone: Any = CausalLM.of(self.model).backbone
        runner, scheduler = self.pool.admit(call, self.support, self.autocast or backbone.dtype)
        try:
            self._roll_out(call, runner, scheduler)
        except BaseException:
            scheduler.reset()  # it may count as cached what has never been computed
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
        """The images that prompts have or, in a session, had; the tower has seen them under these adapters."""
        if call.images is not None:
            if self.shown is None or not self.pool.in_session:
                self.shown = Shown(parts, self.prefill_tokens)
            call.coded = self.shown.told_apart(call.prompts, call.images)
            self.shown.embed(answering)
        return self.shown if self.pool.in_session or call.images is not None else None

    def _without_memory(self, error: BaseException) -> None:
        """Frees the pool for what answers in the engine's place, and raises the error unless that is `generate`."""
        if out_of_memory(error):
            self.pool.drop()
        if self.fallback == "error" or not out_of_memory(error):
            raise error
        text = str(error)  # a record of the error itself would keep the pool: its traceback has it
        log.warning("the rollout goes on with transformers' generate: %s", text)
        _fallbacks.note(f"a rollout went on with transformers' generate: {text}")

    def _generate_plainly(self, call: Call) -> None:
        """What the engine has not."""
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
        """Within it, prompts and completions stay cached until their blocks are needed.

        A prompt that begins with the tokens of an earlier one and its completion costs its new tokens only: the turns
        of tools and agents. What other adapters have computed does not serve. The weights must not change within a
        session.
        """
        if self.pool.in_session:
            raise RuntimeError("session() of an engine that is in one")
        try:
            with self.pool.session():
                yield
        finally:
            self.shown = None

    def release(self) -> None:
        """Frees the cache, the CUDA graphs that read it and copies of weights; the next call makes them again."""
        if self.pool.in_session:
            raise RuntimeError("release() within a session")
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
        """For the self-check: a rollout of the model, or of a small twin of it, that is not checked itself."""
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
        """Of weights that the model's own hooks have to gather there is no view."""
        if sharding.why_no_view(self.model) is None:
            return self.view
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    @property
    def _decode(self) -> Callable[[list[int]], str] | None:
        return getattr(self.tokenizer, "decode", None)

    def _adapter(self, name: str | None):
        return contextlib.nullcontext() if name is None else self.view.adapter(name)

    def _check(self, prompts, params: list[SamplingParams], adapters: Sequence[str] | None) -> None:
        if len(params) != len(prompts):
            raise ValueError(f"params must be one SamplingParams or one for each of {len(prompts)} prompts")
        if adapters is not None and len(adapters) != len(prompts):
            raise ValueError(f"adapters must have a name for each of {len(prompts)} prompts, not {len(adapters)}")
        for name in set(adapters or ()):
            with eval_mode(self.model), active_adapter(self.model, name):
                pass  # it exists
        vocabulary = CausalLM.of(self.model).vocabulary
        longest = self.support.longest
        for i, (prompt, p) in enumerate(zip(prompts, params)):
            if len(prompt) == 0:
                raise ValueError(f"prompts[{i}] is empty: there is nothing to continue")
            if min(prompt) < 0 or max(prompt) >= vocabulary:
                raise ValueError(f"prompts[{i}] holds ids outside [0, {vocabulary})")
            if longest is not None and len(prompt) + p.max_new_tokens > longest:
                raise ValueError(
                    f"prompts[{i}] has {len(prompt)} tokens: with max_new_tokens={p.max_new_tokens} it would pass the "
                    f"{longest} positions that the model has, or up to which they mean the same in every batch"
                )
            if p.stop_strings and self.tokenizer is None:
                raise ValueError("stop_strings need the engine's tokenizer")


def places(model: nn.Module, view: WeightView) -> tuple[int, ...]:
    """Where everything that a forward reads lies."""
    tensors = (*model.parameters(), *model.buffers(), *view.buffers.values())
    return tuple(x.data_ptr() for x in tensors)
