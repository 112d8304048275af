"""PEFT: which adapters of a model are active, and what happens only in the forward of PEFT's wrapper.

FlashPO calls the backbone and the head of a model directly, so it must know what such calls would leave out. To find
out, the model is changed for a moment: other adapters are activated, or a stand-in replaces its forward.
`why_not_by_layers` and `why_not_trained_by_layers` reserve the model meanwhile (`_ownership.alone`). A caller of
`active_adapter` must have reserved it already.
"""

import contextlib
import copy
import functools
import logging
import sys
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flashpo._causal_lm import layers_of_wrapping
from flashpo._ownership import alone

log = logging.getLogger("flashpo")
CHANGED = 1e-3  # a larger relative difference cannot come from the rounding of fp32
SIZES = (
    0.03,
    0.1,
    0.3,
    1.0,
)  # standard deviations of random adapter weights: a router does not choose if they are small, and saturates if large


def why_not_by_layers(model: nn.Module, names: Iterable[str] = ()) -> str:
    """The reason why FlashPO cannot replace the model's own forward by calls of its backbone and head; empty if it can.

    It can if these calls, on tokens in another layout, compute what the model's own forward computes, both under the
    active adapters and under each adapter in `names`. This is tried with PEFT's code instead of looked up by the type
    of adapter, so that it also holds for types of adapters that FlashPO does not know.

    Raises:
        ModelInUse: The model has adapters and is in use, in another thread or further up in this one.
    """
    if not _has_adapters(model):
        return ""
    with alone(model):
        return _why_not(model, training=False) or _why_not_under(model, names, training=False)


def why_not_trained_by_layers(model: nn.Module) -> str:
    """`why_not_by_layers` for outputs and gradients in training, with each adapter activated in turn."""
    wrapper: Any = peft_model(model)
    if wrapper is None:
        return ""
    with alone(model):
        return _why_not_under(model, wrapper.peft_config, training=True)


def _why_not_under(model: nn.Module, names: Iterable[str], training: bool) -> str:
    for name in names:
        with active_adapter(model, name):
            if reason := _why_not(model, training):
                return reason
    return ""


def _why_not(model: nn.Module, training: bool) -> str:
    wrapper: Any = peft_model(model)
    if wrapper is not None and (what := _outside(wrapper, list(layers_of_wrapping(model))[-1])):
        kind = wrapper.peft_config[wrapper.active_adapter].peft_type
        return f"PEFT's {getattr(kind, 'value', kind)} acts outside of the model's layers: {what}"
    layers: list[Any] = [layer for layer in model.modules() if is_tuner_layer(layer)]
    adapters = adapters_of(model) if layers else ""
    for layer in layers:
        if not layer.disable_adapters and not layer.merged and _mixes_tokens(layer, adapters, training):
            where = type(layer).__module__.removesuffix(".layer")
            return f"the adapters of {where} mix the tokens of a batch in their {type(layer).__name__} layers"
    return ""


def _has_adapters(model: nn.Module) -> bool:
    return peft_model(model) is not None or any(is_tuner_layer(module) for module in model.modules())


def adapters_of(model: nn.Module) -> str:
    """The configurations of all adapters, as a text that is equal for equal configurations."""
    found = (getattr(module, "peft_config", None) for module in model.modules())
    configs = next((configs for configs in found if isinstance(configs, dict)), {})
    return repr({name: (type(config).__name__, _ordered(config.to_dict())) for name, config in configs.items()})


def _ordered(options: dict) -> dict:
    """Replaces sets by sorted lists, because a set and its copy can have different orders."""
    return {name: sorted(x, key=repr) if isinstance(x, set) else x for name, x in options.items()}


def peft_model(model: nn.Module) -> nn.Module | None:
    """PEFT's wrapper of the model, which may be inside other wrappers; None if there is none."""
    return next((m for m in model.modules() if is_instance(m, "peft.peft_model", "PeftModel")), None)


@contextlib.contextmanager
def active_adapter(model: nn.Module, name: str) -> Iterator[None]:
    """Within it, PEFT computes with the adapter `name`. Unlike `set_adapter`, this does not change `requires_grad`."""
    layers: list[Any] = [m for m in model.modules() if is_tuner_layer(m) or _is_saved_module(m)]
    wrapper: Any = peft_model(model)
    known = {key for layer in layers if is_tuner_layer(layer) for key in layer._all_available_adapter_names()}
    known |= set() if wrapper is None else wrapper.peft_config.keys()
    if name not in known:
        raise ValueError(f"adapters: no adapter {name!r} in the model, which has {sorted(known)}")
    owners: list[Any] = (
        [] if wrapper is None else [m for m in (wrapper, wrapper.base_model) if "active_adapter" in vars(m)]
    )
    before = [layer._active_adapter for layer in layers], [owner.active_adapter for owner in owners]
    try:
        for layer in layers:
            layer._active_adapter = [name] if is_tuner_layer(layer) or name in layer._adapters else []
        for owner in owners:
            owner.active_adapter = name
        yield
    finally:
        for layer, active in zip(layers, before[0]):
            layer._active_adapter = active
        for owner, active in zip(owners, before[1]):
            owner.active_adapter = active


def adapter_states(model: nn.Module) -> tuple:
    layers: list[Any] = [module for module in model.modules() if is_tuner_layer(module)]
    return tuple((tuple(x.active_adapters), x.disable_adapters, tuple(x.merged_adapters)) for x in layers)


def is_tuner_layer(module: nn.Module) -> bool:
    return is_instance(module, "peft.tuners.tuners_utils", "BaseTunerLayer")


def _is_saved_module(module: nn.Module) -> bool:
    return is_instance(module, "peft.utils.other", "AuxiliaryTrainingWrapper")


