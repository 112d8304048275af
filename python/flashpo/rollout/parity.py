"""Does the engine say the same as the model's own forward? Asked once for every class and config, before it is used.

Two rollouts are scored again by a plain forward: one of the model itself, whose differences may be those of rounding,
and one of its small fp32 twin on the same device, in which a window that is off by one or a scale that is off by 1 %
stands out. For the time of the check fp32 products are fp32: TF32 would hide that.

What rounding may do is measured on the model itself: its plain forward runs again with the outputs of its layers and
projections rounded otherwise. How far the log-probs move then depends on the model and its dtype alone. Forwards of
other shapes are no such measure: some machines' GEMMs round alike in all of them.
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
from flashpo._precision import exact_products, one_at_a_time
from flashpo.packing.image_trial import rows_of
from flashpo.packing.images import ImageRows
from flashpo.rollout.cache import BLOCK, out_of_memory
from flashpo.rollout.params import Rollouts, SamplingParams
from flashpo.rollout.seam import ModelInUse, eval_mode
from flashpo.rollout.support import facts, longest
from flashpo.rollout.twin import small_twin

log = logging.getLogger("flashpo")
Roll = Callable[..., Rollouts]  # of a model, prompts, SamplingParams and, where they have some, the prompts' images
Beside = Callable[[list[int], Tensor], dict[str, Tensor]]  # what a forward of some of the sequences takes beside ids
_answers: dict[Hashable, str | None] = {}

PROMPTS = (BLOCK + 6, BLOCK + 3, 3)  # tokens: the first two share a block and split behind it
SAMPLED = SamplingParams(n=2, max_new_tokens=12, seed=7)
STIRS = 3  # forwards that are rounded otherwise
# A right engine's difference from the plain forward, in units of what the other roundings do: how it is averaged over
# the tokens, and the most that is allowed. In 16 bits a router may take another expert for a token, and that token's
# log-prob leaps: the median ignores it.
RMS = "root mean square", 8.0
MEDIAN = "median", 2.0
LOGPROB_ROUNDINGS = 4.0  # rollouts return log-probs in fp32
LAYER_ROUNDINGS = 8.0  # by which a layer's output differs, in root mean square, before it is named


def check(model: Any, roll: Roll, autocast: torch.dtype | None) -> str | None:
    """`why_wrong`, asked once a process for each class, config, set of adapters and dtypes, and kind of device."""
    base: Any = CausalLM.of(model).base
    dtypes = frozenset(_dtypes(model, autocast))
    key = type(model), type(base), facts(base.config), dtypes, base.device.type, autocast, adapters_of(model)
    with one_at_a_time:
        if key not in _answers:
            _answers[key] = why_wrong(model, roll, autocast)
        return _answers[key]


def check_images(model: Any, roll: Roll, autocast: torch.dtype | None, sample: ImageRows) -> str | None:
    """`check` of prompts with images, on a few that begin with those of a call."""
    base: Any = CausalLM.of(model).base
    dtypes = frozenset(_dtypes(model, autocast))
    key = "images", type(model), type(base), facts(base.config), dtypes, base.device.type, autocast, adapters_of(model)
    with one_at_a_time, exact_products():
        if key not in _answers:
            reason = _images_of_the_twin_differ(base, roll, sample)
            _answers[key] = reason or _difference_with_images(model, roll, autocast, sample)
        return _answers[key]


def _images_of_the_twin_differ(base: Any, roll: Roll, sample: ImageRows) -> str | None:
    try:
        twin: Any = small_twin(base)
        small = sample.small(twin)
        with eval_mode(twin):
            twin(input_ids=small.ids(), use_cache=False, **small.images(twin.device), **small.types_of(small.ids()))
    except Exception as error:  # of any kind: its images have other sizes than the model's, say
        log.debug("no small %s with images: %s", type(base).__name__, error)
        return None
    reason = _difference_with_images(twin, roll, None, small)
    return reason and f"a small {type(base).__name__} of the same config answers otherwise: {reason}"


def _difference_with_images(
    model: nn.Module, roll: Roll, autocast: torch.dtype | None, sample: ImageRows
) -> str | None:
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
        return "its log-probs are not finite behind an image"

    def beside(rows: list[int], tokens: Tensor) -> dict[str, Tensor]:
        return rows_of(images, [rollouts.prompt_index[row] for row in rows]) | sample.types_of(tokens)

    rolled = torch.tensor(rollouts.logprobs, dtype=torch.float64, device="cpu")
    sequences = [p + c for p, c in zip(rollouts.prompt_ids, rollouts.completion_ids)]
    found = judged(model, rolled, sequences, autocast, beside=beside)
    if found.distance <= found.allowed:
        return None
    rounding = f"what rounding does to its own forward is {found.noise:.1e}"
    return f"log-probs behind an image differ by {found.distance:.1e} ({found.average}, {found.dtype}), {rounding}"


def why_wrong(model: nn.Module, roll: Roll, autocast: torch.dtype | None = None) -> str | None:
    """None where `roll` samples from `model` with the log-probs that a forward gives, else what is wrong.

    Args:
        roll: an engine without this check: (model, prompts, params) -> Rollouts.
        autocast: as the trainer's forward has it.
    """
    base = CausalLM.of(model).base
    twin = _twin(base)
    with exact_products():
        if twin is not None and (reason := _twice(twin, roll, None)) is not None:
            return f"a small {type(base).__name__} of the same config answers otherwise: {reason}"
        return _twice(model, roll, autocast)


def _twice(model: nn.Module, roll: Roll, autocast: torch.dtype | None) -> str | None:
    """A router's near tie can make one rollout of a right engine differ; a wrong one differs in the next, too."""
    reason = None
    for seed in range(2):
        reason = _difference(model, roll, autocast, seed)
        if reason is None:
            break
    return reason


