"""Padded rows answered by way of their token tree, for models that read hidden states: rewards, classifiers.

Such a model calls its backbone on padded rows and reads the state of each row's last token. Its backbone runs the tree
in their place and lays its states out as the rows lie, zeros on padding, so that whatever reads them stays as it is.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from flashpo.packing.inputs import inputs
from flashpo.packing.scoring import accept_trees
from flashpo.packing.tree import TokenTree, pack

NEUTRAL = ("use_cache", "margin")  # TRL's RewardTrainer hands its column on


def not_told(tokens: int, of: int, on_tree: bool) -> None:
    """Of nobody who wants to know what `take_rows` runs."""


def take_rows(
    backbone: nn.Module,
    allowed: Callable[[str], bool],
    pays: Callable[[TokenTree | None], bool],
    ran: Callable[[int, int, bool], None] = not_told,
) -> None:
    """Let `backbone`, for which token trees are right, run padded batches on them; for good.

    Args:
        allowed: whether a batch may run so, asked with what is against it, "" where nothing is.
        pays: whether a tree is to run in the place of its padded rows; also asked of None, where there is none.
        ran: told of each batch how many tokens run, how many the padded rows have, and whether it is a tree.
    """
    accept_trees(backbone, head=False)
    padded: Any = backbone.forward.__func__  # type: ignore[attr-defined]
    known = inspect.signature(padded).parameters

    @functools.wraps(padded)
    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **given):
        tree = None
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            tree = _tree_of(input_ids, attention_mask, given, known, allowed, pays)
            tokens = attention_mask.numel()
            ran(tokens if tree is None else len(tree.tokens), tokens, tree is not None)
        if tree is None:
            return padded(self, input_ids, attention_mask=attention_mask, **given)
        states = padded(self, **inputs(tree, self), use_cache=False).last_hidden_state[0]
        return BaseModelOutputWithPast(last_hidden_state=F.pad(states, (0, 0, 0, 1))[tree.flat])  # -1: the zeros

    backbone.forward = types.MethodType(forward, backbone)


@torch.compiler.disable  # it reads the batch on the host
def _tree_of(
    input_ids: Any, attention_mask: Tensor, given: dict, known: Any, allowed: Callable, pays: Callable
) -> TokenTree | None:
    """None: the rows are to be padded."""
    if not allowed(""):
        return None
    tree = None
    try:
        tree = _pack(input_ids, attention_mask, given, known)
    except (TypeError, ValueError) as error:
        allowed(str(error))
    return tree if pays(tree) else None


def _pack(input_ids: Any, attention_mask: Any, given: dict, known: Any) -> TokenTree:
    if input_ids is None:
        raise ValueError("the batch has no input_ids")
    for name, x in given.items():
        if x is not None and x is not False and name not in NEUTRAL and (name in known or not _all_zero(x)):
            raise ValueError(f"the batch has {name}")
    if not attention_mask[:, 0].all():
        raise ValueError("rows are padded on the left, so that the model's positions may count the padding")
    return pack(input_ids, attention_mask, torch.zeros_like(attention_mask[:, :1]), prune=False)


def _all_zero(x: Any) -> bool:
    """Types of tokens, say, that the backbone does not know."""
    return isinstance(x, Tensor) and not x.any()
