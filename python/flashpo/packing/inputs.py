"""What a backbone takes of a token tree."""

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
    """The backbone's output for a tree; with gradients into whatever makes features of its images."""
    with _features_spread(backbone, tree.images):
        return backbone(**inputs(tree, backbone), use_cache=False, **more)


def inputs(tree: TokenTree, backbone: nn.Module) -> dict[str, Any]:
    """Keywords of its forward. With images it has to run within `run`."""
    given, text = tree.inputs(follows_width(backbone.config)), text_model(backbone)
    if dense.installed(text):
        given["attention_mask"] = dense.mask(tree, text)
    if tree.images is not None:
        given |= tree.images.fields
        if (position := _positions(tree, tree.images, backbone)) is not None:
            given["position_ids"] = position
    return given | _recurrent.keywords(text, tree.segments, tree.parents, tree.tokens.device)


def follows_width(config: Any) -> bool:
    """Whether rotary frequencies depend on how many positions a forward has."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [x.get("rope_type") for x in (rope, *rope.values()) if isinstance(x, dict)]
    return any(kind in ("dynamic", "longrope") for kind in kinds)


def _positions(tree: TokenTree, images: TreeImages, backbone: Any) -> Tensor | None:
    """(axes, 1, N) of a model whose images have rows and columns, by its own code for the padded batch; else None."""
    padded = positions_of(backbone, images.rows)
    if padded is None:
        return None
    there = tree.flat >= 0
    position = padded.new_zeros(len(padded), 1, len(tree.tokens))
    position[:, 0, tree.flat[there]] = padded[:, there]
    return position


def positions_of(backbone: Any, rows: dict[str, Tensor]) -> Tensor | None:
    """(axes, B, T), by the model's own code for padded rows; None where its positions count tokens."""
    ask = getattr(backbone, "compute_3d_position_ids", None)
    if ask is None:
        return None
    known = [p.name for p in inspect.signature(ask).parameters.values() if p.kind is not p.VAR_KEYWORD]
    return ask(**{name: rows.get(name) for name in known})


@contextlib.contextmanager
def _features_spread(backbone: Any, images: TreeImages | None) -> Iterator[None]:
    """Within it the backbone's forward, which makes features of the distinct images, finds them at all placeholders."""
    if images is None:
        yield
        return
    original = backbone.get_image_features

    def get_image_features(*args, **keywords):
        out = original(*args, **keywords)
        out.pooler_output = images.spread(out.pooler_output)
        if getattr(out, "deepstack_features", None) is not None:  # for the first layers, one after the other
            out.deepstack_features = [images.spread(x) for x in out.deepstack_features]
        return out

    with features_by(backbone, get_image_features):
        yield


@contextlib.contextmanager
def features_by(backbone: Any, get_image_features: Callable) -> Iterator[None]:
    """Within it the backbone's forward calls that method in the place of its own."""
    before = vars(backbone).get("get_image_features")
    backbone.get_image_features = get_image_features
    try:
        yield
    finally:
        del backbone.get_image_features
        if before is not None:
            backbone.get_image_features = before
