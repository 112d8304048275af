"""PEFT's layers as a rollout sees them: which are plain LoRA, what they compute, and which adapter answers."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextlib.contextmanager
def active_adapter(model: nn.Module, name: str) -> Iterator[None]:
    """PEFT computes with the adapter `name`; `requires_grad` stays, which `set_adapter` would change."""
    layers: list[Any] = [m for m in model.modules() if is_tuner_layer(m) or _is_saved_module(m)]
    known = sorted({key for layer in layers if is_tuner_layer(layer) for key in layer._all_available_adapter_names()})
    if name not in known:
        raise ValueError(f"adapters: no adapter {name!r} in the model, which has {known}")
    before = [layer._active_adapter for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = [name] if is_tuner_layer(layer) or name in layer._adapters else []
        yield
    finally:
        for layer, active in zip(layers, before):
            layer._active_adapter = active


def vanilla_lora(layer: Any) -> list[tuple[Tensor, Tensor, float]] | None:
    """A, B and s of the adapters that answer; None where the layer does more than `W x + sum s B A x`."""
    if not _is_instance(layer, "peft.tuners.lora.layer", "Linear") or not is_plain_linear(layer.base_layer):
        return None
    if layer.disable_adapters or layer.merged:
        return None if layer.disable_adapters and layer.merged else []
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.fan_in_fan_out or any(name in layer.lora_variant or layer.lora_B[name].bias is not None for name in names):
        return None
    return [(layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name])) for name in names]


def lora_linear(base: nn.Module, adapters: list[tuple[Tensor, Tensor, float]], x: Tensor) -> Tensor:
    """`base(x) + sum s B A x` with PEFT's dtypes: each product in its adapter's, the sum rounded once at the end."""
    y = base(x)
    out = y.flatten(0, -2)
    for a, b, s in adapters:
        rows = x.flatten(0, -2).to(a.dtype)
        out = torch.addmm(out.to(b.dtype), F.linear(rows, a), b.t(), alpha=s)
    return out.view(y.shape).to(y.dtype)


def adapter_states(model: nn.Module) -> tuple:
    layers: list[Any] = [module for module in model.modules() if is_tuner_layer(module)]
    return tuple((tuple(x.active_adapters), x.disable_adapters, tuple(x.merged_adapters)) for x in layers)


def is_tuner_layer(module: nn.Module) -> bool:
    return _is_instance(module, "peft.tuners.tuners_utils", "BaseTunerLayer")


def is_plain_linear(module: Any) -> bool:
    """nn.Linear that computes what nn.Linear does: not a quantised or parametrised one."""
    weight = module._parameters.get("weight")
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and type(weight) in (nn.Parameter, Tensor)
        and weight.is_floating_point()
    )


def _is_saved_module(module: nn.Module) -> bool:
    return _is_instance(module, "peft.utils.other", "AuxiliaryTrainingWrapper")


def _is_instance(module: nn.Module, where: str, name: str) -> bool:
    """isinstance, without importing a library that the model cannot be made of if nobody has."""
    return where in sys.modules and isinstance(module, getattr(sys.modules[where], name))
