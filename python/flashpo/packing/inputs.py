"""What a backbone takes of a token tree."""

from typing import Any

from torch import nn

from flashpo import _recurrent
from flashpo._causal_lm import text_model
from flashpo.packing import dense
from flashpo.packing.tree import TokenTree


def inputs(tree: TokenTree, backbone: nn.Module) -> dict[str, Any]:
    """Keywords of its forward."""
    given, text = tree.inputs(follows_width(backbone.config)), text_model(backbone)
    if dense.installed(text):
        given["attention_mask"] = dense.mask(tree, text)
    return given | _recurrent.keywords(text, tree.segments, tree.parents, tree.tokens.device)


def follows_width(config: Any) -> bool:
    """Whether rotary frequencies depend on how many positions a forward has."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [x.get("rope_type") for x in (rope, *rope.values()) if isinstance(x, dict)]
    return any(kind in ("dynamic", "longrope") for kind in kinds)
