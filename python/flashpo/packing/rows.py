"""Lets a backbone compute padded rows by their token tree, for models that read hidden states: reward models,
classifiers.

Such a model calls its backbone on padded rows and reads the state of each row's last token. The backbone runs the token
tree of the rows and returns the states in the layout of the rows, with zeros on padding, so that the code that reads
them does not change.
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

NEUTRAL = ("use_cache", "margin")  # keywords without effect; TRL's RewardTrainer passes its column `margin` on


def not_told(tokens: int, of: int, on_tree: bool) -> None:
    """The default for `ran` of `take_rows`: does nothing."""


def take_rows(
    backbone: nn.Module,
    allowed: Callable[[str], bool],
    pays: Callable[[TokenTree | None], bool],
    ran: Callable[[int, int, bool], None] = not_told,
) -> None:
    """Let `backbone` run padded batches on token trees. This cannot be undone.

    Args:
        backbone: a model for which token trees are known to be right.
        allowed: called with the reason why a batch cannot run on a tree, or with "" if there is none; returns whether
            it may.
        pays: whether to run a tree instead of its padded rows. It is also called with None if there is no tree.
        ran: called for each batch with the number of tokens that run, the number of tokens of the padded rows, and
            whether it is a tree.
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
        # index -1, which `flat` has for padding, is the row of zeros that F.pad appends
        return BaseModelOutputWithPast(last_hidden_state=F.pad(states, (0, 0, 0, 1))[tree.flat])

    backbone.forward = types.MethodType(forward, backbone)


@torch.compiler.disable  # it reads the batch on the host
def _tree_of(
    input_ids: Any, attention_mask: Tensor, given: dict, known: Any, allowed: Callable, pays: Callable
) -> TokenTree | None:
    """The token tree of a batch; None if the rows have to run padded."""
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
    """Whether `x` is a tensor of zeros, such as token types of text."""
    return isinstance(x, Tensor) and not x.any()
