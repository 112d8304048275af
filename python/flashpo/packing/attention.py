"""How a model of transformers attends over a token tree: an attention of its own name, put on the model for good.

The tree comes in the place of the attention mask: `TokenTree.mask`, an int32 tensor of four dimensions. transformers
hands such a mask to every layer as it is and builds none of its own; it goes through gradient checkpointing, which
runs the layers again in backward, through PEFT, DDP, FSDP2 and torch.compile as any tensor does; families that drop
unknown keywords on the way to their attention have no reason to drop it; and an attention that is not ours refuses it.
Any other mask, or none, goes to the implementation that the model had before.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from flashpo._causal_lm import masks_windows, text_model
from flashpo._hosts.transformers import ATTENTION
from flashpo.ops.tree_attention import attend

PREFIX = "tree:"  # before the name of the original: transformers looks for "sdpa" or "flash" in a name, and finds them
EAGER: dict[type[nn.Module], Callable] = {}  # each module class's own: no registry has these
_thread = threading.local()  # its `dropouts`: where this thread notes them, within `recorded_dropout`


def install(backbone: nn.Module) -> None:
    """Let the model take token trees; for all else it stays as it is, and so do the towers of a multimodal model. A
    second call does nothing."""
    for module in text_model(backbone).modules():
        if (eager := getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)) is not None:
            EAGER[type(module)] = eager
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and not config._attn_implementation.startswith(PREFIX):
            setattr(config, ATTENTION, _register(config._attn_implementation))


def installed(backbone: Any) -> bool:
    """False before `install`, and after one has given the model another attention by transformers' own methods."""
    return text_model(backbone).config._attn_implementation.startswith(PREFIX)


@contextlib.contextmanager
def recorded_dropout() -> Iterator[list[tuple[str, float]]]:
    """Within it a dropout that an attention asks for is noted, with the name of its class, and left out."""
    before = getattr(_thread, "dropouts", None)
    found: list[tuple[str, float]] = []
    _thread.dropouts = found
    try:
        yield found
    finally:
        _thread.dropouts = before


@contextlib.contextmanager
def uninstalled(model: nn.Module) -> Iterator[None]:
    """Within it the model goes by the name of the attention that it had before, for code that knows some by name."""
    configs = {id(c): c for c in (getattr(m, "config", None) for m in model.modules()) if c is not None}
    ours = [c for c in configs.values() if str(getattr(c, "_attn_implementation", "")).startswith(PREFIX)]
    before = [c._attn_implementation for c in ours]
    try:
        for config, name in zip(ours, before):
            setattr(config, ATTENTION, name.removeprefix(PREFIX))
        yield
    finally:
        for config, name in zip(ours, before):
            setattr(config, ATTENTION, name)


def _register(original: str) -> str:
    name = PREFIX + original
    AttentionInterface.register(name, _attention(original))
    masks = AttentionMaskInterface()
    if original in masks:
        AttentionMaskInterface.register(name, masks[original])
    return name


def _attention(original: str) -> Callable:
    usual = None if original == "eager" else AttentionInterface()[original]

    def attention(module: nn.Module, query, key, value, attention_mask, **options):
        if isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.int32:
            return _attend_tree(module, query, key, value, attention_mask, **options), None
        implementation = EAGER[type(module)] if usual is None else usual
        return implementation(module, query, key, value, attention_mask, **options)

    return attention


def _attend_tree(
    module: Any,
    query: Tensor,  # (1, Hq, N, D)
    key: Tensor,  # (1, Hkv, N, D)
    value: Tensor,  # (1, Hkv, N, Dv)
    tree: Tensor,  # (1, 1, 2, N)
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **options,
) -> Tensor:
    name = type(module).__name__
    if dropout:
        recorded = getattr(_thread, "dropouts", None)
        if recorded is None:
            raise NotImplementedError(f"{name}: a token tree has no dropout in attention, which asks for {dropout:g}")
        recorded.append((name, dropout))
    if position_bias is not None:
        raise NotImplementedError(f"{name} adds a position_bias to its scores")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise NotImplementedError(f"{name} is not causal")
    end, position = tree[0, 0].unbind(0)
    device, dtype = query.device.type, query.dtype
    if torch.is_autocast_enabled(device):  # which knows torch's attention, not ours; rotary embeddings have made fp32
        dtype = torch.get_autocast_dtype(device)
    # squeeze, whose backward is a view: that of x[0] fills zeros and copies
    q, k, v = (x.squeeze(0).transpose(0, 1).to(dtype) for x in (query, key, value))
    scale = float(q.shape[2] ** -0.5 if scaling is None else scaling)
    return attend(q, k, v, s_aux, end, position, scale, _window(module, options), float(softcap or 0.0))[None]


def _window(module: Any, options: dict) -> int:
    """The keyword; some families (PhiMoE) tell it to their mask alone, so that only the config knows."""
    if "sliding_window" in options:
        return options["sliding_window"] or 0
    if not masks_windows(module):
        return 0
    types = getattr(module.config, "layer_types", None)
    if types is not None and types[module.layer_idx] != "sliding_attention":
        return 0
    return getattr(module.config, "sliding_window", None) or 0
