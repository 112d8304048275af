"""The CUDA C++ kernels on a GPU: accuracy, no host sync, determinism; `bench/gpu.sh` repeats them under a sanitizer."""

import pytest
import torch
from accuracy import assert_as_accurate

import flashpo
from flashpo import gae

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_the_gpu():
    reason = flashpo._op.why_unavailable("native", "cuda")
    if reason is not None:
        pytest.skip(reason)
    with torch.device("cuda"), flashpo.backend("native"):
        yield


def exact(*args, **options):
    """The reference in float64, which test_gae.py compares with a plain loop."""
    with flashpo.backend("torch"):
        return gae(*(x.double() if x.is_floating_point() else x for x in args), **options)


# T around a block's tile of 1024 tokens; (1, 300_001) takes many tiles, (300, 7) many blocks
@pytest.mark.parametrize("shape", [(3, 1), (2, 1023), (2, 1024), (2, 1025), (300, 7), (5, 5000), (1, 300_001)])
@pytest.mark.parametrize("share", [1.0, 0.7, 0.01, 0.0])
def test_gae(shape, share):
    rewards, values, mask = *torch.randn(2, *shape), torch.rand(shape) < share
    rewards, values = rewards.masked_fill(~mask, float("nan")), values.masked_fill(~mask, torch.inf)
    for options in (dict(gamma=0.99), dict(lam=1.0, gamma=0.999), dict(lam=0.0), dict(gamma=0.99, whiten=True)):
        ours = gae(rewards, values, mask, **options)
        for out, true in zip(ours, exact(rewards, values, mask, **options)):
            assert (out[~mask] == 0).all()
            assert_as_accurate(out, true, true.float(), floor=1e-5)  # 1e-5: a tree of sums over 300 000 tokens
        again = gae(rewards, values, mask, **options)
        assert all(torch.equal(x, y) for x, y in zip(ours, again))


def test_gae_layouts():
    lengths = torch.tensor([0, 17, 1, 0, 3000, 1024, 2])
    keep = torch.arange(3333) < lengths[:, None]
    wide = torch.randn(7, 3400, 2)
    rewards, values = wide[:, 3:3336, 0], torch.randn(7, 3400)[:, 3:3336]
    mask = keep & (torch.rand(keep.shape) < 0.8)
    padded = gae(rewards, values, mask, gamma=0.99)
    cu_seqlens = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    flat = gae(rewards[keep], values[keep], mask[keep], gamma=0.99, cu_seqlens=cu_seqlens)
    assert all(torch.equal(x[keep], y) for x, y in zip(padded, flat))
    for shape in ((0, 5), (3, 0)):
        out = gae(torch.zeros(shape), torch.zeros(shape), torch.zeros(shape, dtype=torch.bool), whiten=True)
        assert [x.shape for x in out] == [shape, shape]


def test_nothing_waits_for_the_gpu():
    rewards, values, mask = *torch.randn(2, 4, 2000), torch.rand(4, 2000) < 0.7
    cu_seqlens = torch.tensor([0, 1500, 2000])
    torch.cuda.set_sync_debug_mode("error")
    try:
        gae(rewards, values, mask.long(), whiten=True)
        gae(rewards[0], values[0], mask[0], whiten=True, cu_seqlens=cu_seqlens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
