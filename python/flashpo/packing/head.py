"""A language model head that is sharded: whole while the fused head reads it, in forward and again in backward.

Whoever shards a model gathers a module's weights in hooks around its forward. The fused head reads the weights without
a forward of the head, so it has to ask for them. Their gradient goes the usual way: it reaches the parameter that the
hooks of ZeRO-3 or FSDP2 reduce.
"""

import contextlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from flashpo._hosts.sharding import gathered_by_fsdp2, gathered_by_zero3, is_dtensor, is_fsdp2_unit, zero3_shards


def gathering(head: Any) -> Callable[[], contextlib.AbstractContextManager] | None:
    """Makes a context in which the head is whole; None where it is, within a forward of its model."""
    if zero3_shards(_own(head)):
        return lambda: gathered_by_zero3(_own(head))
    if is_fsdp2_unit(head) and any(is_dtensor(p) for p in _own(head)):
        return lambda: gathered_by_fsdp2(head)
    return None


def parameters(head: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, within `gathering`."""
    weight, bias = _weight_and_bias(head)
    # What tensor parallelism splits is whole in a copy: every rank has the same tokens, and keeps its part of the
    # gradient.
    whole: list[Any] = [p.full_tensor() if is_dtensor(p) else p for p in (weight, bias)]
    return whole[0], whole[1]


def _weight_and_bias(head: Any) -> tuple[Any, Any]:
    return head.weight, getattr(head, "bias", None)  # PEFT's wrappers lack a bias


def _own(head: Any) -> list[Any]:
    return [p for p in _weight_and_bias(head) if p is not None]
