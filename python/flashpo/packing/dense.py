"""Token trees for model families that do not use transformers' attention interface: the tree becomes an N x N mask.

These families use a mask of four dimensions as it is in their own attention code. Each distinct token still goes
through their layers once, but attention computes scores between each token and the whole tree.

Some of them add a bias for the distance between two tokens (ALiBi). They derive it from a key's index in its row. In a
tree, that index is the token's depth.
"""

import functools
import inspect
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from flashpo import _recurrent
from flashpo._causal_lm import INDEXED
from flashpo.packing.paths import additive, class_with_method
from flashpo.packing.tree import TokenTree

BIASES = ("build_alibi_tensor", "build_mpt_alibi_tensor")  # functions that return biases, with keys as last dimension
_thread = threading.local()  # its `depth`: the depths of all tokens while a backbone runs a tree


def is_dense(text: nn.Module) -> bool:
    """Whether the model that reads text takes a tree as an N x N mask."""
    if INDEXED in (getattr(text.config, "layer_types", None) or ()):  # a smaller attention picks keys by the mask
        return True
    if _recurrent.reads_in_order(text) or any(class_with_method(module) for module in text.modules()):
        return False
    return not any(hasattr(scope, "eager_attention_forward") for scope in _scopes(text))


def mask(tree: TokenTree, text: Any) -> Tensor:
    """(1, 1, N, N), in the form that the model uses for its attention: bool for sdpa, otherwise numbers to add."""
    here = torch.arange(len(tree.end), device=tree.end.device)
    seen = (here <= here[:, None]) & (here[:, None] < tree.end)
    seen = seen[None, None]
    return seen if text.config._attn_implementation == "sdpa" else additive(seen, text.dtype)


def pays(tree: TokenTree) -> bool:
    """Whether attention over the whole tree has no more scores than attention over the padded rows."""
    rows, width = tree.flat.shape
    return len(tree.tokens) ** 2 <= rows * width**2


def biases(text: nn.Module) -> bool:
    return any(hasattr(scope, name) for scope in _scopes(text) for name in BIASES)


def install(text: nn.Module) -> None:
    """Let the model that reads text take trees. Without a tree it computes as before. A second call does nothing."""
    text._flashpo_dense = True  # type: ignore[assignment]
    if not biases(text):
        return
    for scope in _scopes(text):
        for name in BIASES:
            original = getattr(scope, name, None)
            if original is not None and not hasattr(original, "takes_trees"):
                setattr(scope, name, _at_depths(original))
    kind: Any = next(kind for kind in type(text).__mro__ if "forward" in vars(kind))
    if not hasattr(kind.forward, "takes_depths"):
        kind.forward = _noting_depths(kind.forward)


def installed(text: nn.Module) -> bool:
    return getattr(text, "_flashpo_dense", False)


def _scopes(text: nn.Module) -> list[ModuleType]:
    return [sys.modules[name] for name in dict.fromkeys(type(m).__module__ for m in text.modules())]


def _noting_depths(original: Callable) -> Callable:
    @functools.wraps(original)
    def forward(self, *args: Any, **given: Any):
        mask, position = given.get("attention_mask"), given.get("position_ids")
        if mask is None or mask.dim() < 4 or position is None:
            return original(self, *args, **given)
        _thread.depth = position[0]
        try:
            return original(self, *args, **given)
        finally:
            _thread.depth = None

    forward.takes_depths = True  # type: ignore[attr-defined]
    return forward


def _at_depths(original: Callable) -> Callable:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def build(*args: Any, **options: Any) -> Tensor:
        given = signature.bind(*args, **options)
        depth = getattr(_thread, "depth", None)
        if depth is None:
            return original(*args, **options)
        # Build the biases of one row that is as long as the tree is deep; each token takes the bias of its depth
        length = int(depth.max()) + 1
        row = {"sequence_length": length, "attention_mask": depth.new_ones(1, length)}
        given.arguments.update({name: x for name, x in row.items() if name in signature.parameters})
        return original(*given.args, **given.kwargs)[..., depth]

    build.takes_trees = True  # type: ignore[attr-defined]
    return build
