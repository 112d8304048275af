"""Failures in the middle of a rollout, and which results the user still gets."""

import gc
import logging
import math
import weakref

import pytest
import torch
from rollout_models import assert_same_draws, forward_logprobs, model, prompts
from transformers import BloomConfig, BloomForCausalLM

from flashpo._causal_lm import CausalLM
from flashpo.rollout import RolloutEngine, SamplingParams, cache, generation, parity, seam
from flashpo.rollout import fallback as plain
from flashpo.rollout.runner import Step
from flashpo.rollout.support import Support

PARAMS = SamplingParams(n=3, max_new_tokens=12, seed=5)


@pytest.fixture  # of the rollout that every fault is to leave as it is
def whole():
    return RolloutEngine(model("qwen3"), fallback="error").generate(prompts(40, 70), PARAMS)


def failing(monkeypatch, owner, name, when):
    """`owner.name` raises out-of-memory at the calls for which `when(call's index, *args)`."""
    function, calls = getattr(owner, name), []

    def spoiled(*args, **named):
        calls.append(args)
        if when(len(calls) - 1, *args):
            raise torch.OutOfMemoryError("no memory")
        return function(*args, **named)

    monkeypatch.setattr(owner, name, spoiled)
    return calls


def test_prefill_in_smaller_chunks(monkeypatch, whole):
    calls = failing(monkeypatch, generation, "prefill", lambda i, parts, cache, pieces, *rest: total(pieces) > 64)
    rollouts = RolloutEngine(model("qwen3"), prefill_tokens=1024, fallback="error").generate(prompts(40, 70), PARAMS)
    assert_same_draws(model("qwen3"), rollouts, whole, PARAMS)
    sizes = [total(pieces) for _, _, pieces, *_ in calls]
    assert sizes == [110, 55, 55]


def total(pieces):
    return sum(len(piece.tokens) for piece in pieces)


def test_decode_with_fewer_rows(monkeypatch, whole):
    failing(monkeypatch, Step, "__call__", lambda i, step: step.sizes.rows > 2)
    rollouts = RolloutEngine(model("qwen3"), fallback="error").generate(prompts(40, 70), PARAMS)
    assert_same_draws(model("qwen3"), rollouts, whole, PARAMS)
    assert rollouts.stats.preemptions > 0


def test_in_the_middle_of_decoding(monkeypatch, whole):
    failing(monkeypatch, Step, "__call__", lambda i, step: i == 4)
    rollouts = RolloutEngine(model("qwen3"), fallback="error").generate(prompts(40, 70), PARAMS)
    assert_same_draws(model("qwen3"), rollouts, whole, PARAMS)
    assert rollouts.stats.preemptions == 3


def test_no_memory_for_a_single_row(monkeypatch, whole, caplog):
    """What is finished stays; `generate` answers the rest, from the same random streams."""
    calls = failing(monkeypatch, Step, "__call__", lambda i, step: i > 11)
    engine = RolloutEngine(model("qwen3"), max_sequences=1)
    with caplog.at_level(logging.WARNING, logger="flashpo"):
        rollouts = engine.generate(prompts(40, 70), PARAMS)
    assert "the rollout goes on with transformers' generate: no memory" in caplog.text
    assert len(calls) == 13  # 11 steps of the first completion, 1 of the second
    assert_same_draws(model("qwen3"), rollouts, whole, PARAMS)
    with pytest.raises(torch.OutOfMemoryError):
        RolloutEngine(model("qwen3"), max_sequences=1, fallback="error").generate(prompts(40, 70), PARAMS)


def test_a_smaller_pool_than_wished(monkeypatch, whole):
    calls = failing(monkeypatch, cache, "KVCache", lambda i, layers, blocks, *rest: blocks > 6)
    rollouts = RolloutEngine(model("qwen3"), fallback="error").generate(prompts(40, 70), PARAMS)
    assert [blocks for _, blocks, *_ in calls] == [10, 5]
    assert_same_draws(model("qwen3"), rollouts, whole, PARAMS)
    assert rollouts.stats.peak_rows == 3


