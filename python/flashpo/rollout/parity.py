"""Does the engine say the same as the model's own forward? Asked once for every class and config, before it is used.

Two rollouts are scored again by a plain forward: one of the model itself, whose differences may be those of rounding,
and one of its small fp32 twin on the same device, in which a window that is off by one or a scale that is off by 1 %
stands out. For the time of the check fp32 products are fp32: TF32 would hide that.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flashpo._causal_lm import CausalLM
from flashpo._peft import adapters_of
from flashpo.rollout.cache import BLOCK, out_of_memory
from flashpo.rollout.hybrid import is_hybrid
from flashpo.rollout.params import Rollouts, SamplingParams
from flashpo.rollout.support import longest
from flashpo.rollout.twin import small_config, small_model

log = logging.getLogger("flashpo")
Roll = Callable[[nn.Module, Sequence[Sequence[int]], SamplingParams], Rollouts]
_answers: dict[Hashable, str | None] = {}

PROMPTS = (BLOCK + 6, BLOCK + 3, 3)  # tokens: the first two share a block and split behind it
SAMPLED = SamplingParams(n=2, max_new_tokens=12, seed=7)
NOISE = 8.0  # times what rounding does to the model's own forward
# Of the largest logit, below which no forward can be told from another one: in root mean square, in the median.
ROUNDINGS = 4.0, 2.0
LAYER_ROUNDINGS = 8.0  # by which a layer's output differs, in root mean square, before it is named


def check(model: Any, roll: Roll, autocast: torch.dtype | None) -> str | None:
    """`why_wrong`, asked once a process for each class, config, set of adapters, dtype and kind of device."""
    base: Any = CausalLM.of(model).base
    dtype = _coarsest(base, autocast)
    key = type(model), type(base), base.config.to_json_string(), dtype, base.device.type, autocast, adapters_of(model)
    if key not in _answers:
        _answers[key] = why_wrong(model, roll, autocast)
    return _answers[key]


def why_wrong(model: nn.Module, roll: Roll, autocast: torch.dtype | None = None) -> str | None:
    """None where `roll` samples from `model` with the log-probs that a forward gives, else what is wrong.

    Args:
        roll: an engine without this check: (model, prompts, params) -> Rollouts.
        autocast: as the trainer's forward has it.
    """
    base = CausalLM.of(model).base
    twin = _twin(base)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        if twin is not None and (reason := _difference(twin.to(base.device), roll, None)) is not None:
            return f"a small {type(base).__name__} of the same config answers otherwise: {reason}"
        return _difference(model, roll, autocast)
    finally:
        torch.set_float32_matmul_precision(precision)


def _twin(base: PreTrainedModel) -> nn.Module | None:
    try:
        config = base.config.get_text_config()
        return small_model(small_config(config), type(base) if config is base.config else None)
    except Exception as error:  # some configs cannot be made small: the model itself is checked all the same
        log.debug("no small %s: %s", type(base).__name__, error)
        return None


def _difference(model: nn.Module, roll: Roll, autocast: torch.dtype | None) -> str | None:
    base: Any = CausalLM.of(model).base
    vocabulary = CausalLM.of(model).vocabulary
    generator = torch.Generator().manual_seed(0)
    room = (longest(base.config.get_text_config()) or math.inf) - SAMPLED.max_new_tokens
    if room <= SAMPLED.max_new_tokens:
        return None  # too little to say anything
    lengths = [int(min(n, room)) for n in PROMPTS]
    first, second, third = (
        torch.randint(0, vocabulary, (n,), generator=generator, device="cpu").tolist() for n in lengths
    )
    try:
        rollouts = roll(model, [first, first[:BLOCK] + second[BLOCK:], third], SAMPLED)
    except (RuntimeError, ValueError, TypeError) as error:  # of the model's own code
        if out_of_memory(error):
            raise
        return f"{type(error).__name__}: {error}"
    if "nan" in rollouts.finish_reasons:  # an untrained or broken model has them, too: then nothing can be said
        with _evaluating(model, autocast):
            finite = _logprobs(model, [first])[0].isfinite().all()
        return "its log-probs are not finite" if finite else None
    rolled = torch.tensor(rollouts.logprobs, device="cpu").double()
    sequences = [p + c for p, c in zip(rollouts.prompt_ids, rollouts.completion_ids)]
    with _evaluating(model, autocast):
        rows = [_logprobs(model, [sequence]) for sequence in sequences]
        together, largest = _logprobs(model, sequences)
    single = torch.cat([logprobs for logprobs, _ in rows])
    dtype = _coarsest(model, autocast)
    # In 16 bits a router may take another expert for a token, and that token's log-prob leaps: the median ignores it,
    # and tells a window that is off by one or sinks that are dropped from rounding, of which they are 6 to 40 times as
    # much. A scale off by 1 % is not more than rounding there; it shows in the twin.
    fine = _rms, "root mean square", ROUNDINGS[0]
    coarse = _median, "median", ROUNDINGS[1]
    size, of_all, roundings = fine if dtype == torch.float32 else coarse
    distance, noises = size(rolled - single), [size(together - single)]
    if is_hybrid(base.config.get_text_config()):  # a recurrence rounds otherwise than its chunked form
        noises.append(size(_stepwise(model, sequences[0], autocast) - single[:1]))
    eps = torch.finfo(dtype).eps
    noise = max((x for x in noises if x < math.sqrt(eps)), default=0.0)  # more is no rounding
    if distance <= NOISE * noise + roundings * eps * max(largest, 1.0):
        return None
    where = _first_layer(model, roll, autocast, first)
    rounding = f"what rounding does to its own forward is {noise:.1e}"
    return f"log-probs differ by {distance:.1e} ({of_all}, {dtype}), {rounding}; {where}"


def _first_layer(model: nn.Module, roll: Roll, autocast: torch.dtype | None, prompt: list[int]) -> str:
    """Where a prefill first leaves the plain forward."""
    lists = [m for m in CausalLM.of(model).backbone.modules() if isinstance(m, nn.ModuleList)]
    layers = max(lists, key=len, default=nn.ModuleList())
    outputs: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: outputs.append(out if isinstance(out, Tensor) else out[0]))
        for layer in layers
    ]
    try:
        roll(model, [prompt], SamplingParams(max_new_tokens=1))
        with _evaluating(model, autocast):
            _logprobs(model, [prompt])
    finally:
        for hook in hooks:
            hook.remove()
    rolled, plainly = outputs[-2 * len(layers) : -len(layers)], outputs[-len(layers) :]  # the last forward of each
    for i, (ours, plain) in enumerate(zip(rolled, plainly)):
        if _rms(ours.double() - plain.double()) > LAYER_ROUNDINGS * torch.finfo(plain.dtype).eps * _rms(plain.double()):
            return f"layer {i} is the first to differ"
    return "every layer agrees in a prefill"


def _coarsest(model: nn.Module, autocast: torch.dtype | None) -> torch.dtype:
    """Of the dtypes that a forward computes in; a quantised layer's is no parameter's."""
    dtypes = [p.dtype for p in model.parameters()] + [getattr(m, "compute_dtype", None) for m in model.modules()]
    floating = [x for x in (autocast, *dtypes) if isinstance(x, torch.dtype) and x.is_floating_point]
    return max(floating, key=lambda x: torch.finfo(x).eps)


def _rms(x: Tensor) -> float:
    return math.sqrt(x.square().mean().item())


def _median(x: Tensor) -> float:
    return x.abs().median().item()


@contextlib.contextmanager
def _evaluating(model: Any, autocast: torch.dtype | None) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    device = next(model.parameters()).device.type
    try:
        for module in training:
            module.training = False
        with torch.no_grad(), torch.autocast(device, autocast, enabled=autocast is not None):
            yield
    finally:
        for module in training:
            module.training = True


def _stepwise(model: Any, sequence: Sequence[int], autocast: torch.dtype | None) -> Tensor:
    """(1, max_new_tokens) by the model's own cache, a token at a time behind the prompt."""
    ids = torch.tensor([sequence], device=next(model.parameters()).device)
    prompt = len(sequence) - SAMPLED.max_new_tokens
    rows, cache = [], None
    with _evaluating(model, autocast):
        for begin, end in ((0, prompt), *((i, i + 1) for i in range(prompt, len(sequence) - 1))):
            out = model(input_ids=ids[:, begin:end], past_key_values=cache, use_cache=True)
            cache = out.get("past_key_values")  # None where a model keeps its state elsewhere
            rows.append(out.logits[:, -1].double().log_softmax(-1).gather(1, ids[:, end, None]))
    return torch.cat(rows, 1).cpu()


def _logprobs(model: Any, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, float]:
    """Log-probs (B, max_new_tokens) of the sequences' ends by one plain forward, and the largest logit in it."""
    lengths, last = [len(sequence) for sequence in sequences], SAMPLED.max_new_tokens
    longest = max(lengths)
    device = next(model.parameters()).device
    ids = torch.tensor([[*s, *[0] * (longest - len(s))] for s in sequences], device=device)
    mask = torch.tensor([[1] * n + [0] * (longest - n) for n in lengths], device=device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    rows, largest = [], 0.0
    for i, n in enumerate(lengths):
        scores = logits[i, n - last - 1 : n - 1].double()
        rows.append(scores.log_softmax(-1).gather(1, ids[i, n - last : n, None])[:, 0])
        largest = max(largest, scores.abs().max().item())
    return torch.stack(rows).cpu(), largest
