"""flash-linear-attention: where it is installed, its chunk kernels compute the recurrences of hybrid models on GPUs.

They take rows with initial states and give the gradients of these. A token tree is a batch of such rows for each depth
of its segments: those of a depth start from the final states of their parents. Indexing these states adds up the
gradients of branches that start from the same one.
"""

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flashpo import _op
from flashpo.ops._lineage import Lineage

OPTIONS = ("scale", "initial_state", "output_final_state", "cu_seqlens")


class Kernels(NamedTuple):
    """The functions for a delta rule with one decay a head, for one with a decay of each feature, and without beta."""

    delta: Callable
    delta_of_features: Callable
    gated: Callable


def why_not() -> str:
    """Why fla's kernels cannot be used; empty if they can, on a GPU."""
    found = kernels()
    return found if isinstance(found, str) else ""


@functools.cache
def kernels() -> Kernels | str:
    """fla's functions, or the reason why there are none that are known here."""
    if importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed"
    found = []
    for module, name in (
        ("gated_delta_rule", "chunk_gated_delta_rule"),
        ("kda", "chunk_kda"),
        ("simple_gla", "chunk_simple_gla"),
    ):
        try:
            function = getattr(importlib.import_module(f"fla.ops.{module}"), name)
        except Exception as error:  # of any kind: it is an installation that does not import
            return f"flash-linear-attention has no {name}: {type(error).__name__}: {error}"
        lacks = [option for option in OPTIONS if option not in inspect.signature(function).parameters]
        if lacks:
            return f"{name} of flash-linear-attention does not take {', '.join(lacks)}"
        found.append(function)
    return Kernels(*found)


def runs(x: Tensor) -> bool:
    """Whether a recurrence over `x` is fla's: on GPUs, unless a backend of FlashPO is asked for by name."""
    return x.is_cuda and _op.forced is None and not why_not()


def tree_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor | None,
    lineage: Lineage,
    *,
    scale: float = 1.0,
    ends: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As `flashpo.tree_recurrence`, by fla's kernels. Sums are in their precision."""
    known = kernels()
    if isinstance(known, str):
        raise RuntimeError(known)
    kernel = known.gated if beta is None else known.delta if decay.dim() == 2 else known.delta_of_features
    if kernel is not known.delta:  # only that one takes fewer heads in q and k
        q, k = (x.repeat_interleave(v.shape[1] // x.shape[1], 1) for x in (q, k))
    inputs = [x for x in (q, k, v, decay, beta) if x is not None]
    outs: list[Tensor] = []
    states: list[Tensor] = []
    levels = lineage.levels()
    for level in levels.levels:
        out, final = kernel(
            *(x[level.token][None] for x in inputs),
            scale=scale,
            initial_state=states[-1][level.parent] if states else None,
            output_final_state=True,
            cu_seqlens=level.cu_seqlens,
        )
        outs.append(out[0])
        states.append(final)
    out = torch.cat(outs)[levels.token]
    return out.to(v.dtype), torch.cat(states)[levels.segment] if ends else None
