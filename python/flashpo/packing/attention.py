"""How a model of transformers attends over a token tree: an attention of its own name, put on the model for good.

The tree comes in the place of the attention mask: `TokenTree.mask`, an int32 tensor of four dimensions. transformers
hands such a mask to every layer as it is and builds none of its own; it goes through gradient checkpointing, which
runs the layers again in backward, through PEFT, DDP, FSDP2 and torch.compile as any tensor does; families that drop
unknown keywords on the way to their attention have no reason to drop it; and an attention that is not ours refuses it.
Any other mask, or none, goes to the implementation that the model had before. So do the segments of a tree, one at a
time (paths.py), where the attention has dropout. Families that do not use transformers' interface for attention have
their own ways: paths.py, dense.py.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from flashpo._causal_lm import CHUNKED, masks_windows, text_model
from flashpo._hosts.transformers import ATTENTION
from flashpo.ops._lineage import is_tree
from flashpo.ops.tree_attention import attend
from flashpo.packing import dense
from flashpo.packing.paths import additive, along_paths, let_methods_take_trees

PREFIX = "tree:"  # before the name of the original: transformers looks for "sdpa" or "flash" in a name, and finds them
EAGER: dict[type[nn.Module], Callable] = {}  # each module class's own: no registry has these
_thread = threading.local()  # its `dropouts`: where this thread notes them, within `without_kernel`


def install(backbone: nn.Module) -> None:
    """Let the model take token trees; for all else it stays as it is, and so do the towers of a multimodal model. A
    second call does nothing."""
    text = text_model(backbone)
    if dense.is_dense(text):
        dense.install(text)
        return
    let_methods_take_trees(text)
    for module in text.modules():
        if (eager := getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)) is not None:
            EAGER[type(module)] = eager
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and not config._attn_implementation.startswith(PREFIX):
            setattr(config, ATTENTION, _register(config._attn_implementation))


def installed(backbone: Any) -> bool:
    """False before `install`, and after one has given the model another attention by transformers' own methods."""
    text = text_model(backbone)
    return dense.installed(text) or text.config._attn_implementation.startswith(PREFIX)


@contextlib.contextmanager
def without_kernel() -> Iterator[set[tuple[str, float]]]:
    """Within it trees go to the models' own attention, but without dropout: what an attention asks for is noted, with
    the name of its class."""
    before = getattr(_thread, "dropouts", None)
    found: set[tuple[str, float]] = set()
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
        implementation = EAGER[type(module)] if usual is None else usual
        if not is_tree(attention_mask):
            return implementation(module, query, key, value, attention_mask, **options)
        _check_options(module, **options)
        query = _at_their_positions(module, query, attention_mask)
        noted = getattr(_thread, "dropouts", None)
        if noted is None and not options.get("dropout"):
            return _attend_tree(module, query, key, value, attention_mask, **options), None
        if noted is not None and (dropout := options.pop("dropout", 0.0)):
            noted.add((type(module).__name__, dropout))
        if original not in ("eager", "sdpa"):  # others take no mask
            plain = not options.get("softcap") and options.get("s_aux") is None
            implementation = AttentionInterface()["sdpa"] if plain else EAGER[type(module)]
        eager = implementation is EAGER.get(type(module))

        def attend_segment(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
            return implementation(module, q, k, v, additive(seen, q.dtype) if eager else seen, **options)[0]

        reach = _reach(module, options, attention_mask)
        return along_paths(attend_segment, query, key, value, attention_mask, reach), None

    return attention


def _check_options(module: Any, *, position_bias: Tensor | None = None, is_causal: bool | None = None, **options):
    name = type(module).__name__
    if position_bias is not None:
        raise NotImplementedError(f"{name} adds a position_bias to its scores")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise NotImplementedError(f"{name} is not causal")


def _at_their_positions(module: Any, query: Tensor, tree: Tensor) -> Tensor:
    """Llama 4 scales the queries of some layers by where they stand in the forward, which is not where a token of a
    tree stands in its row."""
    if not getattr(module, "attn_temperature_tuning", False) or getattr(module, "use_rope", True):
        return query
    position = tree[0, 0, 1]

    def scale(place: Tensor) -> Tensor:
        return torch.log1p(torch.floor((place.float() + 1) / module.floor_scale)) * module.attn_scale + 1

    here = torch.arange(len(position), device=position.device)
    return (query * (scale(position) / scale(here))[:, None]).to(query.dtype)


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
    **options,
) -> Tensor:
    end, position = tree[0, 0].unbind(0)
    device, dtype = query.device.type, query.dtype
    if torch.is_autocast_enabled(device):  # which knows torch's attention, not ours; rotary embeddings have made fp32
        dtype = torch.get_autocast_dtype(device)
    # squeeze, whose backward is a view: that of x[0] fills zeros and copies
    q, k, v = (x.squeeze(0).transpose(0, 1).to(dtype) for x in (query, key, value))
    scale = float(q.shape[2] ** -0.5 if scaling is None else scaling)
    rest = scale, _window(module, options), float(softcap or 0.0)
    chunk = _chunk(module)
    if not 0 < chunk < len(end):
        return attend(q, k, v, s_aux, end, position, *rest)[None]
    order, end = _cut(end, position, chunk)
    out = attend(q[order], k[order], v[order], s_aux, end, position[order], *rest)
    return out[order.argsort()][None]


def _cut(end: Tensor, position: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """The forest that is left where no token sees another chunk of its row: its tokens in depth-first order, which is
    that of the tree within the first chunk of all rows, then within the second, and so on; and their ends."""
    band = position.long() // chunk
    order = band.argsort(stable=True)
    first = band * (len(end) + 1)  # of a band's keys, which ascend with the flat index
    places = (first + torch.arange(len(end), device=end.device))[order]
    return order, torch.searchsorted(places, (first + end)[order]).int()


def _reach(module: Any, options: dict, tree: Tensor) -> Tensor | None:
    """(N,): how many tokens of its path each query sees."""
    position, window, chunk = tree[0, 0, 1], _window(module, options), _chunk(module)
    if chunk:
        return position % chunk + 1
    return torch.full_like(position, window) if window else None


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


def _chunk(module: Any) -> int:
    """Of layers that see only the tokens of their own chunk of a row."""
    types = getattr(getattr(module, "config", None), "layer_types", None) or ()
    return module.config.attention_chunk_size if CHUNKED in types and types[module.layer_idx] == CHUNKED else 0
