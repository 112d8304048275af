"""How a model of transformers attends over a token tree: `install` gives it an attention of ours, permanently.

The tree is passed in place of the attention mask, as `TokenTree.mask`, an int32 tensor of four dimensions. This has
several advantages:

- transformers passes a mask of four dimensions to every layer unchanged and builds no mask itself.
- Like any tensor, it passes through PEFT, DDP, FSDP2, torch.compile and gradient checkpointing, which runs the layers
  again in backward.
- Model families that drop unknown keywords on the way to their attention do not drop a mask.
- An attention that is not ours rejects it, instead of ignoring it.

Any other mask, or none, goes to the attention that the model had before. If the attention has dropout, the segments of
a tree also go to that attention, one at a time (paths.py). Families that do not use transformers' interface for
attention are handled in paths.py and dense.py.
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
from flashpo._precision import autocast_to
from flashpo.ops._lineage import is_tree
from flashpo.ops.tree_attention import attend
from flashpo.packing import dense
from flashpo.packing.paths import additive, along_paths, let_methods_take_trees

# put before the original's name, which stays a part of ours, because transformers looks for "sdpa" or "flash" in names
PREFIX = "tree:"
EAGER: dict[type[nn.Module], Callable] = {}  # the eager attention of each module class; transformers registers none
_thread = threading.local()  # its `dropouts`: the set that `without_kernel` fills, within its block


def install(backbone: nn.Module) -> None:
    """Let the model that reads text take token trees. Without a tree it computes as before.

    The towers of a multimodal model do not change. A second call does nothing.
    """
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
    """Whether the model has our attention. It does not before `install`, and loses it if somebody sets another one by
    transformers' methods."""
    text = text_model(backbone)
    return dense.installed(text) or text.config._attn_implementation.startswith(PREFIX)


@contextlib.contextmanager
def without_kernel() -> Iterator[set[tuple[str, float]]]:
    """Within the block, trees go to the models' original attention, segment by segment, but without dropout.

    Yields:
        A set that is filled with (name of an attention's class, the dropout that it asked for).
    """
    before = getattr(_thread, "dropouts", None)
    found: set[tuple[str, float]] = set()
    _thread.dropouts = found
    try:
        yield found
    finally:
        _thread.dropouts = before


@contextlib.contextmanager
def uninstalled(model: nn.Module) -> Iterator[None]:
    """Within the block, the model's configurations name the attention that it had before `install`, for code that
    looks at the name."""
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
        if original not in ("eager", "sdpa"):  # the other implementations take no mask
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
    """Correct the scale that some layers of Llama 4 apply to queries by their index in the forward: in a tree, this
    index is not the token's position in its row."""
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
    # rotary embeddings return fp32, and autocast does not know our attention
    dtype = autocast_to(query.device.type) or query.dtype
    # squeeze, because its backward is a view, while the backward of x[0] fills a tensor with zeros and copies
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
    """Cut the tree into a forest in which no token sees a token of another chunk of its row.

    Returns:
        The order of the forest's tokens and their `end`. The order is depth-first: all tokens of first chunks in the
        order of the tree, then those of second chunks, and so on.
    """
    band = position.long() // chunk
    order = band.argsort(stable=True)
    first = band * (len(end) + 1)  # makes sorting keys that ascend with the flat index within each band
    places = (first + torch.arange(len(end), device=end.device))[order]
    return order, torch.searchsorted(places, (first + end)[order]).int()


def _reach(module: Any, options: dict, tree: Tensor) -> Tensor | None:
    """(N,): how many tokens of its path each query sees; None if it sees all of them."""
    position, window, chunk = tree[0, 0, 1], _window(module, options), _chunk(module)
    if chunk:
        return position % chunk + 1
    return torch.full_like(position, window) if window else None


def _window(module: Any, options: dict) -> int:
    """The width of a layer's sliding window; 0 without one. Some families (PhiMoE) do not pass it to the attention and
    only apply it to their mask; for these it is read from the config."""
    if "sliding_window" in options:
        return options["sliding_window"] or 0
    if not masks_windows(module):
        return 0
    types = getattr(module.config, "layer_types", None)
    if types is not None and types[module.layer_idx] != "sliding_attention":
        return 0
    return getattr(module.config, "sliding_window", None) or 0


def _chunk(module: Any) -> int:
    """The chunk length of a layer in which a token only sees tokens of its own chunk of the row; 0 for other layers."""
    types = getattr(getattr(module, "config", None), "layer_types", None) or ()
    return module.config.attention_chunk_size if CHUNKED in types and types[module.layer_idx] == CHUNKED else 0
