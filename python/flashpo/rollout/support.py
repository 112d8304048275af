"""Which models the engine can run, why it refuses the others, and what each layer stores in the cache."""

import inspect
import weakref
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import GenerationMixin, PreTrainedConfig

from flashpo._causal_lm import CACHED, STATEFUL, WITH_ATTENTION, CausalLM, Unsupported, layers_of_wrapping
from flashpo._hosts import sharding
from flashpo._hosts.peft import why_not_by_layers
from flashpo._hosts.transformers import layer_types, takes_attentions
from flashpo.rollout import seam
from flashpo.rollout.hybrid import is_hybrid

# Trainers change these options while they run, and none of our forwards depends on them.
NO_FACTS = ("use_cache", "pad_token_id", "bos_token_id", "eos_token_id")
FIXED_UP_TO = ("dynamic", "longrope")  # rope whose frequencies depend on the longest row once it exceeds some length


@dataclass(frozen=True)
class Layer:
    """One attention layer: what it caches for a token, and how many tokens it sees (window 0: all earlier tokens)."""

    index: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int


@dataclass(frozen=True)
class Support:
    """Whether the engine can run a model.

    Attributes:
        ok: True if it can, as far as `support` can tell.
        reason: Why it cannot; empty if it can.
        layers: The attention layers.
        longest: The largest number of tokens in a sequence; None if there is no limit.
        hybrid: Whether some layers keep a recurrent state instead of keys and values.
    """

    ok: bool
    reason: str
    layers: tuple[Layer, ...] = ()
    longest: int | None = None
    hybrid: bool = False


def support(model: nn.Module) -> Support:
    """Says whether the engine can run `model`, and if not, why.

    First it looks at classes and configs, then at the calls of attention in a forward of two tokens. It does not
    compare results: `RolloutEngine` does so in a self-check before its first rollout (see parity.py).

    Args:
        model: A causal language model of transformers, also inside wrappers of PEFT and others.

    Returns:
        `ok` and the `reason` why not, the attention layers, and the longest sequence.

    Raises:
        ModelInUse: A rollout of the model has not ended.
    """
    reason = next(_refusals(model), None)
    if reason is not None:
        return Support(False, reason)
    config = CausalLM.of(model).base.config.get_text_config()
    try:
        calls = seam.probe(model)
    except Unsupported as error:
        return Support(False, str(error))
    except seam.ModelInUse:
        raise
    except Exception as error:  # of any kind: it is the model's own code
        return Support(False, f"{type(error).__name__} in a forward of two tokens: {error}")
    types, details = layer_types(config)
    expected = {i for i, kind in enumerate(types) if kind in (*CACHED, *WITH_ATTENTION)}
    seen = Counter(call.layer for call in calls)
    if not seen:
        return Support(False, "its layers never call transformers' attention interface")
    if missing := sorted(expected - seen.keys()):
        return Support(False, f"layers {missing} do not call transformers' attention interface")
    if twice := sorted(layer for layer, times in seen.items() if times > 1):
        return Support(False, f"layers {twice} call attention more than once in a forward")
    layers = []
    for call in calls:
        window = call.window if call.window_given else details[call.layer].get("sliding_window")  # PhiMoE: mask only
        layers.append(Layer(call.layer, call.kv_heads, call.head_dim, call.value_dim, window or 0))
    return Support(True, "", tuple(layers), longest(config), is_hybrid(config))


def structure(model: nn.Module) -> Hashable:
    """A value that changes when the answers of `support` and the self-check may change: when the model gets another
    module, config, dtype or device.

    It is cheap enough to be computed at every call. Weak references to the modules let a replaced module be freed, and
    a new module at its address is not mistaken for it.
    """
    modules = list(model.modules())
    configs = {id(c): c for c in (getattr(m, "config", None) for m in modules) if isinstance(c, PreTrainedConfig)}
    return (
        tuple(map(weakref.ref, modules)),
        _own_generate(model),
        tuple(facts(config) for config in configs.values()),
        frozenset((p.dtype, p.device, p.shape) for p in model.parameters()),
    )


def facts(config: PreTrainedConfig) -> str:
    """All options of a config that a forward may depend on, as text."""
    return str({name: value for name, value in config.to_dict().items() if name not in NO_FACTS})


def _refusals(model: nn.Module) -> Iterator[str]:
    """The reasons for a refusal that can be found without a forward."""
    try:
        lm = CausalLM.of(model)
    except Unsupported as error:
        yield str(error)
        return
    base, config = lm.base, lm.base.config.get_text_config()
    if adapters := why_not_by_layers(model):
        yield adapters
    if owner := _own_generate(model):
        yield f"{owner} has a generate of its own"
    if base.config.is_encoder_decoder:
        yield "encoder-decoder models are not supported"
    if reason := sharding.why_no_view(model):
        yield reason
    if len(devices := {str(parameter.device) for parameter in model.parameters()}) > 1:
        yield f"its weights are spread over {', '.join(sorted(devices))}"
    if not takes_attentions(lm.text):
        yield f"{type(base).__name__} does not use transformers' attention interface"
    if "position_ids" not in inspect.signature(base.base_model.forward).parameters:
        yield f"{type(base.base_model).__name__} takes no position_ids, by which decoding says where a token stands"
    types, _ = layer_types(config)
    if other := sorted(set(types) - {*CACHED, *STATEFUL, "dummy"}):
        yield f"layers of type {', '.join(other)} are not supported: attention must see all earlier tokens or a window"


def _own_generate(model: nn.Module) -> str | None:
    """The class or instance whose own `generate` runs in place of transformers', in words; None if there is none."""
    for module in layers_of_wrapping(model):
        kind: Any = type(module)
        own = vars(module).get("generate")
        inner = sharding.without_hooks(own)
        if own is not None and (inner is own or getattr(inner, "__func__", None) is not kind.generate):
            return f"this {kind.__name__}"
        if getattr(kind, "generate", None) not in (None, GenerationMixin.generate) and not _is_peft(kind):
            return kind.__name__
    return None


def _is_peft(kind: type) -> bool:
    """PEFT's wrappers have a `generate` that calls the base model's."""
    generate: Any = kind.generate  # type: ignore[attr-defined]
    return generate.__module__.startswith("peft.")


def longest(config: PreTrainedConfig) -> int | None:
    """The largest number of tokens for which positions exist and do not depend on the longest row of a batch."""
    limits = [getattr(config, "max_position_embeddings", None)]
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if parameters.get("rope_type") in FIXED_UP_TO:
            limits.append(parameters.get("original_max_position_embeddings"))
    return min((limit for limit in limits if limit is not None), default=None)
