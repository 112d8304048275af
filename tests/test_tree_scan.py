"""tree_scan against a loop over the tokens."""

import pytest
import torch

from flashpo.ops._lineage import Lineage
from flashpo.ops.tree_scan import tree_scan

SEGMENTS = torch.tensor([[0, 4], [4, 6], [6, 7], [7, 10], [10, 12], [12, 13]])
PARENTS = torch.tensor([-1, 0, 1, 0, -1, 4])
BEFORE = [-1, 0, 1, 2, 3, 4, 5, 3, 7, 8, -1, 10, 11]


def loop(a, b):
    states = []
    for t, before in enumerate(BEFORE):
        states.append(b[t] if before < 0 else a[t] * states[before] + b[t])
    return torch.stack(states)


def test_against_a_loop():
    torch.manual_seed(0)
    a, b = (torch.rand(13, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    upstream = torch.randn(13, 5, dtype=torch.float64)
    lineage = Lineage(SEGMENTS, PARENTS)
    results = [(h, *torch.autograd.grad(h, (a, b), upstream)) for h in (tree_scan(a, b, lineage), loop(a, b))]
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_what_does_not_fit():
    a = torch.rand(13, 5)
    with pytest.raises(ValueError, match=r"a and b must be \(tokens, features\) of one dtype, got \(13, 5\) torch"):
        tree_scan(a, a.double(), Lineage(SEGMENTS, PARENTS))
    with pytest.raises(ValueError, match="lineage has 13 tokens, a has 12"):
        tree_scan(a[:12], a[:12], Lineage(SEGMENTS, PARENTS))


def test_a_lineage_is_told_by_the_mask_of_its_tree():
    end = torch.tensor([10] * 4 + [7] * 2 + [7] + [10] * 3 + [13] * 3)
    position = torch.tensor([0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 0, 1, 2])
    mask = torch.stack([end, position])[None, None].int()
    lineage = Lineage.of_mask(mask)
    assert lineage.ancestors(1)[0].tolist() == [13 if t < 0 else t for t in BEFORE]
    assert Lineage.of_mask(mask) is lineage
    assert Lineage.of_mask(mask.clone()) is not lineage