def is_instance(module: nn.Module, where: str, name: str) -> bool:
    """isinstance for a class `name` of the module `where`, which is not imported: without it there are no instances."""
    return where in sys.modules and isinstance(module, getattr(sys.modules[where], name))


# what only the forward of the wrapper does


def _outside(wrapper: Any, base: Any) -> str:
    """What `wrapper.forward` does besides calling the forward of `base` with the same tokens; empty if nothing.

    The model computes nothing: a stand-in replaces the forward of `base` and looks at its arguments, at the hooks and
    at the active adapters.
    """
    for module in (wrapper, wrapper.base_model, base):
        if any(_is_code_of(wrapper, hook) for hook in _hooks_of(module)):
            return f"it has hooks on {type(module).__name__}"
    ids = torch.zeros((1, 2), dtype=torch.int64, device=next(base.parameters()).device)
    hooks, states = _hooks(base), adapter_states(base)
    seen: list[str] = []

    def stand_in(*args: Any, **given: Any) -> None:
        given = {name: x for name, x in given.items() if x is not None and name != "return_dict"}  # which is harmless
        given |= {f"argument {i}": x for i, x in enumerate(args)}
        if given.pop("input_ids", None) is not ids or given:
            seen.append(f"it gives the model {', '.join(sorted(given)) or 'other tokens'}")
        if new := sorted({type(module).__name__ for module, _ in _hooks(base) - hooks}):
            seen.append(f"it puts hooks on {', '.join(new)} for the length of a forward")
        if adapter_states(base) != states:
            seen.append("it switches adapters for the length of a forward")
        seen.append("")

    with _left_as_found(wrapper):
        base.forward = stand_in
        try:
            with torch.no_grad():
                wrapper.forward(input_ids=ids)
        except Exception as error:  # of any kind: it is the code of an adapter, given what the stand-in returns
            seen.append(f"{type(error).__name__}: {error}")
    return seen[0] if seen else "it does not call the forward that the model has now"


@contextlib.contextmanager
def _left_as_found(root: nn.Module) -> Iterator[None]:
    """Restores all attributes and hooks of the modules at the end. Some hooks would stay until a backward runs."""
    before = []
    for module in root.modules():
        hooks = {name: dict(x) for name, x in vars(module).items() if "_hooks" in name and isinstance(x, dict)}
        before.append((vars(module), dict(vars(module)), hooks))
    try:
        yield
    finally:
        for now, attributes, hooks in before:
            now.clear()
            now.update(attributes)
            for name, entries in hooks.items():
                now[name].clear()
                now[name].update(entries)


def _hooks(root: nn.Module) -> set[tuple[nn.Module, Any]]:
    return {(module, hook) for module in root.modules() for hook in _hooks_of(module)}


def _hooks_of(module: nn.Module) -> list[Any]:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def _is_code_of(wrapper: Any, hook: Any) -> bool:
    """Whether a hook comes from PEFT or from the file of the tuner, and not from FSDP2 or a user."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    where = getattr(hook, "__module__", None) or ""
    return where.split(".")[0] == "peft" or where == type(wrapper.base_model).__module__


# what layers do


_mixing: dict[Hashable, bool] = {}


def _mixes_tokens(layer: Any, adapters: str, training: bool) -> bool:
    """Whether a layer's result for a token depends on other tokens or on how the tokens are arranged in rows. In
    training, gradients count, too.

    This is tried once for each kind of layer and set of adapters, on copies with random adapter weights, because
    adapters are mostly the identity when training starts.
    """
    key = type(layer), type(layer.get_base_layer()), tuple(layer.active_adapters), adapters, training
    if key not in _mixing:
        _mixing[key] = _tried(layer, training)
    return _mixing[key]


def _tried(layer: Any, training: bool) -> bool:
    base = layer.get_base_layer()
    weight: Any = getattr(base, "weight", None)
    if type(weight) not in (nn.Parameter, Tensor) or weight.dim() not in (1, 2) or isinstance(base, nn.Embedding):
        return False  # the weight is sharded, quantised or missing, so that the layer cannot be tried
    features = getattr(base, "in_features", weight.shape[0])
    with torch.random.fork_rng(), torch.autocast(weight.device.type, enabled=False):
        torch.manual_seed(0)
        rows, others = (torch.randn((*shape, features), device=weight.device) for shape in ((2, 8), (1, 16)))
        others[0, 0] = rows[0, 0]
        try:
            trial = copy.deepcopy(layer).float()
            frozen = {id(parameter) for parameter in trial.get_base_layer().parameters()}
            for size in SIZES:
                for parameter in trial.parameters():
                    if id(parameter) not in frozen:
                        nn.init.normal_(parameter, std=size)
                pairs = zip(_of_first_token(trial, rows, training), _of_first_token(trial, others, training))
                if any((x - y).abs().max() > CHANGED * x.abs().max() for x, y in pairs):
                    return True
        except Exception as error:  # of any kind: it is the code of an adapter, called as its forward may never call it
            log.debug("no trial of %s: %s", type(layer).__name__, error)
    return False


def _of_first_token(trial: Any, x: Tensor, training: bool) -> list[Tensor]:
    """The layer's output for the first token, in training followed by the gradients of its sum.

    They are computed on a copy of the layer, because some layers keep what they have seen.
    """
    base = trial.get_base_layer()
    layer = copy.deepcopy(trial, {id(base): base}).train(training)
    torch.manual_seed(0)  # for dropout
    with torch.set_grad_enabled(training):
        out = layer(x)[0, 0]
    if not training:
        return [out]
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return [out.detach(), *torch.autograd.grad(out.sum(), parameters, allow_unused=True, materialize_grads=True)]