def _twin(base: PreTrainedModel) -> nn.Module | None:
    try:
        return small_twin(base)
    except ValueError as error:  # some configs cannot be made small: the model itself is checked all the same
        log.debug("%s", error)
        return None


def _difference(model: nn.Module, roll: Roll, autocast: torch.dtype | None, seed: int = 0) -> str | None:
    base: Any = CausalLM.of(model).base
    vocabulary = CausalLM.of(model).vocabulary
    generator = torch.Generator().manual_seed(seed)
    room = (longest(base.config.get_text_config()) or math.inf) - SAMPLED.max_new_tokens
    if room <= SAMPLED.max_new_tokens:
        return None  # too little to say anything
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
    if "nan" in rollouts.finish_reasons:  # an untrained or broken model has them, too: then nothing can be said
        with eval_mode(model, autocast):
            finite = _logprobs(model, [first]).isfinite().all()
        return "its log-probs are not finite" if finite else None
    rolled = torch.tensor(rollouts.logprobs, dtype=torch.float64, device="cpu")
    sequences = [p + c for p, c in zip(rollouts.prompt_ids, rollouts.completion_ids)]
    found = judged(model, rolled, sequences, autocast)
    if found.distance <= found.allowed:
        return None
    rounding = f"what rounding does to its own forward is {found.noise:.1e}"
    where = _first_layer(model, roll, autocast, first)
    return f"log-probs differ by {found.distance:.1e} ({found.average}, {found.dtype}), {rounding}; {where}"


class Judgement(NamedTuple):
    """How far log-probs are from a plain forward's, how far rounding moves that, and how far they may be."""

    distance: float
    noise: float
    allowed: float
    average: str  # over the tokens, of all three
    dtype: torch.dtype


def judged(
    model: nn.Module,
    rolled: Tensor,
    sequences: Sequence[Sequence[int]],
    autocast: torch.dtype | None = None,
    temperature: float = 1.0,
    beside: Beside = lambda rows, ids: {},
) -> Judgement:
    """Of log-probs (sequences, tokens) that somebody gives the sequences' ends."""
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
    noise = min(noise, math.sqrt(torch.finfo(dtype).eps))  # more is no rounding
    stored = LOGPROB_ROUNDINGS * torch.finfo(torch.float32).eps * max(_rms(plain), 1.0)
    return Judgement(size(rolled - plain), noise, most * noise + stored, average, dtype)


@contextlib.contextmanager
def _rounded_otherwise(model: nn.Module, seed: int) -> Iterator[None]:
    """Within it the outputs of layers and projections are moved by up to one rounding of their dtype."""
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
    """Where a prefill first leaves the plain forward."""
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
    """That a forward computes in; a quantised layer's is no parameter's."""
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
    """Log-probs (B, last) of the sequences' last tokens by one plain forward of all, or of these rows."""
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
