"""FSDP2, FSDP1 and DeepSpeed: which weights they shard, and how to gather them for a while."""

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Buffer = Callable[[nn.Module, str, Tensor, torch.dtype], Tensor]


@dataclass(frozen=True)
class Gathered:
    """How many bytes of sharded weights were brought to this rank, and how long that took; 0 s if there were none."""

    size: int = 0  # bytes
    seconds: float = 0.0

    def __add__(self, other: "Gathered") -> "Gathered":
        return Gathered(self.size + other.size, self.seconds + (other.seconds if other.size else 0.0))


def why_no_view(model: nn.Module) -> str:
    """Why a rollout cannot compute with the parameters; empty if it can, if need be after gathering them."""
    if any(wraps_in_fsdp1(module) for module in model.modules()):
        return "FSDP1 shards the weights: use FSDP2 (fsdp_version: 2 in accelerate's config)"
    for param in model.parameters():
        status = getattr(param, "ds_status", None)
        if status is not None and status.name != "AVAILABLE":
            return "ZeRO-3 shards the weights: gather them first (TRL does so with ds3_gather_for_generation=True)"
        if param.device.type == "meta":
            return "weights are on the meta device (offloaded)"
    if not any(is_fsdp2_unit(module) for module in model.modules()) and any(
        is_dtensor(param) for param in model.parameters()
    ):
        return "weights are DTensors, but not of FSDP2 (tensor parallelism)"
    return ""


def meets(model: nn.Module) -> bool:
    """Whether a forward of `model` has collectives, so that all ranks must run the same number of forwards."""
    wrapped = (m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel) or wraps_in_fsdp1(m))
    return any(wrapped) or any(hasattr(p, "ds_id") or is_dtensor(p) for p in model.parameters())


def why_no_tower(model: nn.Module) -> str:
    """Why the sharded weights of a model cannot run a tower of images on token trees; empty if they can, or if the
    weights are whole."""
    if not meets(model) or any(is_fsdp2_unit(module) for module in model.modules()):
        return ""
    return "the weights are sharded, but not by FSDP2"


def inside_engine(model: nn.Module) -> nn.Module:
    """The model inside an engine of DeepSpeed; any other model as it is.

    A backward through a forward of the engine itself would involve the engine.
    """
    deepspeed = sys.modules.get("deepspeed")
    return model.module if deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine) else model


def wraps_in_fsdp1(module: nn.Module) -> bool:
    fsdp1 = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    return fsdp1 is not None and isinstance(module, fsdp1.FullyShardedDataParallel)


def zero3_bytes(model: nn.Module) -> int:
    """The size in bytes of the weights that ZeRO-3 would have to gather now."""
    params: list[Any] = [p for p in model.parameters() if hasattr(p, "ds_id")]
    return sum(p.ds_numel * p.dtype.itemsize for p in params if p.ds_status.name != "AVAILABLE")


def is_fsdp2_unit(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def reshard(model: nn.Module) -> None:
    """Makes FSDP2 use the sharded weights again.

    After a forward without a backward, FSDP2's root module keeps its gathered weights, which its optimizer does not
    update.
    """
    for state in _fsdp_states(model):
        for module in state._modules:
            module.reshard()


@contextlib.contextmanager
def gathered(model: nn.Module, buffer: Buffer) -> Iterator[int]:
    """Within it, every rank has all weights that FSDP2 shards, in the dtype in which FSDP2's policy computes.

    FSDP2's hooks are removed meanwhile. Yields the number of gathered bytes. This is a collective: all ranks must enter
    it.

    Args:
        buffer: buffer(module, name, value, dtype) copies a gathered value and returns the copy that is used.
    """
    states = {module: state for state in _fsdp_states(model) for module in state._modules}
    whole: dict[int, Tensor] = {}
    size = 0
    places: list[tuple[nn.Module, str, nn.Parameter]] = []
    generates = {m: vars(m)["generate"] for m in states if "generate" in vars(m)}
    hooks = [table for m in states for table in (m._forward_pre_hooks, m._forward_hooks)]
    before = [dict(table) for table in hooks]
    try:
        for module, dtype in _with_compute_dtype(model, states, None):
            for name, param in list(module._parameters.items()):
                if not is_dtensor(param):
                    continue
                if id(param) not in whole:  # tied weights are gathered once
                    value = param.detach().full_tensor()
                    size += value.nbytes
                    whole[id(param)] = buffer(module, name, value, dtype or value.dtype)
                places.append((module, name, param))
                module._parameters[name] = whole[id(param)]
        for table in hooks:
            for key in [key for key, hook in table.items() if _owner(hook) in states.values()]:
                del table[key]
        for owner, generate in generates.items():
            vars(owner)["generate"] = without_hooks(generate)
        yield size
    finally:
        for owner, generate in generates.items():
            vars(owner)["generate"] = generate
        for module, name, param in places:
            module._parameters[name] = param
        for table, hooked in zip(hooks, before):
            table.clear()
            table.update(hooked)


def is_dtensor(param: Tensor | None) -> bool:
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(param, tensor.DTensor)


def without_hooks(method: Any) -> Any:
    """The method that `register_fsdp_forward_method` of FSDP2 has wrapped; trainers wrap `generate` in this way."""
    while getattr(method, "__globals__", {}).get("__name__", "").startswith("torch.distributed.fsdp."):
        method = method.__wrapped__
    return method


def _owner(hook: Callable) -> object:
    """The state of FSDP2 whose method a hook is. A state of several modules wraps its methods, hence the unwrapping."""
    return getattr(inspect.unwrap(hook, stop=lambda f: hasattr(f, "__self__")), "__self__", None)


def _fsdp_states(model: nn.Module) -> Iterator:
    units: list[Any] = [module for module in model.modules() if is_fsdp2_unit(module)]
    for unit in units:
        yield unit._get_fsdp_state()


def _with_compute_dtype(module: nn.Module, states: dict, dtype: torch.dtype | None) -> Iterator[tuple]:
    """Each module with the `param_dtype` of the innermost FSDP2 module around it."""
    if module in states:
        dtype = states[module]._mp_policy.param_dtype
    yield module, dtype
    for child in module.children():
        yield from _with_compute_dtype(child, states, dtype)


def zero3_shards(params: list[Any]) -> bool:
    return any(hasattr(p, "ds_id") for p in params)


def gathered_by_zero3(params: list[Any]) -> contextlib.AbstractContextManager:
    """Gathers those parameters that are not gathered yet.

    The others must be left out: sharding them at the end would take tied weights from the embeddings, which still use
    them.
    """
    import deepspeed

    return deepspeed.zero.GatheredParameters([p for p in params if p.ds_status.name != "AVAILABLE"])


@contextlib.contextmanager
def gathered_by_fsdp2(unit: Any) -> Iterator[None]:
    """Within it, the weights of one unit of FSDP2 are whole. It does not run the unit's hooks.

    Gradients are still reduced, because FSDP2 reduces those of every unit at the end of backward.
    """
    unit.unshard()
    try:
        yield
    finally:
        unit.reshard()
