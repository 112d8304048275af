"""Gathers a sharded language model head while the fused head reads it, in forward and again in backward.

ZeRO-3 and FSDP2 gather a module's weights in hooks around its forward. The fused head reads the weights without calling
the head's forward, so it has to gather them itself. The gradient needs nothing special: it reaches the parameter that
the hooks of ZeRO-3 or FSDP2 reduce.
"""

import contextlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from flashpo._hosts.sharding import gathered_by_fsdp2, gathered_by_zero3, is_dtensor, is_fsdp2_unit, zero3_shards


def gathering(head: Any) -> Callable[[], contextlib.AbstractContextManager] | None:
    """A function that makes a context in which the head is whole; None if any forward of its model makes it whole."""
    if zero3_shards(_own(head)):
        return lambda: gathered_by_zero3(_own(head))
    if is_fsdp2_unit(head) and any(is_dtensor(p) for p in _own(head)):
        return lambda: gathered_by_fsdp2(head)
    return None


def parameters(head: Any) -> tuple[Tensor, Tensor | None]:
    """The head's weight and bias; to be called within the context of `gathering`."""
    weight, bias = _weight_and_bias(head)
    # Tensor parallelism splits the parameters: full_tensor() makes a whole copy. All ranks have the same tokens, and
    # each keeps its part of the gradient.
    whole: list[Any] = [p.full_tensor() if is_dtensor(p) else p for p in (weight, bias)]
    return whole[0], whole[1]


def _weight_and_bias(head: Any) -> tuple[Any, Any]:
    return head.weight, getattr(head, "bias", None)  # PEFT's wrappers have no attribute `bias`


def _own(head: Any) -> list[Any]:
    return [p for p in _weight_and_bias(head) if p is not None]
