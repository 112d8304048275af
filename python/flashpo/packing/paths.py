"""Runs a model's original attention on a token tree, one segment at a time, for what our kernel lacks, such as dropout.

For the model's attention, a segment looks like new tokens after a KV cache: the segment's tokens are the queries, and
the tokens from the root to the segment's end are the keys. All segments together have no more (query, key) pairs than
the rows of the padded batch, so that this needs no more memory than padded rows.

Some families do not use transformers' attention interface. They have a method `_attn` instead, which takes queries,
keys, values and a mask. It is called in the same way.
"""

import functools
import inspect
import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashpo.ops._lineage import is_tree

METHOD = "_attn"
_thread = threading.local()  # its `last`: the tree of the last call and its paths, which all layers need


class Path(NamedTuple):
    """A segment and the tokens that it sees."""

    begin: int  # the segment has the flat indices begin, ..., end - 1
    end: int
    keys: Tensor  # flat indices of the tokens from the root to the segment's end
    seen: Tensor  # (1, 1, queries, keys) bool: which keys come no later than the query
    distance: Tensor  # (queries, keys): how many tokens before the query a key stands


def along_paths(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    query: Tensor,  # (1, Hq, N, D)
    key: Tensor,  # (1, Hkv, N, D)
    value: Tensor,  # (1, Hkv, N, Dv)
    tree: Tensor,  # (1, 1, 2, N)
    reach: Tensor | None = None,
    dim: int = 1,
) -> Tensor:
    """Attention of all tokens of the tree.

    Args:
        attend: takes the queries, keys and values of a segment and a mask, which is true where a query sees a key, and
            returns the output.
        tree: `TokenTree.mask`.
        reach: (N,), how many tokens of its path each query sees, itself included; None: all of them.
        dim: the dimension of the tokens in the output.
    """
    outputs = []
    for path in _paths(tree):
        seen = path.seen
        if reach is not None:
            seen = seen & (path.distance < reach[path.begin : path.end, None])
        queries = query[:, :, path.begin : path.end].contiguous()
        outputs.append(attend(queries, key[:, :, path.keys], value[:, :, path.keys], seen))
    return torch.cat(outputs, dim)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as numbers to add to scores, as eager attention takes it: 0 or the most negative number of `dtype`."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def class_with_method(module: nn.Module) -> Any:
    """The class, that of `module` or a base of it, which has a suitable method `_attn`; None if there is none."""
    for kind in type(module).__mro__:
        if METHOD in vars(kind):
            names = tuple(inspect.signature(vars(kind)[METHOD]).parameters)
            return kind if names == ("self", "query", "key", "value", "attention_mask") else None
    return None


def let_methods_take_trees(text: nn.Module) -> None:
    """Let the methods `_attn` of the model take token trees. Without a tree they call the originals. This cannot be
    undone; a second call does nothing."""
    for kind in {class_with_method(module) for module in text.modules()} - {None}:
        if not hasattr(vars(kind)[METHOD], "takes_trees"):
            setattr(kind, METHOD, _asking(vars(kind)[METHOD]))


def _asking(original: Callable) -> Callable:
    @functools.wraps(original)
    def attention(self, query, key, value, attention_mask=None):
        if not is_tree(attention_mask):
            return original(self, query, key, value, attention_mask)

        def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
            return original(self, q, k, v, additive(seen, q.dtype))[0]

        return along_paths(attend, query, key, value, attention_mask, dim=2), None

    attention.takes_trees = True  # type: ignore[attr-defined]
    return attention


def _paths(tree: Tensor) -> list[Path]:
    known, paths = getattr(_thread, "last", (lambda: None, []))
    if known() is not tree:
        paths = _find_paths(*tree[0, 0].unbind(0))
        _thread.last = weakref.ref(tree), paths
    return paths


def _find_paths(end: Tensor, position: Tensor) -> list[Path]:
    here = torch.arange(len(end), device=end.device)
    bounds = F.pad(end.diff().nonzero()[:, 0] + 1, (1, 1)).tolist()  # `end` changes where a segment begins
    bounds[-1] = len(end)
    paths = []
    for a, b in itertools.pairwise(bounds):
        keys = ((end > a) & (here < b)).nonzero()[:, 0]
        seen = keys <= here[a:b, None]
        paths.append(Path(a, b, keys, seen[None, None], position[a:b, None] - position[keys]))
    return paths
