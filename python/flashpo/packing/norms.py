"""Runs RMSNorm as one operator of torch on GPUs.

    y = x / sqrt(mean(x^2) + eps) * (weight + offset)

transformers writes it as six operators, which make thirteen more in backward. Layers have norms at their inputs and at
their attention heads, so that norms make half of the kernel launches of a training pass. If the host is slow, the GPU
waits for these launches.

The fused operator rounds once. The Llama of transformers also rounds before it multiplies by the weight.
"""

import contextlib
import copy
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Formula(NamedTuple):
    """The details in which norms differ."""

    eps: float
    offset: float  # 1 in Gemma's family, whose weights are differences from 1; otherwise 0
    promotes: bool  # whether the result has the promoted dtype of input and weight; otherwise it has the input's


def fuse_norms(model: nn.Module) -> None:
    """Let the norms of a model of transformers run as one operator. This cannot be undone, except within
    `original_norms`. Norms whose forward somebody has replaced keep that forward."""
    for module in model.modules():
        if "forward" not in module.__dict__ and (formula := _formula(module)) is not None:
            module._flashpo_norm = formula  # type: ignore[assignment]
            module.forward = types.MethodType(fused_norm_forward, module)


@contextlib.contextmanager
def original_norms(model: nn.Module) -> Iterator[None]:
    """Within the block, the norms of `model` have their original forwards."""
    fused = [module for module in model.modules() if _fused(module)]
    forwards = [module.__dict__.pop("forward") for module in fused]
    try:
        yield
    finally:
        for module, forward in zip(fused, forwards):
            module.forward = forward


def fused_norm_forward(self: Any, x: Tensor) -> Tensor:
    """The new forward of `self`, a norm of transformers."""
    return rms_norm(x, self.weight, self._flashpo_norm) if _pays(x) else type(self).forward(self, x)


def rms_norm(x: Tensor, weight: Tensor, formula: Formula) -> Tensor:
    dtype = torch.promote_types(x.dtype, weight.dtype)
    wide = torch.promote_types(dtype, torch.float32) if formula.offset else dtype  # so that 1 + weight is not rounded
    weight = weight.to(wide) + formula.offset if formula.offset else weight.to(wide)
    y = F.rms_norm(x.to(wide), weight.shape, weight, formula.eps)
    return y.to(dtype if formula.promotes else x.dtype)


def _fused(module: nn.Module) -> bool:
    return getattr(module.__dict__.get("forward"), "__func__", None) is fused_norm_forward


def _pays(x: Tensor) -> bool:
    """Whether torch's operator is faster. torch has a kernel for it on GPUs only; on CPUs it runs the same six
    operators. A compiler fuses the six operators with those around them."""
    return x.is_cuda and not torch.compiler.is_compiling()


def _formula(module: nn.Module) -> Formula | None:
    """The formula that the class of `module` computes, found by running it; None if it is not of the form above."""
    weight, eps = module.__dict__.get("_parameters", {}).get("weight"), _eps(module)
    known = type(module).__module__.startswith("transformers.") and type(module).__name__.endswith("RMSNorm")
    if not known or weight is None or weight.dim() != 1 or eps is None:
        return None
    # x is so small that eps has an effect
    x = torch.linspace(-1, 1, 24, dtype=torch.float32, device="cpu").view(3, 8) * eps**0.5
    trial = copy.copy(module)
    trial_weight = nn.Parameter(torch.linspace(0.5, 2, 8, dtype=torch.float32, device="cpu"))
    trial._parameters = {"weight": trial_weight}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            y, narrow = type(module).forward(trial, x), type(module).forward(trial, x.bfloat16())
        except (TypeError, RuntimeError):  # it takes a gate or an input of another shape
            return None
        for offset in (0.0, 1.0):
            formula = Formula(eps, offset, promotes=narrow.dtype == torch.float32)
            if torch.allclose(y, rms_norm(x, trial_weight, formula), rtol=1e-5, atol=1e-6):
                return formula
    return None


def _eps(module: Any) -> float | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return float(eps) if isinstance(eps, (int, float)) and eps > 0 else None