def test_no_memory_for_any_pool(monkeypatch, whole, caplog):
    failing(monkeypatch, cache, "KVCache", lambda i, *rest: True)
    engine = RolloutEngine(model("qwen3"), check=False)
    with caplog.at_level(logging.WARNING, logger="flashpo"):
        rollouts = engine.generate(prompts(40, 70), PARAMS)
    assert "the rollout goes on with transformers' generate: no memory" in caplog.text
    assert_same_draws(model("qwen3"), rollouts, whole, PARAMS)
    assert rollouts.stats.cache_bytes == 0
    with pytest.raises(torch.OutOfMemoryError):
        RolloutEngine(model("qwen3"), fallback="error", check=False).generate(prompts(40, 70), PARAMS)


def test_a_request_that_never_fits_is_told_in_bytes(whole, caplog):
    engine = RolloutEngine(model("qwen3"), kv_memory=50_000, check=False)
    with caplog.at_level(logging.WARNING, logger="flashpo"):
        rollouts = engine.generate(prompts(40, 70), PARAMS)
    assert "needs 131072 bytes of keys and values (4 blocks of 64 tokens), kv_memory allows 50000 bytes" in caplog.text
    assert_same_draws(model("qwen3"), rollouts, whole, PARAMS)


def test_the_pool_is_free_before_generate_goes_on(monkeypatch, whole):
    pools, made = [], cache.KVCache.__init__

    def watched(self, *args):
        made(self, *args)
        pools.append(weakref.ref(self))

    def without_memory(self):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(cache.KVCache, "__init__", watched)
    monkeypatch.setattr(Step, "__call__", without_memory)
    generate, alive = plain.generate, []

    def looking(*args):
        gc.collect()
        alive.append([pool() is not None for pool in pools])
        generate(*args)

    monkeypatch.setattr(plain, "generate", looking)
    rollouts = RolloutEngine(model("qwen3"), max_sequences=1, check=False).generate(prompts(40, 70), PARAMS)
    assert alive == [[False], [False]]
    assert_same_draws(model("qwen3"), rollouts, whole, PARAMS)
    assert rollouts.stats.cache_bytes > 0


def test_a_prompt_behind_which_there_is_nan_ends_alone(monkeypatch, whole):
    logits, calls = CausalLM.logits, []

    def spoiled(self, hidden):
        out = logits(self, hidden)
        calls.append(out.shape[0])
        if len(calls) == 1:  # the prefill of both prompts
            out[0, 3] = torch.inf  # which makes every log-prob NaN
        return out

    monkeypatch.setattr(CausalLM, "logits", spoiled)
    engine = RolloutEngine(model("qwen3"), fallback="error", check=False)
    rollouts = engine.generate(prompts(40, 70), PARAMS)
    assert calls[0] == 2
    assert rollouts.finish_reasons == ["nan"] * 3 + ["length"] * 3
    assert [len(ids) for ids in rollouts.completion_ids[:3]] == [1] * 3
    assert all(math.isnan(x) for (x,) in rollouts.logprobs[:3])
    assert rollouts.completion_ids[3:] == whole.completion_ids[3:]
    monkeypatch.setattr(CausalLM, "logits", logits)
    assert engine.generate(prompts(40, 70), PARAMS).completion_ids == whole.completion_ids, "nothing of it is kept"


def test_a_model_that_fails_the_self_check_is_never_run(monkeypatch, caplog):
    monkeypatch.setattr(parity, "check", lambda model, roll, autocast: "layer 1 is the first to differ")
    monkeypatch.setattr(Step, "__call__", lambda self: pytest.fail("the engine runs"))
    engine = RolloutEngine(model("qwen3"), fallback="error")
    for _ in range(2):
        with pytest.raises(seam.Unsupported, match="layer 1 is the first to differ"):
            engine.generate(prompts(5), PARAMS)
    engine = RolloutEngine(model("qwen3"))
    with caplog.at_level(logging.WARNING, logger="flashpo"):
        for _ in range(2):
            assert len(engine.generate(prompts(5), PARAMS)) == 3
    assert caplog.text.count("rollouts by transformers' generate: layer 1 is the first to differ") == 1
    assert engine.why_not() == "layer 1 is the first to differ"


