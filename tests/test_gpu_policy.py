"""`policy_loss` in Triton on a GPU, at real sizes: accuracy, launches, no host sync, determinism, no recompilation."""

import os
import random
from dataclasses import replace

import pytest
import torch
from policy_inputs import PRESETS, compare, random_inputs, run

import flashpo
from flashpo import LOSSES, LossSpec, policy_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton is interpreting"),
]
LENGTHS = {
    "64 x 4096": [4096] * 64,
    "8 x 32768": [32_768] * 8,
    "ragged": [(37 * i * i) % 5000 for i in range(300)],
}
SPECS = {"token": LOSSES["dapo"], "sequence": replace(LOSSES["gspo"], kl_coef=0.1), "mean": LOSSES["grpo"]}


@pytest.fixture(autouse=True)
def on_the_gpu():
    with torch.device("cuda"), flashpo.backend("triton"):
        yield


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", PRESETS)
def test_accuracy(name, lengths):
    spec = replace(PRESETS[name], kl_coef=0.05, entropy_coef=0.01)
    rng = random.Random(name)
    compare("triton", spec, [random_inputs(rng, spec, LENGTHS[lengths]) for _ in range(3)])


@pytest.mark.parametrize("name", SPECS)
def test_same_twice(name):
    inputs = random_inputs(random.Random(name), SPECS[name], LENGTHS["ragged"])
    once, once_stats = run(inputs, SPECS[name], "triton", torch.float32)
    for _ in range(10):
        again, again_stats = run(inputs, SPECS[name], "triton", torch.float32)
        assert all(torch.equal(x, y) for x, y in zip([*once, once_stats], [*again, again_stats]))


def batch(B, T):
    return torch.randn(B, T, requires_grad=True), torch.randn(B, T), torch.randn(B), torch.rand(B, T) < 0.7


@pytest.mark.parametrize("name", SPECS)
def test_one_launch_each(name):
    """Forward and backward of the public function: kernels, copies and fills together."""
    B, T, spec = 64, 4096, SPECS[name]
    logprob, old, advantage, mask = batch(B, T)
    ref = torch.randn(B, T) if spec.kl_coef != 0 else None
    logprob.requires_grad_()
    d_loss = torch.ones(())

    def both():
        loss = policy_loss(logprob, old, advantage, mask, loss=spec, ref_logprob=ref).loss
        return torch.autograd.grad(loss, logprob, d_loss)

    both()  # compiles
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        both()
        torch.cuda.synchronize()
    launches = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert launches == ["forward_kernel", "backward_kernel"]


def step(B, T, spec):
    logprob, old, advantage, mask = batch(B, T)
    ref = torch.randn(B, T) if spec.kl_coef != 0 else None
    policy_loss(logprob, old, advantage, mask, loss=spec, ref_logprob=ref, num_items=37.0).loss.backward()


@pytest.mark.parametrize("name", SPECS)
def test_nothing_waits_for_the_gpu(name):
    step(8, 1000, SPECS[name])  # compiles, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(8, 1000, SPECS[name])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_compilation_after_the_first_length(monkeypatch):
    import triton

    compiled = []
    step(4, 128, LossSpec(kl_coef=0.1))
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda *args, **kwargs: compiled.append(kwargs["repr"]))
    for B, T in ((1, 1), (1, 40_000), (7, 33), (16, 16), (300, 100)):
        for value in (0.1, 0.3, 1.0, 2):
            step(B, T, LossSpec(clip_low=value, clip_high=value, kl_coef=value, kl_clamp=value, dual_clip=1 + value))
    assert compiled == []


def test_streams_and_graphs():
    """Launches on several streams, and replays of a CUDA graph among them, do not disturb one another."""
    spec = LOSSES["dapo"]
    logprob, old, advantage, mask = batch(64, 2048)
    expected = policy_loss(logprob, old, advantage, mask, loss=spec).stats.values
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = policy_loss(logprob.detach(), old, advantage, mask, loss=spec).stats.values
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for _ in range(20):
        graph.replay()
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(policy_loss(logprob.detach(), old, advantage, mask, loss=spec).stats.values)
    torch.cuda.synchronize()
    assert all(torch.equal(x, expected) for x in (captured, *results))
