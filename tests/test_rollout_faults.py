"""What goes wrong in the middle of a rollout, and what is then answered all the same."""

import logging

import pytest
import torch
from rollout_models import forward_logprobs, model, prompts
from transformers import BloomConfig, BloomForCausalLM

from flashpo.rollout import RolloutEngine, SamplingParams, cache, generation, seam
from flashpo.rollout.runner import Step
from flashpo.rollout.support import Support

PARAMS = SamplingParams(n=3, max_new_tokens=12, seed=5)


@pytest.fixture  # of the rollout that every fault is to leave as it is
def whole():
    return RolloutEngine(model("qwen3"), fallback="error").generate(prompts(40, 70), PARAMS)


def failing(monkeypatch, owner, name, when):
    """`owner.name` raises out-of-memory at the calls for which `when(call's index, *args)`."""
    function, calls = getattr(owner, name), []

    def spoiled(*args):
        calls.append(args)
        if when(len(calls) - 1, *args):
            raise torch.OutOfMemoryError("no memory")
        return function(*args)

    monkeypatch.setattr(owner, name, spoiled)
    return calls


def test_prefill_in_smaller_chunks(monkeypatch, whole):
    calls = failing(monkeypatch, generation, "prefill", lambda i, parts, cache, pieces, states: total(pieces) > 64)
    rollouts = RolloutEngine(model("qwen3"), prefill_tokens=1024, fallback="error").generate(prompts(40, 70), PARAMS)
    assert rollouts.completion_ids == whole.completion_ids
    sizes = [total(pieces) for _, _, pieces, _ in calls]
    assert sizes == [110, 55, 55]


def total(pieces):
    return sum(len(piece.tokens) for piece in pieces)


def test_decode_with_fewer_rows(monkeypatch, whole):
    failing(monkeypatch, Step, "__call__", lambda i, step: step.sizes.rows > 2)
    rollouts = RolloutEngine(model("qwen3"), fallback="error").generate(prompts(40, 70), PARAMS)
    assert rollouts.completion_ids == whole.completion_ids
    assert rollouts.stats.preemptions > 0


def test_in_the_middle_of_decoding(monkeypatch, whole):
    failing(monkeypatch, Step, "__call__", lambda i, step: i == 4)
    rollouts = RolloutEngine(model("qwen3"), fallback="error").generate(prompts(40, 70), PARAMS)
    assert rollouts.completion_ids == whole.completion_ids
    assert rollouts.stats.preemptions == 3
    for ours, theirs in zip(rollouts.logprobs, whole.logprobs):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-5, rtol=0)


def test_no_memory_for_a_single_row(monkeypatch, whole, caplog):
    """What is finished stays; `generate` answers the rest, from the same random streams."""
    calls = failing(monkeypatch, Step, "__call__", lambda i, step: i > 11)
    engine = RolloutEngine(model("qwen3"), max_sequences=1)
    with caplog.at_level(logging.WARNING, logger="flashpo"):
        rollouts = engine.generate(prompts(40, 70), PARAMS)
    assert "the rollout goes on with transformers' generate: no memory" in caplog.text
    assert len(calls) == 13  # 11 steps of the first completion, 1 of the second
    assert rollouts.completion_ids == whole.completion_ids
    with pytest.raises(torch.OutOfMemoryError):
        RolloutEngine(model("qwen3"), max_sequences=1, fallback="error").generate(prompts(40, 70), PARAMS)


def test_a_smaller_pool_than_wished(monkeypatch, whole):
    calls = failing(monkeypatch, cache, "KVCache", lambda i, layers, blocks, *rest: blocks > 6)
    rollouts = RolloutEngine(model("qwen3"), fallback="error").generate(prompts(40, 70), PARAMS)
    assert [blocks for _, blocks, *_ in calls] == [10, 5]
    assert rollouts.completion_ids == whole.completion_ids
    assert rollouts.stats.peak_rows == 3


def test_weights_that_change_in_the_middle(monkeypatch):
    net = model("qwen3")
    step, changed = Step.__call__, []

    def meddling(self):
        if not changed:
            changed.append(net.model.norm.weight.data_ptr())
            net.model.norm.weight.add_(0.0)
        step(self)

    monkeypatch.setattr(Step, "__call__", meddling)
    with pytest.raises(RuntimeError, match="changed during the rollout"):
        RolloutEngine(net, fallback="error").generate(prompts(40), PARAMS)


def test_a_step_that_cannot_be_captured_runs_as_it_is(caplog, whole):
    """The GPU's bookkeeping on a CPU: capture fails, buckets are larger than their rows, the host looks seldom."""
    engine = RolloutEngine(model("qwen3"), fallback="error")
    engine.generate(prompts(40, 70), PARAMS)
    engine.runner.cuda, engine.runner.check_every = True, 5
    with caplog.at_level(logging.WARNING, logger="flashpo"):
        rollouts = engine.generate(prompts(40, 70), PARAMS)
    assert "the decode step runs without a CUDA graph" in caplog.text
    assert rollouts.completion_ids == whole.completion_ids
    assert rollouts.stats.steps == 15


def test_the_fallback_is_the_engine_in_all_but_speed(monkeypatch):
    params = [
        SamplingParams(n=4, max_new_tokens=9, temperature=1.5, stop_token_ids=tuple(range(0, 120, 5))),
        SamplingParams(max_new_tokens=12, temperature=0.0),
    ]
    fast = RolloutEngine(model("gemma3"), fallback="error").generate(prompts(30, 50), params)
    monkeypatch.setattr("flashpo.rollout.engine.support", lambda model: Support(False, "a test", ()))
    net = model("gemma3")
    config = net.generation_config
    slow = RolloutEngine(net).generate(prompts(30, 50), params)
    assert net.generation_config is config
    assert slow.completion_ids == fast.completion_ids
    assert slow.finish_reasons == fast.finish_reasons
    assert "stop" in slow.finish_reasons
    for ours, theirs in zip(fast.logprobs, slow.logprobs):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-5, rtol=0)


def test_an_unsupported_model(caplog):
    torch.manual_seed(0)
    config = BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=64, initializer_range=0.3)
    bloom = BloomForCausalLM(config)
    with pytest.raises(seam.Unsupported):
        RolloutEngine(bloom, fallback="error")
    with caplog.at_level(logging.WARNING, logger="flashpo"):
        engine = RolloutEngine(bloom)
    assert "rollouts by transformers' generate: " in caplog.text
    assert bloom.training
    asked = [[1, 2, 3], [4, 5, 6, 7, 8]]
    rollouts = engine.generate(asked, SamplingParams(n=2, max_new_tokens=5))
    assert bloom.training
    bloom.eval()
    assert rollouts.prompt_index == [0, 0, 1, 1]
    for prompt, completion, logprobs in zip(rollouts.prompt_ids, rollouts.completion_ids, rollouts.logprobs):
        exact = forward_logprobs(bloom, prompt, completion)
        torch.testing.assert_close(torch.tensor(logprobs), exact, atol=1e-5, rtol=0)
