"""The self-check: before the engine is used for a class and config, its log-probs are compared with a plain forward's.

Two short rollouts are scored again by the model's own forward. One is of the model itself, where rounding causes
differences. The other is of a small fp32 twin of the model on the same device, where a window that is off by one or a
scale that is off by 1 % shows clearly. During the check, products of fp32 numbers are computed in fp32, because TF32
would hide such mistakes.

How large a difference rounding can cause is measured on the model itself: its plain forward runs again with the outputs
of its layers and projections rounded differently. How far the log-probs move then depends only on the model and its
dtype. Forwards of other shapes would not measure this, because the GEMMs of some machines round equally in all of them.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flashpo._causal_lm import CausalLM
from flashpo._hosts.peft import adapters_of
from flashpo._memory import out_of_memory
from flashpo._precision import exact_products, one_at_a_time
from flashpo._twin import small_twin
from flashpo.packing.image_trial import rows_of
from flashpo.packing.images import ImageRows
from flashpo.rollout.cache import BLOCK
from flashpo.rollout.params import Rollouts, SamplingParams
from flashpo.rollout.seam import ModelInUse, eval_mode
from flashpo.rollout.support import facts, longest

log = logging.getLogger("flashpo")
Roll = Callable[..., Rollouts]  # arguments: model, prompts, SamplingParams and, if the prompts have images, the images
Beside = Callable[[list[int], Tensor], dict[str, Tensor]]  # (rows, ids) -> further keywords of a forward of these rows
_answers: dict[Hashable, str] = {}

PROMPTS = (BLOCK + 6, BLOCK + 3, 3)  # tokens of each prompt; the first two share a block and differ after it
SAMPLED = SamplingParams(n=2, max_new_tokens=12, seed=7)
STIRS = 3  # how many forwards are rounded differently, to measure the noise of rounding
# How a difference from the plain forward is averaged over the tokens, and the largest one that is allowed, in units of
# the noise of rounding. In 16 bits a router may choose another expert for a token, so that the token's log-prob jumps.
# The median ignores such tokens.
RMS = "root mean square", 8.0
MEDIAN = "median", 2.0
LOGPROB_ROUNDINGS = 4.0  # rollouts return log-probs in fp32
LAYER_ROUNDINGS = 8.0  # a layer is named as the first to differ if its output differs by more roundings than this (RMS)


def check(model: Any, roll: Roll, autocast: torch.dtype | None) -> str:
    """`why_wrong`, computed once in a process for each class, config, set of adapters, dtypes and type of device."""
    base: Any = CausalLM.of(model).base
    dtypes = frozenset(_dtypes(model, autocast))
    key = type(model), type(base), facts(base.config), dtypes, base.device.type, autocast, adapters_of(model)
    with one_at_a_time:
        if key not in _answers:
            _answers[key] = why_wrong(model, roll, autocast)
        return _answers[key]


def check_images(model: Any, roll: Roll, autocast: torch.dtype | None, sample: ImageRows) -> str:
    """`check` for prompts with images. The sample has a few rows that begin with prompts of a call."""
    base: Any = CausalLM.of(model).base
    dtypes = frozenset(_dtypes(model, autocast))
    key = "images", type(model), type(base), facts(base.config), dtypes, base.device.type, autocast, adapters_of(model)
    with one_at_a_time, exact_products():
        if key not in _answers:
            reason = _images_of_the_twin_differ(base, roll, sample)
            _answers[key] = reason or _difference_with_images(model, roll, autocast, sample)
        return _answers[key]


def _images_of_the_twin_differ(base: Any, roll: Roll, sample: ImageRows) -> str:
    try:
        twin: Any = small_twin(base, sample.length + SAMPLED.max_new_tokens)
        small = sample.small(twin)
        with eval_mode(twin):
            twin(input_ids=small.ids(), use_cache=False, **small.images(twin.device), **small.types_of(small.ids()))
    except Exception as error:  # of any kind: its images have other sizes than the model's, say
        log.debug("no small %s with images: %s", type(base).__name__, error)
        return ""
    reason = _difference_with_images(twin, roll, None, small)
    return reason and f"a small {type(base).__name__} of the same config answers otherwise: {reason}"


def _difference_with_images(model: nn.Module, roll: Roll, autocast: torch.dtype | None, sample: ImageRows) -> str:
    device = next(model.parameters()).device
    ids, images = sample.ids(), sample.images(device)
    try:
        rollouts = roll(model, ids.tolist(), SAMPLED, images)
    except ModelInUse:
        raise
    except Exception as error:  # of any kind: it is the model's own code
        if out_of_memory(error):
            raise
        return f"{type(error).__name__} on prompts with an image: {error}"
    if "nan" in rollouts.finish_reasons:
        return "its log-probs after an image are not finite"

    def beside(rows: list[int], tokens: Tensor) -> dict[str, Tensor]:
        return rows_of(images, [rollouts.prompt_index[row] for row in rows]) | sample.types_of(tokens)

    rolled = torch.tensor(rollouts.logprobs, dtype=torch.float64, device="cpu")
    sequences = [p + c for p, c in zip(rollouts.prompt_ids, rollouts.completion_ids)]
    found = judged(model, rolled, sequences, autocast, beside=beside)
    if found.distance <= found.allowed:
        return ""
    rounding = f"what rounding does to its own forward is {found.noise:.1e}"
    return f"log-probs after an image differ by {found.distance:.1e} ({found.average}, {found.dtype}), {rounding}"


def why_wrong(model: nn.Module, roll: Roll, autocast: torch.dtype | None = None) -> str:
    """What is wrong with the log-probs that `roll` gives for `model`; empty if a plain forward gives the same.

    Args:
        roll: (model, prompts, params) -> Rollouts, by an engine without this check.
        autocast: The dtype of the autocast region of the trainer's forward, None if there is none.
    """
    base = CausalLM.of(model).base
    twin = _twin(base)
    with exact_products():
        if twin is not None and (reason := _twice(twin, roll, None)):
            return f"a small {type(base).__name__} of the same config answers otherwise: {reason}"
        return _twice(model, roll, autocast)


def _twice(model: nn.Module, roll: Roll, autocast: torch.dtype | None) -> str:
    """The reason why `roll` is wrong, if two rollouts both differ.

    A near tie in a router can make one rollout of a correct engine differ. A wrong engine differs again in the next.
    """
    reason = ""
    for seed in range(2):
        reason = _difference(model, roll, autocast, seed)
        if not reason:
            break
    return reason


def _twin(base: PreTrainedModel) -> nn.Module | None:
    try:
        return small_twin(base)
    except ValueError as error:  # some configs cannot be made small: the model itself is checked all the same
        log.debug("%s", error)
        return None


def _difference(model: nn.Module, roll: Roll, autocast: torch.dtype | None, seed: int = 0) -> str:
    base: Any = CausalLM.of(model).base
    vocabulary = CausalLM.of(model).vocabulary
    generator = torch.Generator().manual_seed(seed)
    room = (longest(base.config.get_text_config()) or math.inf) - SAMPLED.max_new_tokens
    if room <= SAMPLED.max_new_tokens:
        return ""  # the model has too few positions for a comparison
    lengths = [int(min(n, room)) for n in PROMPTS]
    first, second, third = (
        torch.randint(0, vocabulary, (n,), generator=generator, device="cpu").tolist() for n in lengths
    )
    try:
        rollouts = roll(model, [first, first[:BLOCK] + second[BLOCK:], third], SAMPLED)
    except ModelInUse:
        raise
    except (RuntimeError, ValueError, TypeError) as error:  # of the model's own code
        if out_of_memory(error):
            raise
        return f"{type(error).__name__}: {error}"
    if "nan" in rollouts.finish_reasons:  # if the model's own forward gives NaN, too, the engine cannot be judged
        with eval_mode(model, autocast):
            finite = _logprobs(model, [first]).isfinite().all()
        return "its log-probs are not finite" if finite else ""
    rolled = torch.tensor(rollouts.logprobs, dtype=torch.float64, device="cpu")
    sequences = [p + c for p, c in zip(rollouts.prompt_ids, rollouts.completion_ids)]
    found = judged(model, rolled, sequences, autocast)
    if found.distance <= found.allowed:
        return ""
    rounding = f"what rounding does to its own forward is {found.noise:.1e}"
    where = _first_layer(model, roll, autocast, first)
    return f"log-probs differ by {found.distance:.1e} ({found.average}, {found.dtype}), {rounding}; {where}"


class Judgement(NamedTuple):
    """How far log-probs are from those of a plain forward, and how far they may be."""

    distance: float
    noise: float  # how far different rounding moves the plain forward's log-probs
    allowed: float
    average: str  # how distance, noise and allowed are averaged over the tokens
    dtype: torch.dtype


def judged(
    model: nn.Module,
    rolled: Tensor,
    sequences: Sequence[Sequence[int]],
    autocast: torch.dtype | None = None,
    temperature: float = 1.0,
    beside: Beside = lambda rows, ids: {},
) -> Judgement:
    """Judges the log-probs `rolled` (sequences, tokens) of the last tokens of each sequence."""
    options = rolled.shape[1], temperature
    with eval_mode(model, autocast):
        plain = torch.cat([_logprobs(model, sequences, *options, beside, [row]) for row in range(len(sequences))])
        together = _logprobs(model, sequences, *options, beside)
        stirred = []
        for seed in range(STIRS):
            with _rounded_otherwise(model, seed):
                stirred.append(_logprobs(model, sequences, *options, beside) - together)
    dtype = max(_dtypes(model, autocast), key=lambda x: torch.finfo(x).eps)
    average, most = RMS if torch.finfo(dtype).bits >= 32 else MEDIAN
    size = _rms if average == RMS[0] else _median
    noise = sorted(size(x) for x in stirred)[STIRS // 2]
    noise = min(noise, math.sqrt(torch.finfo(dtype).eps))  # a larger value does not come from rounding
    stored = LOGPROB_ROUNDINGS * torch.finfo(torch.float32).eps * max(_rms(plain), 1.0)
    return Judgement(size(rolled - plain), noise, most * noise + stored, average, dtype)


@contextlib.contextmanager
def _rounded_otherwise(model: nn.Module, seed: int) -> Iterator[None]:
    """Within it, the outputs of layers and projections are changed at random by up to one rounding of their dtype."""
    generator = torch.Generator().manual_seed(seed)

    def moved(x: Tensor) -> Tensor:
        step = torch.rand(x.shape, generator=generator, dtype=torch.float64, device="cpu").to(x.device) * 2 - 1
        return (x.double() * (1 + torch.finfo(x.dtype).eps * step)).to(x.dtype)

    def hook(module, inputs, out):
        if isinstance(out, Tensor):
            return moved(out) if out.is_floating_point() else out
        return (moved(out[0]), *out[1:]) if isinstance(out, tuple) and isinstance(out[0], Tensor) else out

    text = CausalLM.of(model).text
    linears = [module for module in text.modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_hook(hook) for module in [*_layers(text), *linears]]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _layers(text: nn.Module) -> nn.ModuleList:
    lists = [module for module in text.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList())


def _first_layer(model: nn.Module, roll: Roll, autocast: torch.dtype | None, prompt: list[int]) -> str:
    """The first layer whose output in a prefill differs from the plain forward's, in words."""
    layers = _layers(CausalLM.of(model).text)
    outputs: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: outputs.append(out if isinstance(out, Tensor) else out[0]))
        for layer in layers
    ]
    try:
        roll(model, [prompt], SamplingParams(max_new_tokens=1))
        with eval_mode(model, autocast):
            _logprobs(model, [prompt])
    finally:
        for hook in hooks:
            hook.remove()
    rolled, plainly = outputs[-2 * len(layers) : -len(layers)], outputs[-len(layers) :]  # the last forward of each
    for i, (ours, plain) in enumerate(zip(rolled, plainly)):
        if _rms(ours.double() - plain.double()) > LAYER_ROUNDINGS * torch.finfo(plain.dtype).eps * _rms(plain.double()):
            return f"layer {i} is the first to differ"
    return "every layer agrees in a prefill"


