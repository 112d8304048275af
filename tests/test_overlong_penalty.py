"""The penalty of overlong completions."""

import pytest
import torch

from flashpo import overlong_penalty


def test_overlong_penalty():
    """TRL's reward function, and verl's, which has no floor."""
    from trl.rewards import get_soft_overlong_punishment

    lengths = torch.tensor([0, 70, 79, 80, 81, 90, 100, 101, 150])
    theirs = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    expected = theirs(completion_ids=[[0] * n for n in lengths.tolist()])
    torch.testing.assert_close(overlong_penalty(lengths, 100, 20), torch.tensor(expected))
    without = overlong_penalty(lengths, 100, 20, factor=0.5, floor=None)
    torch.testing.assert_close(without, (-(lengths - 80).float() / 20 * 0.5).clamp(max=0))
    with pytest.raises(ValueError, match="buffer must be in"):
        overlong_penalty(lengths, 100, 0)
