"""The weights that a rollout computes with: the trainer's live weights, or copies of them in a faster form.

    with WeightView(model):   # linear layers compute with the view; parameters are never written
        ...                   # afterwards everything is as before, also after an exception

A copy, called shadow, is packed for decoding on a CPU, cast to the autocast dtype, merged with LoRA, or gathered from
FSDP2's shards. The shadows of layers that read the same input are contiguous, so that one product can compute them
together. Shadows are computed again on every entry, even if `fingerprint` has not changed, because an optimizer that
writes through `param.data` does not change `_version`. Packed copies keep their memory between entries, because
getting fresh pages from the system can take longer than packing. On CUDA all shadows keep their memory, so that CUDA
graphs stay valid. `release` frees it.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashpo._hosts import sharding
from flashpo._hosts.peft import active_adapter, adapter_states, is_tuner_layer
from flashpo._hosts.sharding import Gathered
from flashpo._huge_pages import HugePages
from flashpo.rollout.adapters import is_plain_linear, lora_linear, vanilla_lora
from flashpo.rollout.packed_linear import packed_linear

Linear = Callable[[Tensor], Tensor]
MODES, LORA = ("auto", "alias", "shadow"), ("auto", "live", "merged")
PACK_NUMEL = 1 << 13  # packing a smaller weight costs more than it saves over a short rollout
SAME_INPUT = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


@dataclasses.dataclass(frozen=True)
class ShadowLinear:
    """A linear layer that computes with a shadow of its weight."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclasses.dataclass(frozen=True)
class UnderAutocast:
    """A linear layer with weights cast to `dtype` under autocast, and with its `original` forward outside of autocast.

    Some layers (routers) turn autocast off for a part of their forward, to compute it with fp32 weights.
    """

    linear: Linear
    original: Linear
    device: str
    dtype: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        return self.linear(x.to(self.dtype)) if torch.is_autocast_enabled(self.device) else self.original(x)


