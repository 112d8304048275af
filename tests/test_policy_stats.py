"""Quantiles of ratios from the counts that `policy_loss` collects, against exact quantiles."""

import math
from dataclasses import replace

import pytest
import torch

from flashpo import LOSSES, policy_loss, ratio_quantiles
from flashpo.ops.policy_stats import LOG_RATIO_BINS, LOG_RATIO_EDGES, QUANTILES

EDGES = [-math.inf, *(-x for x in reversed(LOG_RATIO_EDGES)), *LOG_RATIO_EDGES, math.inf]


def stats_of(log_ratio, mask=None, **options):
    """Of tokens with these log-ratios; NaN where `mask` says that nobody looks."""
    mask = torch.ones_like(log_ratio, dtype=torch.bool) if mask is None else mask
    old = -torch.rand_like(log_ratio).double() - 1
    logprob, old = (x.masked_fill(~mask, torch.nan).float() for x in (old + log_ratio, old))
    stats = policy_loss(logprob, old, torch.randn(len(mask)), mask, **options).stats
    return stats, logprob, old, mask


def assert_in_the_bin_of_a_neighbour(quantile, samples, q):
    """Of one of the two between which the exact one lies: `low` and `high` are the ends of these bins."""
    low, high = (samples.quantile(q, interpolation=side).log().item() for side in ("lower", "higher"))
    low = max(edge for edge in EDGES if edge <= low + 1e-6)
    high = min(edge for edge in EDGES if edge >= high - 1e-6)
    assert low - 1e-6 <= quantile.log().item() <= high + 1e-6
    assert samples.min() * (1 - 1e-6) <= quantile <= samples.max() * (1 + 1e-6)


@pytest.mark.parametrize("spread", [0.0, 3e-4, 0.01, 0.1, 0.5, 3.0, 40.0])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (6, 500)], ids=str)
def test_quantiles_are_in_the_right_bin(shape, spread):
    """From all on one policy to beyond the range of exp, where ratios saturate."""
    mask = torch.rand(shape) < 0.8
    mask[0, 0] = True
    stats, logprob, old, mask = stats_of(spread * torch.randn(shape), mask)
    ratio = (logprob - old)[mask].clamp(-64, 64).double().exp()
    for q in (0.0, 0.01, 0.05, 0.3, 0.5, 0.95, 0.99, 1.0):
        assert_in_the_bin_of_a_neighbour(stats.ratio_quantile(q), ratio, q)
    exact = ratio_quantiles(logprob, old, mask, (0.0, 1.0)) if spread < 20 else ratio.aminmax()
    for q, end in zip((0.0, 1.0), exact):
        torch.testing.assert_close(stats.ratio_quantile(q), end.float(), rtol=1e-5, atol=0)


def test_resolution_near_1():
    """Ratios of a policy some updates off: close to the exact quantiles, by what PolicyStats states."""
    stats, logprob, old, mask = stats_of(0.08 * torch.randn(8, 4000))
    wanted = tuple(QUANTILES.values())
    found, exact = stats.as_dict(), ratio_quantiles(logprob, old, mask, wanted)
    for name, x in zip(QUANTILES, exact.tolist()):
        share = 0.002 if abs(x - 1) < 0.001 else 0.016 if 0.97 < x < 1.03 else 0.065
        assert abs(found[name] / x - 1) < share, name


def test_an_edge_belongs_to_the_outer_bin():
    x = torch.tensor([[-2.0, -0.5, -(2**-10), 0.0, 2**-11, 2**-10, 0.5, 0.75, 2.0, 100.0]])
    stats = policy_loss(x, torch.zeros_like(x), torch.ones(1), x == x).stats
    middle = len(LOG_RATIO_EDGES)
    expected = dict.fromkeys(LOG_RATIO_BINS, 0.0)
    for i in (-12, -11, -1, 0, 0, 1, 11, 11, 12, 12):
        expected[LOG_RATIO_BINS[middle + i]] += 1
    assert {name: getattr(stats, name).item() for name in LOG_RATIO_BINS} == expected


@pytest.mark.parametrize("loss", ["dapo", "gspo", "gspo_token", "gmpo"])
def test_ratios_of_sequences_and_of_tokens(loss):
    """As many are counted as `ratios` says, of sequences where the ratio and the advantage are theirs."""
    mask = torch.rand(5, 40) < 0.7
    mask[3] = False
    stats, logprob, old, _ = stats_of(0.2 * torch.randn(5, 40), mask, loss=loss)
    assert sum(getattr(stats, name) for name in LOG_RATIO_BINS) == stats.ratios
    if loss == "gspo":
        of_sequences = ((logprob - old).nan_to_num(nan=0.0).sum(1) / mask.sum(1).clamp(min=1)).exp()
        assert stats.ratios == 5
        for q in (0.2, 0.5, 0.9):
            assert_in_the_bin_of_a_neighbour(stats.ratio_quantile(q), of_sequences, q)


def test_clamped_log_ratios_are_counted_as_clamped():
    spec = replace(LOSSES["dapo"], log_ratio_min=-0.1, log_ratio_max=0.1)
    stats, *_ = stats_of(torch.randn(3, 50), loss=spec)
    for q, end in ((0.01, -0.1), (0.99, 0.1)):
        torch.testing.assert_close(stats.ratio_quantile(q), torch.tensor(end).exp(), rtol=0.01, atol=0)


def test_without_ratios():
    stats, *_ = stats_of(torch.randn(3, 5), torch.zeros(3, 5, dtype=torch.bool))
    assert stats.ratio_quantile(0.5).isnan()
    assert math.isnan(stats.as_dict()["ratio_q50"])


def test_quantile_out_of_range():
    stats, *_ = stats_of(torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"q must be in \[0, 1\], got 1.5"):
        stats.ratio_quantile(1.5)
