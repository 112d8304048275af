"""`run`: a backbone's forward on a token tree, and the inputs that it gets."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from flashpo import _recurrent
from flashpo._causal_lm import text_model
from flashpo.packing import dense
from flashpo.packing.images import TreeImages
from flashpo.packing.tree import TokenTree


def run(tree: TokenTree, backbone: Any, **more: Any) -> Any:
    """The backbone's output for a tree. Gradients also reach the modules that compute features of its images."""
    with _features_spread(backbone, tree.images):
        return backbone(**inputs(tree, backbone), use_cache=False, **more)


def inputs(tree: TokenTree, backbone: nn.Module) -> dict[str, Any]:
    """The keywords of the backbone's forward for a tree. If the tree has images, use `run` instead."""
    given, text = tree.inputs(follows_width(backbone.config)), text_model(backbone)
    if dense.installed(text):
        given["attention_mask"] = dense.mask(tree, text)
    if tree.images is not None:
        given |= tree.images.fields
        if (position := _positions(tree, tree.images, backbone)) is not None:
            given["position_ids"] = position
    return given | _recurrent.keywords(text, tree.segments, tree.parents, tree.tokens.device)


def follows_width(config: Any) -> bool:
    """Whether a model's rotary frequencies depend on the number of positions in a forward."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [x.get("rope_type") for x in (rope, *rope.values()) if isinstance(x, dict)]
    return any(kind in ("dynamic", "longrope") for kind in kinds)


def _positions(tree: TokenTree, images: TreeImages, backbone: Any) -> Tensor | None:
    """Positions (axes, 1, N) for a model whose image tokens have a row and a column, taken from the model's own
    positions for the padded batch; None for other models."""
    padded = positions_of(backbone, images.rows)
    if padded is None:
        return None
    there = tree.flat >= 0
    position = padded.new_zeros(len(padded), 1, len(tree.tokens))
    position[:, 0, tree.flat[there]] = padded[:, there]
    return position


def positions_of(backbone: Any, rows: dict[str, Tensor]) -> Tensor | None:
    """Positions (axes, B, T) by the model's own code for padded rows; None if its positions just count tokens."""
    ask = getattr(backbone, "compute_3d_position_ids", None)
    if ask is None:
        return None
    known = [p.name for p in inspect.signature(ask).parameters.values() if p.kind is not p.VAR_KEYWORD]
    return ask(**{name: rows.get(name) for name in known})


@contextlib.contextmanager
def _features_spread(backbone: Any, images: TreeImages | None) -> Iterator[None]:
    """Within the block, the backbone's forward computes features of the distinct images, and these are repeated for all
    placeholders of the tree."""
    if images is None:
        yield
        return
    original = backbone.get_image_features

    def get_image_features(*args, **keywords):
        out = original(*args, **keywords)
        out.pooler_output = images.spread(out.pooler_output)
        if getattr(out, "deepstack_features", None) is not None:  # one tensor for each of the first layers
            out.deepstack_features = [images.spread(x) for x in out.deepstack_features]
        return out

    with features_by(backbone, get_image_features):
        yield


@contextlib.contextmanager
def features_by(backbone: Any, get_image_features: Callable) -> Iterator[None]:
    """Within the block, the backbone's forward calls this function instead of its method `get_image_features`."""
    before = vars(backbone).get("get_image_features")
    backbone.get_image_features = get_image_features
    try:
        yield
    finally:
        del backbone.get_image_features
        if before is not None:
            backbone.get_image_features = before
