"""The yardstick of every op: our error against fp64, in units of the error of plain torch in the same dtype."""

from torch import Tensor


def assert_as_accurate(out: Tensor, exact: Tensor, baseline: Tensor, factor: float = 2.0, floor: float = 1e-6) -> None:
    """`out` may err at most `factor` times as much as `baseline` does; `floor` is relative to the largest value."""
    assert out.shape == exact.shape == baseline.shape, (out.shape, exact.shape, baseline.shape)
    if out.numel() == 0:
        return
    error, allowed = ((x.double() - exact.double()).abs().max().item() for x in (out, baseline))
    scale = exact.double().abs().max().item()
    assert out.isfinite().all(), "not finite"
    assert error <= factor * allowed + floor * scale, f"error {error:.3e}, torch's {allowed:.3e}, values to {scale:.3e}"
