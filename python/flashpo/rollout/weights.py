"""What a rollout computes with: the trainer's live weights, or a shadow of them in a quicker form.

    with WeightView(model):   # Linear layers compute with the view; parameters are never written
        ...                   # everything is as before on the way out, also after an exception

A shadow is a buffer of ours beside a parameter: packed for the CPU's GEMM library, cast to the autocast dtype, with
LoRA merged in, or gathered from FSDP2's shards. Those of layers that read the same input lie behind each other, so that
one product can take them together. It is made anew on every entry, whatever `fingerprint` says: an
optimizer that writes through `param.data` leaves no trace in `_version`. What is packed keeps its memory, as fresh
pages can cost more than packing does, and on CUDA everything does, so that graphs stay valid; `release` frees it.
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
    """A Linear layer by a buffer."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclasses.dataclass(frozen=True)
class UnderAutocast:
    """Some layers (routers) turn autocast off to compute in fp32: those parts keep their fp32 weights."""

    linear: Linear
    original: Linear
    device: str
    dtype: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        return self.linear(x.to(self.dtype)) if torch.is_autocast_enabled(self.device) else self.original(x)


class WeightView:
    """The weights that a rollout computes with: a context that swaps `forward` on instances of Linear and LoRA layers.

    Args:
        model: any module; a PEFT model, too.
        mode: "alias": the parameters themselves. "shadow": buffers for every Linear of which we have a quicker form, on
            a GPU of those with the same input (q, k and v; gate and up). "auto": buffers where they are needed, or pay
            and are freed after the rollout.
        dtype: what the trainer autocasts to, None without autocast. The context then is an autocast region, in which
            Linear layers find fp32 weights already cast.
        lora: "live": `W x + s B A x`, as in training. "merged": `(W + s B A) x`, summed in fp32. "auto": merged where
            the sum stays in fp32. Not in 16 bit: there an early adapter is less than half a unit in the last place of
            W and rounds away, so that the base model would answer. Where weights are packed, the many rows of a
            prefill go through the live layers.

    Raises:
        ValueError: a wrong argument, or (on entry) weights that are sharded or wrapped in a way that we cannot view.
        RuntimeError: on the way out, if the weights or the active adapters have changed in the meantime.
    """

    def __init__(self, model: nn.Module, mode: str = "auto", *, dtype: torch.dtype | None = None, lora: str = "auto"):
        for name, value, allowed in (("mode", mode, MODES), ("lora", lora, LORA)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        if mode == "alias" and lora == "merged":
            raise ValueError("lora: merging needs a buffer, which mode='alias' rules out")
        self.model, self.mode, self.dtype, self.lora = model, mode, dtype, lora
        self.buffers: dict[tuple[nn.Module, str], Tensor] = {}
        self._groups: dict[nn.Module, list[nn.Linear]] = {}  # of the layers that read the same input, each one's
        self._inside: contextlib.ExitStack | None = None
        self._forwards: dict[nn.Module, Linear] = {}
        self._sharded: list[Tensor] = []
        self._gathered = Gathered()
        self._packed: dict[nn.Module, Tensor] = {}
        self._memory = HugePages()  # of what is packed

    def __enter__(self) -> "WeightView":
        if self._inside is not None:
            raise RuntimeError("this WeightView is open already")
        if reason := sharding.why_no_view(self.model):
            raise ValueError(f"no view of the model's weights: {reason}")
        sharding.reshard(self.model)
        with contextlib.ExitStack() as inside:
            inside.enter_context(self._unchanged())
            begin = time.perf_counter()
            size = inside.enter_context(sharding.gathered(self.model, self._buffer))
            self._gathered += Gathered(size, time.perf_counter() - begin)
            if self.dtype is not None:  # without a cache, which would keep a step's copies in a CUDA graph
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
        """Free the buffers; CUDA graphs that read them have to be captured again."""
        if self._inside is not None:
            raise RuntimeError("release() of an open WeightView")
        self.buffers.clear()
        self._packed, self._memory = {}, HugePages()

    @contextlib.contextmanager
    def adapter(self, name: str) -> Iterator[None]:
        """Within the open view, `name` answers in place of the active adapters; what trains is not changed."""
        try:
            with active_adapter(self.model, name):
                self._swap_adapters()
                yield
        finally:
            self._swap_adapters()

    def take_gathered(self) -> Gathered:
        """Of all entries since it was last taken."""
        gathered, self._gathered = self._gathered, Gathered()
        return gathered

    def fingerprint(self) -> tuple:
        """Changes with the place, dtype and version of every parameter, and with the adapters that answer.

        Equal fingerprints: CUDA graphs captured at the one may run at the other. They do not prove equal values: see
        the head of this file.
        """
        return _tensor_states(self._parameters(), self._rewritten()), adapter_states(self.model)

    def _parameters(self) -> list[Tensor]:
        return self._sharded or list(self.model.parameters())

    def _rewritten(self) -> set[int]:
        """Parameters that PEFT swaps for their sum with an adapter, and back, in every forward of their layer."""
        layers: list[Any] = [layer for layer in self.model.modules() if is_tuner_layer(layer)]
        return {id(layer.get_param()) for layer in layers if hasattr(layer, "get_param")}

    @contextlib.contextmanager
    def _unchanged(self) -> Iterator[None]:
        self._sharded = list(self.model.parameters())  # what `gathered` covers up
        before = self.fingerprint()
        try:
            yield
            if self.fingerprint() != before:
                raise RuntimeError("weights or active adapters changed during the rollout: its samples are of neither")
        finally:
            self._sharded = []

    @contextlib.contextmanager
    def _swapped(self) -> Iterator[None]:
        """`forward` of single modules; hooks and whatever wraps `__call__` go on working."""
        self._forwards = {}
        try:
            self._groups = {layer: group for group in same_input(self.model) for layer in group}
            self._swap(self.model.modules())
            yield
        finally:
            self._unswap(self._forwards)

    def _swap(self, modules: Iterable[nn.Module]) -> None:
        module: Any
        merged: set[nn.Module] = set()  # bases that nobody calls
        with torch.no_grad(), _autocast_off():
            for module in modules:  # a LoRA layer comes before its base
                if "forward" in module.__dict__ or module in merged:
                    continue  # somebody else's wrapper calls what it wraps
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
        """The forward of an adapted layer (None: PEFT's own), and whether it has the base layer's weight in it."""
        adapters = vanilla_lora(layer)
        if adapters is None:
            if self.lora == "merged":
                raise ValueError(f"lora: no merged form of {type(layer).__name__}; use lora='live'")
            return None, False
        if not adapters:
            return None, False  # of other layers' adapters PEFT may hand this one arguments
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
        """`x W^T + b` from a buffer that holds `weight`; None where the parameter `live` is as good."""
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
        """Where the module's packed weight goes: as the last rollout's, whose pages are at hand."""
        place = self._packed.get(module)
        if place is None or place.shape != shape or place.dtype != dtype:
            place = self._packed[module] = self._memory.empty(shape, dtype, device)
        return place

    def _buffer(self, module: nn.Module, name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of `value` that keeps its place from one rollout to the next."""
        buffer = self.buffers.get((module, name))
        if buffer is None or (buffer.shape, buffer.dtype, buffer.device) != (value.shape, dtype, value.device):
            group: list[Any] = self._groups.get(module, [module]) if name.startswith("shadow.") else [module]
            rows = [len(value) if len(group) == 1 else layer.out_features for layer in group]
            whole = torch.empty(sum(rows), *value.shape[1:], dtype=dtype, device=value.device)
            self.buffers |= {(layer, name): part for layer, part in zip(group, whole.split(rows))}
            buffer = self.buffers[module, name]
        return buffer.copy_(value)


def same_input(model: nn.Module) -> Iterator[list[nn.Linear]]:
    """The plain Linear layers of each block that multiply the same activations, biases on all of them or on none."""
    for module in model.modules():
        for names in SAME_INPUT:
            layers: list[Any] = [getattr(module, name, None) for name in names]
            if all(isinstance(x, nn.Module) and is_plain_linear(x) for x in layers):
                like = {(x.in_features, x.weight.dtype, x.weight.device, x.bias is None) for x in layers}
                if len(like) == 1:
                    yield layers


def joined(linears: Sequence[Any]) -> ShadowLinear | None:
    """One product for several, if their shadows lie behind each other."""
    linears = [x.linear if isinstance(x, UnderAutocast) else x for x in linears]
    if not all(isinstance(x, ShadowLinear) for x in linears) or len({x.bias is None for x in linears}) > 1:
        return None
    weight = _behind_each_other([x.weight for x in linears])
    bias = None if linears[0].bias is None else _behind_each_other([x.bias for x in linears])
    return None if weight is None or (bias is None) != (linears[0].bias is None) else ShadowLinear(weight, bias)


def _behind_each_other(parts: Sequence[Tensor]) -> Tensor | None:
    """The tensor of which these are the rows, in their order."""
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
    """Place, version and dtype of each; the version of a tensor that is rewritten with its own values says nothing."""
    local = ((getattr(tensor, "_local_tensor", tensor), id(tensor) in rewritten) for tensor in tensors)  # of a DTensor
    return tuple((x.data_ptr(), None if own else x._version, x.dtype) for x, own in local)
