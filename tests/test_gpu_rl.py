"""The CUDA C++ kernels on a GPU: accuracy, no host sync, determinism. `bench/gpu.sh` repeats them under a sanitizer."""

import subprocess
import sys

import advantage_inputs as advantages
import pytest
import torch
from accuracy import assert_as_accurate

import flashpo
from flashpo import gae, group_advantages

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_the_gpu():
    reason = flashpo._op.why_unavailable("native", "cuda")
    if reason:
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


GDPO = {"aggregation": "normalize_then_sum"}
ADVANTAGES = [
    {},
    {"scale": "batch"},
    {"baseline": "leave_one_out", "scale": "none"},
    {"baseline": "second_best", "convention": "verl"},
    {"baseline": "none", "convention": "openrlhf"},
    {"lengths": True},
    GDPO,
    GDPO | {"convention": "verl", "lengths": True},
]


def advantage_inputs(rows, groups, functions, nan=0.3):
    with torch.device("cpu"):
        return [x.cuda() for x in advantages.batch(rows, groups, functions, nan)]


# rows around the block of 1024 threads, one group of all, and a group for each row
@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (33, 5), (1023, 64), (5000, 1), (4096, 4096), (65536, 4096)])
@pytest.mark.parametrize("options", ADVANTAGES, ids=str)
def test_group_advantages(rows, groups, options):
    rewards, group, lengths = advantage_inputs(rows, groups, 3)
    options = options | ({"lengths": lengths} if "lengths" in options else {})
    on_host = {k: v.cpu() if k == "lengths" else v for k, v in options.items()}
    ours, again = (group_advantages(rewards, group, **options) for _ in range(2))
    with flashpo.backend("torch"):
        plain = group_advantages(rewards, group, **options)
        true = group_advantages(rewards.cpu().double(), group.cpu(), **on_host)
    same_code = group_advantages(rewards.cpu(), group.cpu(), **on_host)
    for x, twice, y, z, host in zip(ours[:3], again, plain, true, same_code):
        known = ~z.isnan()
        assert torch.equal(x.isnan().cpu(), ~known)
        assert torch.equal(x.nan_to_num(), twice.nan_to_num())
        assert_as_accurate(x.cpu()[known], z[known], y.cpu()[known])
        torch.testing.assert_close(x.cpu(), host, equal_nan=True)
    assert torch.equal(ours.degenerate.cpu(), true.degenerate)


def test_group_advantages_does_not_wait_for_the_gpu():
    rewards, group, lengths = advantage_inputs(500, 30, 2)
    for options in ADVANTAGES:
        options = options | ({"lengths": lengths} if "lengths" in options else {})
        for backend in ("native", "torch"):
            with flashpo.backend(backend):
                group_advantages(rewards, group, **options)  # compiles and allocates
                torch.cuda.set_sync_debug_mode("error")
                try:
                    group_advantages(rewards, group, **options)
                finally:
                    torch.cuda.set_sync_debug_mode("default")


def test_group_advantages_in_one_launch():
    rewards, group, _ = advantage_inputs(500, 30, 2)
    group_advantages(rewards, group)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        group_advantages(rewards, group)
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.profiler.DeviceType.CUDA]
    assert len(kernels) == 1, [e.name for e in kernels]


def test_group_advantages_in_a_graph():
    rewards, group, _ = advantage_inputs(500, 30, 2)
    group_advantages(rewards, group)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = group_advantages(rewards, group)
    rewards.copy_(torch.randn_like(rewards))
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(out, group_advantages(rewards, group)))


def test_infinite_rewards_stop_the_gpu():
    """In a process of its own: a device assertion takes the CUDA context with it."""
    code = """
import torch, flashpo
group = torch.zeros(4, dtype=torch.long, device="cuda")
flashpo.group_advantages(torch.tensor([0.0, 1.0, float("inf"), 2.0], device="cuda"), group)
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "rewards must be finite" in done.stdout + done.stderr
    assert "device-side assert" in done.stderr
