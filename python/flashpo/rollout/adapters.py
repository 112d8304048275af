"""Which layers of PEFT are plain LoRA, and the product that such a layer computes in a rollout."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashpo._hosts.peft import is_instance


def vanilla_lora(layer: Any) -> list[tuple[Tensor, Tensor, float]] | None:
    """(A, B, s) of each active adapter of the layer; None where the layer does more than `W x + sum s B A x`."""
    if not is_instance(layer, "peft.tuners.lora.layer", "Linear") or not is_plain_linear(layer.base_layer):
        return None
    if layer.disable_adapters or layer.merged:
        return None if layer.disable_adapters and layer.merged else []
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.fan_in_fan_out or any(name in layer.lora_variant or layer.lora_B[name].bias is not None for name in names):
        return None
    return [(layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name])) for name in names]


def lora_linear(base: nn.Module, adapters: list[tuple[Tensor, Tensor, float]], x: Tensor) -> Tensor:
    """`base(x) + sum s B A x` in PEFT's dtypes: each product in the dtype of its adapter, and the sum is converted to
    the dtype of `base(x)` once at the end."""
    y = base(x)
    out = y.flatten(0, -2)
    for a, b, s in adapters:
        rows = x.flatten(0, -2).to(a.dtype)
        out = torch.addmm(out.to(b.dtype), F.linear(rows, a), b.t(), alpha=s)
    return out.view(y.shape).to(y.dtype)


def is_plain_linear(module: Any) -> bool:
    """Whether a module computes what nn.Linear does, which a quantised or parametrised subclass does not."""
    weight = module._parameters.get("weight")
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and type(weight) in (nn.Parameter, Tensor)
        and weight.is_floating_point()
    )
