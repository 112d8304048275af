"""Rollouts on a GPU: decode steps are captured and replayed, and agree with a plain forward and with `generate`."""

import pytest
import torch
from rollout_models import FAMILIES, forward_logprobs, greedy, prompts, with_ligers_layers

from flashpo.bench.tiny_models import tiny_model
from flashpo.rollout import RolloutEngine, SamplingParams

pytestmark = pytest.mark.gpu
PARAMS = SamplingParams(n=5, max_new_tokens=70, temperature=0.8)


@pytest.fixture(autouse=True)
def on_the_gpu():
    with torch.device("cuda"):
        yield


def on_gpu(family: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    return FAMILIES[family]().to("cuda", dtype).eval()


def replayed(engine: RolloutEngine) -> bool:
    captured = engine.pool.runner._captured.values()
    return bool(captured) and all(step is not advance for step, advance in captured)


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_greedy(family):
    model = on_gpu(family)
    engine = RolloutEngine(model, fallback="error")
    asked = prompts(5, 70, 131)
    rollouts = engine.generate(asked, PARAMS)
    assert replayed(engine)
    for prompt, completion, logprobs in zip(rollouts.prompt_ids, rollouts.completion_ids, rollouts.logprobs):
        exact = forward_logprobs(model, prompt, completion, 0.8)
        torch.testing.assert_close(torch.tensor(logprobs), exact, atol=2e-4, rtol=0)  # fp32 products in other orders
    best = engine.generate(asked, SamplingParams(temperature=0.0, max_new_tokens=40))
    assert best.completion_ids == [greedy(model, prompt, 40) for prompt in asked]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "phi3", "olmo2", "qwen3_next", "lfm2"])
def test_other_families(family):
    """Experts, sinks, latent attention, recurrent states; the self-check has to agree, too."""
    model = tiny_model(family, initializer_range=0.1).to("cuda")
    asked = [[token % model.config.vocab_size for token in prompt] for prompt in prompts(5, 70)]
    engine = RolloutEngine(model, fallback="error")
    rollouts = engine.generate(asked, SamplingParams(n=3, max_new_tokens=20))
    assert replayed(engine)
    for prompt, completion, logprobs in zip(rollouts.prompt_ids, rollouts.completion_ids, rollouts.logprobs):
        exact = forward_logprobs(model, prompt, completion)
        torch.testing.assert_close(torch.tensor(logprobs), exact, atol=5e-4, rtol=0)


@pytest.mark.parametrize("ligers", [False, True])
def test_under_autocast(ligers, monkeypatch):
    model = on_gpu("qwen3")
    if ligers:
        model = with_ligers_layers(model, monkeypatch)
    engine = RolloutEngine(model, fallback="error", autocast=torch.bfloat16)
    rollouts = engine.generate(prompts(5, 70), PARAMS)
    assert replayed(engine)
    for prompt, completion, logprobs in zip(rollouts.prompt_ids, rollouts.completion_ids, rollouts.logprobs):
        with torch.autocast("cuda", torch.bfloat16):
            exact = forward_logprobs(model, prompt, completion, 0.8)
        torch.testing.assert_close(torch.tensor(logprobs), exact, atol=0.2, rtol=0)


def test_arrangement_leaves_no_trace():
    model, asked = on_gpu("qwen3"), prompts(30, 64, 100)
    whole = RolloutEngine(model, fallback="error").generate(asked, PARAMS)
    for options in ({"max_sequences": 3}, {"prefill_tokens": 17}, {"kv_memory": 300_000}):
        assert RolloutEngine(model, fallback="error", **options).generate(asked, PARAMS).completion_ids == (
            whole.completion_ids
        )


def test_graphs_serve_after_an_optimizer_step():
    model = on_gpu("llama")
    engine = RolloutEngine(model, fallback="error")
    engine.generate(prompts(30), PARAMS)
    graphs = dict(engine.pool.runner._captured)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    rollouts = engine.generate(prompts(30), PARAMS)
    assert engine.pool.runner._captured == graphs
    exact = forward_logprobs(model, rollouts.prompt_ids[0], rollouts.completion_ids[0], 0.8)
    torch.testing.assert_close(torch.tensor(rollouts.logprobs[0]), exact, atol=2e-4, rtol=0)


def test_the_host_waits_for_the_device_only_between_runs_of_steps():
    engine = RolloutEngine(on_gpu("qwen3", torch.bfloat16), fallback="error")
    engine.generate(prompts(30), PARAMS)
    step, advance = next(iter(engine.pool.runner._captured.values()))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    step.at.zero_()
