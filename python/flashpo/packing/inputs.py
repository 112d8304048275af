"""What a backbone takes of a token tree."""

from typing import Any

from torch import nn

from flashpo import _recurrent
from flashpo._causal_lm import text_model
from flashpo.packing.tree import TokenTree


def inputs(tree: TokenTree, backbone: nn.Module) -> dict[str, Any]:
    """Keywords of its forward."""
    given = tree.inputs(follows_width(backbone.config))
    return given | _recurrent.keywords(text_model(backbone), tree.segments, tree.parents, tree.tokens.device)


def follows_width(config: Any) -> bool:
    """Whether rotary frequencies depend on how many positions a forward has."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [x.get("rope_type") for x in (rope, *rope.values()) if isinstance(x, dict)]
    return any(kind in ("dynamic", "longrope") for kind in kinds)
