"""DAPO's soft punishment of overlong completions."""

import torch
from torch import Tensor

from flashpo.ops._check import check_lengths, check_number, check_positive


def overlong_penalty(
    lengths: Tensor, max_length: int, buffer: int, *, factor: float = 1.0, floor: float | None = -1.0
) -> Tensor:
    """The reward to add to a completion of `lengths` tokens: 0 up to max_length - buffer, then it falls linearly.

        penalty = factor max(min((max_length - buffer - length) / buffer, 0), floor)

    Source: arXiv 2503.14476, equation 13.

    Args:
        lengths: any shape: the numbers of tokens of the completions.
        max_length: tokens that a completion may have.
        buffer: the number of tokens before max_length over which the penalty falls, in (0, max_length].
        factor: a positive number.
        floor: the smallest penalty before `factor`. -1, as in the paper and TRL, stops the fall at max_length. None:
            the penalty falls on (verl).

    Returns:
        float32, with the shape of lengths.

    Raises:
        TypeError, ValueError: the message names the argument.
    """
    check_lengths("lengths", lengths)
    check_positive("factor", factor)
    for name, value in (("max_length", max_length), ("buffer", buffer)):
        check_number(name, value)
    if not 0 < buffer <= max_length:
        raise ValueError(f"buffer must be in (0, max_length = {max_length}], got {buffer}")
    if floor is not None:
        check_number("floor", floor)
        if floor > 0:
            raise ValueError(f"floor must not be positive, got {floor}")
    penalty = ((max_length - buffer - lengths.to(torch.float32)) / buffer).clamp(max=0)
    return factor * (penalty if floor is None else penalty.clamp(min=floor))