def test_no_memory_for_the_self_check(monkeypatch, whole, caplog):
    failing(monkeypatch, parity, "check", lambda i, *rest: i == 0)
    engine = RolloutEngine(model("qwen3"))
    with caplog.at_level(logging.WARNING, logger="flashpo"):
        first = engine.generate(prompts(40, 70), PARAMS)
    assert "there is no memory for its self-check: no memory" in caplog.text
    second = engine.generate(prompts(40, 70), PARAMS)  # asks again
    assert (first.stats.steps, second.stats.steps) == (0, 11)
    assert first.completion_ids == second.completion_ids == whole.completion_ids


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


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_session_goes_on_after_an_exception(monkeypatch, whole, error):
    engine = RolloutEngine(model("qwen3"), fallback="error", check=False)
    turn = [p + c + [7] for p, c in zip(whole.prompt_ids, whole.completion_ids)]
    fresh = engine.generate(turn, PARAMS)
    with engine.session():
        engine.generate(prompts(40, 70), PARAMS)
        with monkeypatch.context() as patch:
            patch.setattr(Step, "__call__", lambda self: (_ for _ in ()).throw(error("in the middle")))
            with pytest.raises(error, match="in the middle"):
                engine.generate(turn, PARAMS)
        again = engine.generate(turn, PARAMS)
        assert again.stats.prefill_tokens == fresh.stats.prefill_tokens, "nothing half-computed counts as cached"
        last = engine.generate([p + c + [9] for p, c in zip(again.prompt_ids, again.completion_ids)], PARAMS)
        assert last.stats.prefill_tokens_saved > last.stats.prefill_tokens
    assert again.completion_ids == fresh.completion_ids


def failing_stream(device):
    raise RuntimeError("no CUDA here")


def test_a_step_that_cannot_be_captured_runs_as_it_is(monkeypatch, caplog, whole):
    """The GPU's bookkeeping on a CPU: capture fails, buckets are larger than their rows, the host looks seldom."""
    monkeypatch.setattr(torch.cuda, "Stream", failing_stream)
    engine = RolloutEngine(model("qwen3"), fallback="error")
    engine.generate(prompts(40, 70), PARAMS)
    engine.pool.runner.cuda, engine.pool.runner.check_every = True, 5
    with caplog.at_level(logging.WARNING, logger="flashpo"):
        rollouts = engine.generate(prompts(40, 70), PARAMS)
    assert caplog.text.count("the decode step runs without a CUDA graph") == 1, "of one bucket"
    assert_same_draws(model("qwen3"), rollouts, whole, PARAMS)
    assert rollouts.stats.steps == 15


def test_the_fallback_is_the_engine_in_all_but_speed(monkeypatch):
    params = [
        SamplingParams(n=4, max_new_tokens=9, temperature=1.5, stop_token_ids=tuple(range(0, 120, 5))),
        SamplingParams(max_new_tokens=12, temperature=0.0),
        SamplingParams(n=2, max_new_tokens=9, suppress_token_ids=tuple(range(0, 120, 2))),
    ]
    fast = RolloutEngine(model("gemma3"), fallback="error").generate(prompts(30, 50, 20), params)
    monkeypatch.setattr("flashpo.rollout.engine.support", lambda model: Support(False, "a test", ()))
    net = model("gemma3")
    config = net.generation_config
    slow = RolloutEngine(net).generate(prompts(30, 50, 20), params)
    assert net.generation_config is config
    assert_same_draws(net, fast, slow, params)
    assert "stop" in slow.finish_reasons


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
