"""The self-check of token trees: does a model give the same results on a token tree as on padded rows?

It runs once for each kind of model. A few short rows are scored in both ways, with their gradients: by the model itself
and by its small fp32 twin on the same device. In the twin, errors such as a window that is off by one or a wrong
gradient are clearly larger than rounding. The effect of rounding is measured with the model's own padded forward: with
the rows in two batches, and with embeddings that are changed by one rounding.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from flashpo._causal_lm import CausalLM, Unsupported
from flashpo._hosts import sharding
from flashpo._hosts.peft import adapters_of
from flashpo._hosts.transformers import HOOKED
from flashpo._memory import out_of_memory
from flashpo._precision import autocast_to, one_at_a_time
from flashpo._twin import small_twin
from flashpo.packing.attention import PREFIX
from flashpo.packing.image_trial import ImageTrial
from flashpo.packing.images import ImageRows
from flashpo.packing.support import why_no_images
from flashpo.packing.trial import Scored, Trial, is_plain, is_sharded, on_trial

log = logging.getLogger("flashpo")
_answers: dict[Hashable, str] = {}

# A difference is allowed up to NOISE (by bytes of the dtype) times the measured noise, plus ROUNDINGS roundings of the
# largest number, within which any two forwards may differ
NOISE = {8: 8.0, 4: 8.0, 2: 3.0}
ROUNDINGS = 2.0
MOST_NOISE = 1e-3  # times the largest log-prob: if two batches differ by more, this may be more than rounding
QUANTILE = 0.9
Size = Callable[[Tensor], float]


def check_parity(model: nn.Module) -> None:
    """Raise Unsupported if `parity(model)` gives a reason."""
    if reason := parity(model):
        raise Unsupported(reason)


def parity(model: nn.Module, head: bool = True, agree: Callable[[list], list] = list) -> str:
    """`why_wrong`, computed once per process for each kind of model (classes, options and dtypes of all modules).

    Args:
        head: False if `model` is a backbone.
        agree: for distributed runs: gathers a list from each rank and returns the concatenation. All ranks then get the
            same answer, and all run the model if one of them has to. By default the process decides alone.

    Returns:
        What is wrong; empty if token trees are right for `model`.
    """
    return _asked_once((_kind(model), head), lambda: why_wrong(model, head), agree, sharding.meets(model))


def image_parity(model: nn.Module, sample: ImageRows) -> str:
    """`parity` for rows with images, which begin like those of a batch. Of a sharded model only the small twin is
    checked, because other ranks may have no images."""
    lm = CausalLM.of(model)
    if reason := why_no_images(lm.backbone):
        return reason
    return _asked_once((_kind(model), "images"), lambda: _why_wrong_with_images(model, lm.base, sample))


def _asked_once(
    key: Hashable, why: Callable[[], str], agree: Callable[[list], list] = list, meets: bool = False
) -> str:
    """The answer for `key`: the known one, or what `why` returns.

    meets: whether forwards of the model have collectives. If so, a rank that runs out of memory in a forward cannot
        call `agree`, because the other ranks would take what it sends for its weights. Its error ends the run.
    """
    # No lock around `agree`: a rank waiting in it for a rank whose thread waits for the lock would wait forever
    with one_at_a_time if agree is list else contextlib.nullcontext():
        if all(agree([key in _answers])):
            return _answers[key]
        lasts = True
        try:
            reason = why()
        except Exception as error:
            if meets or not out_of_memory(error):
                raise
            reason, lasts = f"there is no memory for the comparison of a token tree with padded rows: {error}", False
        answers = agree([(reason, lasts)])
        wrong = next((reason for reason, lasts in answers if reason and lasts), "")
        if wrong or all(lasts for _, lasts in answers):
            _answers[key] = wrong
            return wrong
        return next(reason for reason, _ in answers if reason)


def why_wrong(model: nn.Module, head: bool = True) -> str:
    """What is wrong with token trees for `model`; empty if they are right.

    Raises:
        RuntimeError, MemoryError: there is not enough memory for the comparison.
    """
    base: Any = CausalLM.of(model).base if head else model
    try:
        with torch.inference_mode(False):  # gradients are compared, too
            if not head and is_sharded(model):  # it cannot run alone: the whole model gathers its weights
                reason = _twin_differs(base, head)
            else:
                with on_trial(model, head):
                    reason = _twin_differs(base, head) or _differs(Trial(model, head))
    except Exception as error:  # any exception, because the model's own code runs here
        if out_of_memory(error):
            raise
        reason = f"{type(error).__name__} on a few short rows: {error}"
    return reason and f"{base.config.model_type}: {reason}"


def _why_wrong_with_images(model: nn.Module, base: Any, sample: ImageRows) -> str:
    try:
        with torch.inference_mode(False):
            reason = _twin_with_images_differs(base, sample)
            if not reason and not is_sharded(model):
                with on_trial(model):
                    reason = _differs(ImageTrial(model, sample))
    except Exception as error:  # any exception, because the model's own code runs here
        if out_of_memory(error):
            raise
        reason = f"{type(error).__name__} on a few rows with an image: {error}"
    return reason and f"{base.config.model_type}: {reason}"


def _twin_with_images_differs(base: Any, sample: ImageRows) -> str:
    try:
        twin: Any = small_twin(base, sample.length)
        with on_trial(twin), torch.autocast(twin.device.type, enabled=False):
            trial = ImageTrial(twin, sample.small(twin), parameters=True)
            trial.padded()
    except Exception as error:  # any exception; the twin may need images of another size, for example
        log.debug("no small %s with images: %s", type(base).__name__, error)
        return f"it is sharded, and no small {type(base).__name__} takes its images" if is_sharded(base) else ""
    with on_trial(twin), torch.autocast(twin.device.type, enabled=False):
        reason = _differs(trial)
    return reason and f"in a small {type(base).__name__} of the same config {reason}"


def _twin_differs(base: Any, head: bool) -> str:
    try:
        twin = small_twin(base)
    except ValueError as error:  # some configs cannot be made small; then only the model itself is compared
        log.debug("%s", error)
        return ""
    with on_trial(twin, head), torch.autocast(twin.device.type, enabled=False):
        reason = _differs(Trial(twin, head, parameters=True))
    return reason and f"in a small {type(base).__name__} of the same config {reason}"


def _differs(trial: Trial) -> str:
    """What is wrong in any of the ways in which the model runs trees. With dropout in its attention it is trained
    segment by segment, but scored by the kernel, so that both are compared."""
    ways = [trial.packed, trial.packed_by_segments] if trial.has_dropout() else [trial.packed]
    return next(filter(None, (_way_differs(trial, way) for way in ways)), "")


def _way_differs(trial: Trial, on_tree: Callable[[], Scored]) -> str:
    dtype = _coarsest(trial.model)
    exact, times = dtype == torch.float32, NOISE[dtype.itemsize]
    padded, packed, apart, nudged = trial.padded(), on_tree(), trial.apart(), trial.nudged(_eps(dtype))
    if not padded.values.isfinite().all():
        return "its own log-probs are not finite"

    def compare(what: str, size: Size, largest: float, part: Callable[[Scored], Tensor]) -> str:
        distance, by_shape, noise = (size(part(other) - part(padded)) for other in (packed, apart, nudged))
        if what == "gradients" or by_shape <= max(times * noise, MOST_NOISE * largest):
            noise = max(noise, by_shape)
        if not beyond_rounding(distance, noise, largest, dtype):
            return ""
        found = f"{what} of a token tree differ from those of padded rows by {distance:.1e} ({dtype})"
        return f"{found}, where rounding makes {noise:.1e}"

    # In 16 bits a router may choose another expert for a token, which changes its log-prob a lot: a quantile ignores
    # a few such tokens
    what, largest = "log-probs" if trial.head else "hidden states", max(1.0, padded.values.abs().max().item())
    if reason := compare(what, _root_mean_square if exact else _most, largest, lambda scored: scored.values):
        return reason
    size = _norm if exact else _most_of_tokens
    largest = math.hypot(*(size(x) for x in padded.gradients))
    for i in range(len(padded.gradients) if math.isfinite(largest) else 0):  # fp16 may overflow: the loss is not scaled
        if reason := compare("gradients", size, largest, lambda scored: scored.gradients[i]):  # noqa: B023
            return reason
    return ""


def beyond_rounding(distance: float, noise: float, largest: float, dtype: torch.dtype) -> bool:
    """Whether numbers differ by more than rounding can explain.

    noise: the difference that rounding was measured to make. largest: the size of the numbers.
    """
    return not distance <= NOISE[dtype.itemsize] * noise + ROUNDINGS * _eps(dtype) * largest  # true for NaN, too


def _kind(model: nn.Module) -> Hashable:
    """A key that models share if their forwards are the same function of their parameters."""
    modules = list(model.modules())
    configs = {id(c): c for m in modules if isinstance(c := getattr(m, "config", None), PreTrainedConfig)}
    texts = frozenset(c.to_json_string() + str(c._attn_implementation).removeprefix(PREFIX) for c in configs.values())
    tensors = frozenset((p.dtype, p.device.type, type(p), p.is_inference()) for p in model.parameters())
    autocast = autocast_to(next(model.parameters()).device.type)
    return texts, adapters_of(model), tensors, autocast, tuple((type(m), _own_forward(m), _options(m)) for m in modules)


def _own_forward(module: nn.Module) -> Any:
    # a compiled layer counts as its class, because a trial runs it uncompiled
    forward = None if "_flashpo_kind" in vars(module) else vars(module).get("forward")
    forward = getattr(forward, "__func__", forward)
    return getattr(forward, "__code__", type(forward))


def _options(module: nn.Module) -> Hashable:
    return frozenset((name, x) for name, x in vars(module).items() if name not in ("training", HOOKED) and is_plain(x))


def _coarsest(model: nn.Module) -> torch.dtype:
    """The coarsest dtype in which a forward computes. fp32 counts as the finest even for fp64 models, because norms and
    rotary angles are computed in fp32."""
    device = next(model.parameters()).device.type
    dtypes: list[Any] = [p.dtype for p in model.parameters()]
    dtypes += [getattr(m, "compute_dtype", None) for m in model.modules()] + [autocast_to(device)]
    return max((x for x in (torch.float32, torch.bfloat16, torch.float16) if x in [torch.float32, *dtypes]), key=_eps)


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _most(x: Tensor) -> float:
    return x.abs().flatten().quantile(QUANTILE).item()


def _norm(x: Tensor) -> float:
    return x.norm().item()


def _most_of_tokens(x: Tensor) -> float:
    return _most(x.norm(dim=-1))
