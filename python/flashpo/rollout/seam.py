"""How a model of transformers runs on our KV cache without any change to its code.

transformers looks the attention function up by the name in the config. `rollout_mode` puts our name there. The function
registered under that name hands queries, keys and values to the object that the current thread has put `in_charge`: the
probe below, a prefill or a decode step. No mask function is registered under the name, so no mask is ever built.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from flashpo._causal_lm import CausalLM, Unsupported, masks_windows
from flashpo._hosts.sharding import is_fsdp2_unit
from flashpo._hosts.transformers import ATTENTION as ATTRIBUTE
from flashpo._ownership import ModelInUse as ModelInUse
from flashpo._ownership import alone

ATTENTION = "flashpo_decode"
HARMLESS = ("position_ids", "cache_position")  # tensors that layers pass on and that attention does not use


class Attention(Protocol):
    """An object that computes the attention of every layer during one forward.

    `attend` takes query (B, Hq, T, D) and key (B, Hkv, T, D), both with rope applied, and value (B, Hkv, T, Dv). It
    returns (B, T, Hq, Dv).
    """

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float, sinks: Tensor | None
    ) -> Tensor: ...


_thread = threading.local()


@contextlib.contextmanager
def in_charge(attention: Attention) -> Iterator[None]:
    """Within it, `attention` computes the attention of every forward of this thread.

    It is not passed as a keyword of the forward, because some models drop keywords on the way to their attention and
    others refuse unknown ones.
    """
    before = getattr(_thread, "attention", None)
    _thread.attention = attention
    try:
        yield
    finally:
        _thread.attention = before


def _attention(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **keywords):
    attention = getattr(_thread, "attention", None)
    if attention is None:
        raise RuntimeError(
            f"{ATTENTION} was called outside of a rollout: it is not a training attention. While one thread rolls a "
            "model out, no other can run its forward"
        )
    if isinstance(attention, _Probe):
        attention.check(module, query, key, attention_mask, keywords)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention.attend(module.layer_idx, query, key, value, scale, softcap or 0.0, s_aux), None


AttentionInterface.register(ATTENTION, _attention)


@contextlib.contextmanager
def eval_mode(model: nn.Module, autocast: torch.dtype | None = None) -> Iterator[None]:
    """Within it, every module is in eval mode, without gradients and without any autocast other than the given one.

    Eval mode also switches off dropout and gradient checkpointing, which both depend on `training`. At the end each
    module gets its own flag back, which `train()` could not do.

    Raises:
        ModelInUse: Another rollout of the model has not ended.
    """
    with alone(model):
        training = [module for module in model.modules() if module.training]
        try:
            for module in training:
                module.training = False
            own = next((p.device.type for p in model.parameters()), "cpu")
            with torch.no_grad(), contextlib.ExitStack() as regions:
                for device in {"cpu", "cuda", own}:
                    wanted = autocast if device == own else None
                    regions.enter_context(torch.autocast(device, wanted, enabled=wanted is not None))
                yield
        finally:
            for module in training:
                module.training = True


@contextlib.contextmanager
def rollout_mode(model: nn.Module) -> Iterator[None]:
    """`eval_mode` with our attention in every config except those of vision and audio towers; undone at the end."""
    with eval_mode(model):
        lm = CausalLM.of(model)
        towers = {*lm.backbone.modules()} - {lm.backbone, *lm.text.modules()}
        modules = [m for m in model.modules() if m not in towers]
        configs = {id(c): c for c in (getattr(m, "config", None) for m in modules) if hasattr(c, ATTRIBUTE)}
        before = [(config, getattr(config, ATTRIBUTE)) for config in configs.values()]
        try:
            for config, _ in before:
                setattr(config, ATTRIBUTE, ATTENTION)
            yield
        finally:
            for config, implementation in before:
                setattr(config, ATTRIBUTE, implementation)


class Call(NamedTuple):
    """The shapes and options that one layer hands to its attention."""

    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    softcap: float
    sinks: bool
    window: int | None
    window_given: bool  # some families have a window but do not pass the keyword `sliding_window`


class _Probe:
    """Records every call of attention. What it returns has the right shape but no meaning."""

    def __init__(self):
        self.calls: list[Call] = []
        self.window: tuple[int | None, bool] = None, False

    def check(self, module, query, key, attention_mask, keywords) -> None:
        name = type(module).__name__
        own = [key for key, x in keywords.items() if isinstance(x, Tensor) and key not in HARMLESS]
        if own or attention_mask is not None:
            raise Unsupported(f"{name} gives its attention {', '.join(own) or 'a mask of its own'}")
        if not getattr(module, "is_causal", True):
            raise Unsupported(f"{name} is not causal")
        if not isinstance(getattr(module, "layer_idx", None), int):
            raise Unsupported(f"{name} does not know its layer's index")
        if query.shape[2] != key.shape[2]:
            raise Unsupported(f"{name} attends to {key.shape[2]} keys with {query.shape[2]} queries in one forward")
        self.window = keywords.get("sliding_window"), "sliding_window" in keywords or not masks_windows(module)

    def attend(self, layer, query, key, value, scale, softcap, sinks):
        shapes = (query.shape[1], key.shape[1], key.shape[3], value.shape[3])
        self.calls.append(Call(layer, *shapes, key.dtype, softcap, sinks is not None, *self.window))
        return value.transpose(1, 2).repeat_interleave(query.shape[1] // key.shape[1], 2)


def probe(model: nn.Module) -> list[Call]:
    """The calls of attention that a forward of two tokens makes, in order.

    They are facts about the layers, which a config would only let us guess.
    """
    attention = _Probe()
    # FSDP2 takes the module of its first forward for its root, and ends a group with the last of its modules
    entered = model if any(map(is_fsdp2_unit, model.modules())) else CausalLM.of(model).backbone
    tokens = torch.zeros((1, 2), dtype=torch.int64, device=next(model.parameters()).device)
    with rollout_mode(model), in_charge(attention):
        positions = torch.arange(2, device=tokens.device)[None]
        entered(input_ids=tokens, position_ids=positions, use_cache=False)
    return attention.calls