def _dtypes(model: nn.Module, autocast: torch.dtype | None) -> set[torch.dtype]:
    """The dtypes that a forward computes in. That of a quantised layer is not the dtype of a parameter."""
    dtypes = [p.dtype for p in model.parameters()] + [getattr(m, "compute_dtype", None) for m in model.modules()]
    return {x for x in (autocast, *dtypes) if isinstance(x, torch.dtype) and x.is_floating_point}


def _rms(x: Tensor) -> float:
    return math.sqrt(x.square().mean().item())


def _median(x: Tensor) -> float:
    return x.abs().median().item()


def _logprobs(
    model: Any,
    sequences: Sequence[Sequence[int]],
    last: int = SAMPLED.max_new_tokens,
    temperature: float = 1.0,
    beside: Beside = lambda rows, ids: {},
    rows: list[int] | None = None,
) -> Tensor:
    """Log-probs (B, last) of the last tokens of all sequences, or only of those in `rows`, by one plain forward."""
    some = [*range(len(sequences))] if rows is None else rows
    sequences = [sequences[row] for row in some]
    lengths = [len(sequence) for sequence in sequences]
    longest = max(lengths)
    device = next(model.parameters()).device
    ids = torch.tensor([[*s, *[0] * (longest - len(s))] for s in sequences], device=device)
    mask = torch.tensor([[1] * n + [0] * (longest - n) for n in lengths], device=device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **beside(some, ids)).logits
    found = []
    for i, n in enumerate(lengths):
        scores = logits[i, n - last - 1 : n - 1].double() / temperature
        found.append(scores.log_softmax(-1).gather(1, ids[i, n - last : n, None])[:, 0])
    return torch.stack(found).cpu()
