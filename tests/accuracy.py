"""The accuracy criterion of all operators: our error against fp64 in units of plain torch's error in the same dtype."""

from torch import Tensor


def assert_equal_to_rounding(out: Tensor, other: Tensor, exact: Tensor, baseline: Tensor) -> None:
    """Two results of the same numbers in other layouts or batches, where a library's product fixes the order of sums:
    each may be off by what plain torch is on this machine, so they differ by twice as much at most."""
    assert out.shape == other.shape == exact.shape == baseline.shape
    noise = (baseline.double() - exact.double()).abs().max().item() + 1e-6 * exact.double().abs().max().item()
    difference = (out.double() - other.double()).abs().max().item()
    assert difference <= 2 * noise, f"difference {difference:.3e}, torch's error {noise:.3e}"


def assert_as_accurate(out: Tensor, exact: Tensor, baseline: Tensor, factor: float = 2.0, floor: float = 1e-6) -> None:
    """`out` may err at most `factor` times as much as `baseline` does; `floor` is relative to the largest value."""
    assert out.shape == exact.shape == baseline.shape, (out.shape, exact.shape, baseline.shape)
    if out.numel() == 0:
        return
    error, allowed = ((x.double() - exact.double()).abs().max().item() for x in (out, baseline))
    scale = exact.double().abs().max().item()
    assert out.isfinite().all(), "not finite"
    assert error <= factor * allowed + floor * scale, f"error {error:.3e}, torch's {allowed:.3e}, values to {scale:.3e}"
