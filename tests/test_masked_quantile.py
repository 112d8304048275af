"""Quantiles computed by counting, against torch.quantile."""

import math

import pytest
import torch

from flashpo import entropy_threshold, masked_quantile, ratio_quantiles


@pytest.mark.parametrize("quantile", [0.0, 0.2, 0.5, 0.83, 1.0])
def test_entropy_threshold_is_torch_quantile(quantile):
    for n in (1, 2, 17, 1000):
        x = torch.randn(n).abs() * torch.tensor([1.0, 1e-30, 1e20])[torch.randint(3, (n,))]
        x[0] = 0.0
        mask = torch.rand(n) < 0.7
        mask[-1] = True
        assert entropy_threshold(x, mask, quantile).item() == pytest.approx(x[mask].quantile(quantile).item())
        assert entropy_threshold(-x, mask, quantile).item() == pytest.approx((-x)[mask].quantile(quantile).item())


def test_quantiles_of_ratios():
    logprob, q = -3 * torch.rand(9, 30), (0.0, 0.25, 0.5, 0.97)
    mask, old = torch.rand(9, 30) < 0.7, logprob + 0.4 * torch.randn(9, 30)
    found = ratio_quantiles(logprob, old.masked_fill(~mask, torch.nan), mask, q)
    d = (logprob - old)[mask]
    torch.testing.assert_close(found, d.quantile(torch.tensor(q)).exp())
    assert masked_quantile(d, torch.zeros_like(d, dtype=torch.bool), q).isnan().all()
    with pytest.raises(ValueError, match="quantiles must be in"):
        masked_quantile(d, d > 0, (0.5, 1.5))
    with pytest.raises(ValueError, match="mask must have the shape"):
        masked_quantile(d, mask, 0.5)


def test_entropy_threshold_above_2_to_the_24_tokens():
    """Where torch.quantile raises."""
    n = 2**24 + 3
    x = torch.arange(n, dtype=torch.float32).div_(n)
    mask = torch.ones(1, dtype=torch.bool).expand(n)
    with pytest.raises(RuntimeError, match="too large"):
        x.quantile(0.8)
    assert entropy_threshold(x, mask, 0.8).item() == pytest.approx(0.8, abs=1e-6)
    assert entropy_threshold(x, ~mask, 0.8).item() == math.inf