class WeightView:
    """A context in which linear and LoRA layers compute with the weights chosen for a rollout.

    It replaces `forward` on instances of these layers and restores it on exit.

    Args:
        model: Any module, also a PEFT model.
        mode: Which weights linear layers compute with. "alias": the parameters themselves. "shadow": copies wherever
            a copy is faster; on a GPU these are the layers that read the same input (q, k and v; gate and up). "auto":
            copies where the parameters cannot be used as they are (autocast, merged LoRA), and packed copies of
            larger weights on a CPU.
        dtype: The dtype that the trainer autocasts to; None without autocast. With a dtype the context is an autocast
            region in which linear layers use weights that are already cast.
        lora: How LoRA layers compute. "live": `W x + s B A x`, as in training. "merged": `(W + s B A) x`, with the sum
            computed in fp32. "auto": merged where the sum also stays in fp32. In 16 bits it is not merged, because an
            adapter early in training changes W by less than half a unit in the last place: the change would be rounded
            away and the base model would answer. Where weights are packed, the many rows of a prefill go through the
            live layers.

    Raises:
        ValueError: An argument is wrong. On entry: the weights are sharded or wrapped in a way that has no view.
        RuntimeError: On exit: the weights or the active adapters have changed in the meantime.
    """

    def __init__(self, model: nn.Module, mode: str = "auto", *, dtype: torch.dtype | None = None, lora: str = "auto"):
        for name, value, allowed in (("mode", mode, MODES), ("lora", lora, LORA)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        if mode == "alias" and lora == "merged":
            raise ValueError("lora='merged' needs a buffer for the merged weights, which mode='alias' rules out")
        self.model, self.mode, self.dtype, self.lora = model, mode, dtype, lora
        self.buffers: dict[tuple[nn.Module, str], Tensor] = {}
        self._groups: dict[nn.Module, list[nn.Linear]] = {}  # a layer -> all layers with its input, itself included
        self._inside: contextlib.ExitStack | None = None
        self._forwards: dict[nn.Module, Linear] = {}
        self._sharded: list[Tensor] = []
        self._gathered = Gathered()
        self._packed: dict[nn.Module, Tensor] = {}
        self._memory = HugePages()  # the memory of the packed copies

    def __enter__(self) -> "WeightView":
        if self._inside is not None:
            raise RuntimeError("this WeightView is open already: it cannot be entered again before it ends")
        if reason := sharding.why_no_view(self.model):
            raise ValueError(f"the model's weights cannot be viewed: {reason}")
        sharding.reshard(self.model)
        with contextlib.ExitStack() as inside:
            inside.enter_context(self._unchanged())
            begin = time.perf_counter()
            size = inside.enter_context(sharding.gathered(self.model, self._buffer))
            self._gathered += Gathered(size, time.perf_counter() - begin)
            if self.dtype is not None:  # without autocast's cache: a CUDA graph would keep its copies of weights
                device = next(self.model.parameters()).device.type
                inside.enter_context(torch.autocast(device, self.dtype, cache_enabled=False))
            inside.enter_context(self._swapped())
            self._inside = inside.pop_all()
        return self

    def __exit__(self, *error) -> None:
        inside, self._inside = self._inside, None
        assert inside is not None
        inside.__exit__(*error)
        if all(buffer.device.type == "cpu" for buffer in self.buffers.values()):
            self.buffers.clear()  # no graph reads them

    def release(self) -> None:
        """Frees the buffers. CUDA graphs that read them have to be captured again."""
        if self._inside is not None:
            raise RuntimeError("release() must not be called while the WeightView is open")
        self.buffers.clear()
        self._packed, self._memory = {}, HugePages()

    @contextlib.contextmanager
    def adapter(self, name: str) -> Iterator[None]:
        """Within it, the adapter `name` answers in place of the active adapters. `requires_grad` does not change."""
        try:
            with active_adapter(self.model, name):
                self._swap_adapters()
                yield
        finally:
            self._swap_adapters()

    def take_gathered(self) -> Gathered:
        """The weights gathered by all entries since the last call of this method."""
        gathered, self._gathered = self._gathered, Gathered()
        return gathered

    def fingerprint(self) -> tuple:
        """A value that changes with the address, dtype and version of any parameter, and with the active adapters.

        If two fingerprints are equal, a CUDA graph captured at the one may run at the other. They do not prove that the
        values are equal, see the docstring of this file.
        """
        return _tensor_states(self._parameters(), self._rewritten()), adapter_states(self.model)

    def _parameters(self) -> list[Tensor]:
        return self._sharded or list(self.model.parameters())

    def _rewritten(self) -> set[int]:
        """The ids of parameters that PEFT overwrites by their sum with an adapter, and restores, in every forward."""
        layers: list[Any] = [layer for layer in self.model.modules() if is_tuner_layer(layer)]
        return {id(layer.get_param()) for layer in layers if hasattr(layer, "get_param")}

    @contextlib.contextmanager
    def _unchanged(self) -> Iterator[None]:
        self._sharded = list(self.model.parameters())  # `gathered` replaces them on the modules
        before = self.fingerprint()
        try:
            yield
            if self.fingerprint() != before:
                raise RuntimeError("weights or active adapters changed during the rollout: its samples mix old and new")
        finally:
            self._sharded = []

    @contextlib.contextmanager
    def _swapped(self) -> Iterator[None]:
        """Replaces `forward` on single modules. Hooks and wrappers of `__call__` keep working."""
        self._forwards = {}
        try:
            self._groups = {layer: group for group in same_input(self.model) for layer in group}
            self._swap(self.model.modules())
            yield
        finally:
            self._unswap(self._forwards)

    def _swap(self, modules: Iterable[nn.Module]) -> None:
        module: Any
        merged: set[nn.Module] = set()  # base layers that nobody calls, as their weight is merged into the LoRA layer's
        with torch.no_grad(), _autocast_off():
            for module in modules:  # a LoRA layer comes before its base
                if "forward" in module.__dict__ or module in merged:
                    continue  # keep a forward that somebody else has put there; it calls what it wraps
                forward = None
                if is_tuner_layer(module):
                    forward, whole = self._adapted(module)
                    merged |= {module.base_layer} if whole else set()
                elif is_plain_linear(module):
                    forward = self._linear(module, module.weight, module.weight, module.bias)
                if forward is not None:
                    self._forwards[module] = module.__dict__["forward"] = forward

    def _unswap(self, modules: Iterable[nn.Module]) -> None:
        for module in list(modules):
            del module.__dict__["forward"], self._forwards[module]

    def _swap_adapters(self) -> None:
        layers = [module for module in self.model.modules() if is_tuner_layer(module)]
        self._unswap(self._forwards.keys() & layers)
        self._swap(layers)

    def _adapted(self, layer: Any) -> tuple[Linear | None, bool]:
        """The forward of a layer with adapters (None: PEFT's own), and whether it includes the base layer's weight."""
        adapters = vanilla_lora(layer)
        if adapters is None:
            if self.lora == "merged":
                raise ValueError(f"lora: no merged form of {type(layer).__name__}; use lora='live'")
            return None, False
        if not adapters:
            return None, False  # PEFT's own forward, as PEFT may pass this layer arguments for adapters of other layers
        base = layer.base_layer
        if not self._merges(base.weight):
            return functools.partial(lora_linear, base, adapters), False
        whole = base.weight.detach().float() + sum(s * (b.float() @ a.float()) for a, b, s in adapters)
        return self._linear(layer, whole, base.weight, base.bias), True

    def _merges(self, weight: Tensor) -> bool:
        dtype = self.dtype or weight.dtype
        exact = self.lora == "auto" and self.mode != "alias" and dtype == torch.float32
        return self.lora == "merged" or exact

    def _linear(self, module: nn.Module, weight: Tensor, live: Tensor, bias: Tensor | None) -> Linear | None:
        """`x W^T + b` from a buffer that holds `weight`; None where computing with the parameter `live` is as fast."""
        if self.mode == "alias":
            return None
        dtype = self.dtype if self.dtype is not None and live.dtype == torch.float32 else live.dtype
        weight, constant = weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)
        linear: Linear | None = None
        if self.mode == "shadow" or live.numel() >= PACK_NUMEL:
            linear = packed_linear(weight, constant, module.forward, functools.partial(self._place, module))
        if linear is None:
            together = self.mode == "shadow" and weight.is_cuda and module in self._groups
            if weight.data_ptr() == live.data_ptr() and not together:
                return None
            weight = self._buffer(module, "shadow.weight", weight, dtype)
            constant = None if constant is None else self._buffer(module, "shadow.bias", constant, dtype)
            linear = ShadowLinear(weight, constant)
        return linear if dtype == live.dtype else UnderAutocast(linear, module.forward, live.device.type, dtype)

    def _place(self, module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The memory for the module's packed weight: that of the last rollout if it fits, as its pages are mapped."""
        place = self._packed.get(module)
        if place is None or place.shape != shape or place.dtype != dtype:
            place = self._packed[module] = self._memory.empty(shape, dtype, device)
        return place

    def _buffer(self, module: nn.Module, name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of `value` that keeps its address from one rollout to the next as long as its buffer is kept."""
        buffer = self.buffers.get((module, name))
        if buffer is None or (buffer.shape, buffer.dtype, buffer.device) != (value.shape, dtype, value.device):
            group: list[Any] = self._groups.get(module, [module]) if name.startswith("shadow.") else [module]
            rows = [len(value) if len(group) == 1 else layer.out_features for layer in group]
            whole = torch.empty(sum(rows), *value.shape[1:], dtype=dtype, device=value.device)
            self.buffers |= {(layer, name): part for layer, part in zip(group, whole.split(rows))}
            buffer = self.buffers[module, name]
        return buffer.copy_(value)


def same_input(model: nn.Module) -> Iterator[list[nn.Linear]]:
    """For each block, its plain linear layers that read the same input, if all of them have a bias or none has."""
    for module in model.modules():
        for names in SAME_INPUT:
            layers: list[Any] = [getattr(module, name, None) for name in names]
            if all(isinstance(x, nn.Module) and is_plain_linear(x) for x in layers):
                like = {(x.in_features, x.weight.dtype, x.weight.device, x.bias is None) for x in layers}
                if len(like) == 1:
                    yield layers


def joined(linears: Sequence[Any]) -> ShadowLinear | None:
    """One linear layer that computes several at once, if their shadows are contiguous; else None."""
    linears = [x.linear if isinstance(x, UnderAutocast) else x for x in linears]
    if not all(isinstance(x, ShadowLinear) for x in linears) or len({x.bias is None for x in linears}) > 1:
        return None
    weight = _behind_each_other([x.weight for x in linears])
    bias = None if linears[0].bias is None else _behind_each_other([x.bias for x in linears])
    return None if weight is None or (bias is None) != (linears[0].bias is None) else ShadowLinear(weight, bias)


def _behind_each_other(parts: Sequence[Tensor]) -> Tensor | None:
    """The tensor whose rows are those of all parts, in their order; None if the parts are not contiguous in memory."""
    first, place = parts[0], parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != place or part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        place += part.numel() * part.itemsize
    shape = sum(len(part) for part in parts), *first.shape[1:]
    return first.as_strided(shape, first.stride())


@contextlib.contextmanager
def _autocast_off() -> Iterator[None]:
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def _tensor_states(tensors: list[Tensor], rewritten: set[int]) -> tuple:
    """Address, version and dtype of each tensor, without the version of those that are overwritten and restored."""
    local = ((getattr(tensor, "_local_tensor", tensor), id(tensor) in rewritten) for tensor in tensors)  # of a DTensor
    return tuple((x.data_ptr(), None if own else x._version, x.dtype) for x, own in local)
