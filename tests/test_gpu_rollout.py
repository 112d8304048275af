"""The CUDA C++ kernels of rollouts on a GPU. `bench/gpu.sh` repeats them under a sanitizer."""

import subprocess
import sys

import pytest
import torch

import flashpo
from flashpo import sample

pytestmark = pytest.mark.gpu

INF, NAN = float("inf"), float("nan")
FILTERS = [
    {},
    {"temperature": 0.6},
    {"temperature": 0.0},
    {"temperature": 1e-30, "top_k": 3},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 10**12},
    {"top_p": 0.0},
    {"top_p": 0.93},
    {"min_p": 0.1},
    {"temperature": 1.7, "top_k": 400, "top_p": 0.8, "min_p": 0.002},
]


@pytest.fixture(autouse=True)
def on_the_gpu():
    reason = flashpo._op.why_unavailable("native", "cuda")
    if reason:
        pytest.skip(reason)
    with torch.device("cuda"), flashpo.backend("native"):
        yield


def streams(rows):
    return {name: torch.randint(-(2**63), 2**63 - 1, (rows,)) for name in ("seed", "offset")}


# V around the 128 chunks and the block of 1024 threads; 300 rows are more than the blocks that run at once
@pytest.mark.parametrize(
    ("rows", "vocab"), [(3, 1), (5, 127), (300, 129), (5, 1025), (5, 32768), (4, 151936), (2, 262145)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sample_against_the_specification(rows, vocab, dtype):
    logits = (torch.randn(rows, vocab + 1) * (4 * torch.rand(rows, 1)).exp2()).to(dtype)[:, 1:]  # no row is aligned
    logits[1, 1:] = -INF
    for parameters in FILTERS:
        parameters = parameters | streams(rows)
        ours, again = sample(logits, **parameters), sample(logits, **parameters)
        with flashpo.backend("torch"):
            exact = sample(logits.double(), **parameters)
        assert torch.equal(ours.token, exact.token), parameters
        for x, twice, true in zip(ours[1:], again[1:], exact[1:]):
            assert torch.equal(x, twice)
            torch.testing.assert_close(x.double(), true, rtol=4e-6, atol=4e-6)  # a sum's share of 1 is in the log-probs
        if parameters.get("top_k") == 1:
            assert (ours.logprob == 0).all()


def test_sample_is_the_same_on_the_cpu():
    """Not bit for bit, as the order of additions differs; of 4000 tokens none lies that near to a boundary."""
    rows, vocab = 4000, 5000
    logits = torch.randn(rows, vocab) * 4
    parameters = {"temperature": torch.rand(rows).round(decimals=1), "top_p": torch.rand(rows), **streams(rows)}
    ours = sample(logits, top_k=300, min_p=0.001, **parameters)
    host = sample(logits.cpu(), top_k=300, min_p=0.001, **{k: v.cpu() for k, v in parameters.items()})
    assert torch.equal(ours.token.cpu(), host.token)
    for x, y in zip(ours[1:], host[1:]):
        torch.testing.assert_close(x.cpu(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parameters", [{}, {"top_k": 100}, {"top_p": 0.9}, {"min_p": 0.03}], ids=str)
def test_sample_follows_the_exact_probabilities(parameters):
    vocab, draws = 1024, 1_000_000
    logits = torch.randn(vocab) * 2
    out = sample(logits.expand(draws, -1), **parameters, seed=42, offset=torch.arange(draws))
    kept = torch.zeros(vocab, dtype=torch.bool)
    p = logits.double().softmax(-1)
    by_size, order = p.sort(descending=True)
    kept[order[: parameters.get("top_k", vocab)]] = True
    kept[order[by_size.cumsum(-1) - by_size >= parameters.get("top_p", 1.0)]] = False
    kept &= p >= parameters.get("min_p", 0.0) * p.max()
    counts = out.token.bincount(minlength=vocab)
    assert counts[~kept].sum() == 0
    expected = draws * p.where(kept, 0.0) / p[kept].sum()
    common = expected >= 5
    freedom = common.sum().item()
    chi_square = ((counts - expected).square() / expected)[common].sum().item()
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


def test_sample_ties_keep_the_smaller_ids():
    vocab, draws = 20_000, 2000  # more equal logits than a block copies
    logits = torch.zeros(vocab)
    logits[700], logits[50] = 5.0, 4.0
    for dtype in (torch.float32, torch.bfloat16):
        for top_k in (1, 2, 3, 40, 15_000):
            rows = logits.to(dtype).expand(draws, -1)
            out = sample(rows, top_k=top_k, temperature=4.0, seed=1, offset=torch.arange(draws))
            ids = out.token[(out.token != 50) & (out.token != 700)]
            assert (ids < top_k).all()
            assert ids.numel() > 0 or top_k < 40
            mass = (logits / 4).softmax(-1).sort(descending=True).values[:top_k].sum()
            torch.testing.assert_close(out.kept_mass[0], mass, rtol=1e-5, atol=0)


def test_sample_rows_that_cannot_be_drawn_from():
    for vocab in (1, 40, 5000):
        logits = torch.randn(5, vocab)
        logits[0, vocab // 2], logits[1], logits[2, vocab - 1] = NAN, -INF, INF
        logits[3, : vocab - 1] = -INF  # one possible token
        for parameters in FILTERS:
            out = sample(logits, **parameters, **streams(5))
            assert out.token[:3].tolist() == [0, 0, 0]
            assert all(x[:3].isnan().all() and not x[3:].isnan().any() for x in out[1:])
            assert [x[3].item() for x in out] == [vocab - 1, 0, 0, 1]


def test_sample_does_not_wait_for_the_gpu():
    logits, rows = torch.randn(8, 3000), streams(8)
    for parameters in FILTERS:
        sample(logits, **parameters, **rows)
        torch.cuda.set_sync_debug_mode("error")
        try:
            sample(logits, **parameters, **rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def tensors():
    """Every parameter as a tensor, different in each of 16 rows."""
    n = torch.arange(16)
    filters = {"top_k": n * 3, "top_p": torch.rand(16), "min_p": torch.rand(16) / 10}
    return {"temperature": torch.rand(16), **filters, "seed": n, "offset": torch.zeros_like(n)}


def test_sample_in_one_launch(tensors):
    logits = torch.randn(16, 3000)
    sample(logits, **tensors)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        sample(logits, **tensors)
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.profiler.DeviceType.CUDA]
    assert len(kernels) == 1, [e.name for e in kernels]


def test_sample_in_a_graph(tensors):
    """Replayed with other logits and offsets."""
    logits = torch.randn(16, 3000)
    sample(logits, **tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sample(logits, **tensors)
    for step in range(3):
        logits.copy_(torch.randn_like(logits))
        tensors["offset"].fill_(step)
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(out, sample(logits, **tensors)))


def test_bad_temperatures_stop_the_gpu():
    """In a process of its own: a device assertion takes the CUDA context with it."""
    code = """
import torch, flashpo
rows = torch.arange(2, device="cuda")
flashpo.sample(torch.zeros(2, 9, device="cuda"), temperature=rows - 1.0, seed=rows, offset=0)
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "temperature must be 0 or a normal positive number" in done.stdout + done.stderr
    assert "device-side assert" in done.stderr
