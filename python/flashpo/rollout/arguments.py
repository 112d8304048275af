"""Checks of the arguments of the rollout engine. Each error names the argument, what was wanted and what came."""

import math
import operator
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

SMALLEST_NORMAL, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def kind(value: Any) -> str:
    return type(value).__name__


def integer(name: str, value: Any, low: int, high: int = 2**63 - 1) -> int:
    """`value` as a Python int, if it is an integer in [low, high]. Bools and floats are refused."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, not {kind(value)}")
    try:
        value = operator.index(value)
    except TypeError:  # a tensor of floats, or of several numbers
        raise TypeError(f"{name} must be an integer, not {value!r}") from None
    return _within(name, value, low, high)


def number(name: str, value: Any, low: float, high: float = LARGEST) -> float:
    """`value` as a Python float, if it is a finite number in [low, high]."""
    if isinstance(value, bool | str) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, not {kind(value)}")
    try:
        value = float(value)
    except (TypeError, ValueError, RuntimeError):  # a tensor of several numbers
        raise TypeError(f"{name} must be a number, not {value!r}") from None
    except OverflowError:
        raise ValueError(f"{name} must be finite, not {value}") from None
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, not {value}")
    return _within(name, value, low, high)


def _within(name: str, value: Any, low: float, high: float) -> Any:
    if value < low:
        raise ValueError(f"{name} must be at least {low}, not {value}")
    if value > high:
        raise ValueError(f"{name} must be at most {high}, not {value}")
    return value


def choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")
    return value


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")
    return value


def items(name: str, value: Any) -> list:
    """The items of a sequence. Text is refused because its items are characters, sets and mappings because they have no
    order."""
    if isinstance(value, str | bytes | bytearray | Mapping | Set) or not hasattr(value, "__iter__"):
        raise TypeError(f"{name} must be a sequence, not {kind(value)}")
    if isinstance(value, Tensor) and value.dim() == 0:
        raise TypeError(f"{name} must be a sequence, not a tensor of one number")
    return list(value)


def token_ids(name: str, value: Any) -> list[list[int]]:
    """Lists of Python ints from sequences or tensors of token ids. The cache compares the ids, so they must be ints."""
    return [_row(name, row) for row in items(name, value)]


def _row(name: str, row: Any) -> list[int]:
    wanted = f"{name} must be lists of token ids, one for each prompt"
    try:
        tokens = row.tolist() if isinstance(row, Tensor) and row.dim() == 1 else items(name, row)
        if any(isinstance(token, bool) or (isinstance(token, Tensor) and token.dim() > 0) for token in tokens):
            raise TypeError
        return [operator.index(token) for token in tokens]
    except TypeError:
        raise TypeError(wanted) from None
