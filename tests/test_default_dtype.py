"""The user's torch.set_default_dtype and set_default_device do not change the dtypes of FlashPO's tensors."""

import contextlib

import pytest
import torch
from op_examples import EXAMPLES
from rollout_models import FAMILIES, prompts

from flashpo._probes import PROBES, run
from flashpo.packing.trial import Trial, on_trial
from flashpo.rollout import RolloutEngine, SamplingParams, parity


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DTYPES = [torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBES)
def test_operators(name, dtype):
    probe = PROBES[name]
    inputs = probe.make()
    plain = run(probe.ours, inputs, "cpu", torch.float32, torch.float32)
    with default_dtype(dtype):
        changed = run(probe.ours, inputs, "cpu", torch.float32, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(plain, changed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda x: x.__name__)
def test_every_public_call_runs(example, dtype, monkeypatch):
    """With fp32 inputs."""
    for name in ("randn", "rand"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, make=make, **kw: make(*args, **{"dtype": torch.float32} | kw))
    with default_dtype(dtype):
        example()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_rollouts(family, of, dtype, monkeypatch):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval().to(of)
    params = SamplingParams(n=2, max_new_tokens=8, top_p=0.9)
    plain = RolloutEngine(model, fallback="error").generate(prompts(9, 70), params)
    monkeypatch.setattr(parity, "_answers", {})
    with default_dtype(dtype):
        changed = RolloutEngine(model, fallback="error").generate(prompts(9, 70), params)
    assert changed.completion_ids == plain.completion_ids
    assert changed.logprobs == plain.logprobs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_trees(dtype):
    torch.manual_seed(0)
    model = FAMILIES["qwen3"]().eval()
    with on_trial(model):
        plain = Trial(model).packed().values
        with default_dtype(dtype):
            changed = Trial(model).packed().values
    assert torch.equal(changed, plain)
