"""RolloutEngine against plain forwards and `generate`. Its results do not depend on how the work was arranged."""

import collections
import copy
import dataclasses
import math
import types

import pytest
import torch
from accuracy import assert_as_accurate
from rollout_models import FAMILIES, VOCAB, assert_same_draws, forward_logprobs, greedy, model, prompts

from flashpo._causal_lm import CausalLM
from flashpo.rollout import RolloutEngine, SamplingParams


def engine(family: str = "qwen3", **options) -> RolloutEngine:
    return RolloutEngine(model(family), fallback="error", **options)


def assert_logprobs(net, rollouts, temperature=1.0):
    """As near to fp64 as a plain forward in fp32 is."""
    wide = copy.deepcopy(net).double()
    pairs = list(zip(rollouts.prompt_ids, rollouts.completion_ids))
    exact, plain = (torch.cat([forward_logprobs(x, *pair, temperature) for pair in pairs]) for x in (wide, net))
    assert plain.dtype == torch.float32
    assert_as_accurate(torch.cat([torch.tensor(x) for x in rollouts.logprobs]), exact, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_a_plain_forward(family):
    rollouts = engine(family).generate(prompts(5, 70, 131), SamplingParams(n=3, temperature=0.7, max_new_tokens=70))
    assert [len(c) for c in rollouts.completion_ids] == [70] * 9
    assert len({tuple(c) for c in rollouts.completion_ids}) == 9
    assert_logprobs(model(family), rollouts, 0.7)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_generate(family):
    asked = prompts(3, 64, 90)
    rollouts = engine(family).generate(asked, SamplingParams(temperature=0.0, max_new_tokens=40))
    assert rollouts.completion_ids == [greedy(model(family), prompt, 40) for prompt in asked]


def test_results_do_not_depend_on_arrangement():
    """Slots, memory, chunks of prefill, batch composition and the order of refills leave no trace."""
    asked = prompts(30, 64, 100, 7)
    params = [SamplingParams(n=n, max_new_tokens=m, seed=3) for n, m in ((4, 20), (1, 65), (3, 5), (2, 40))]
    whole = engine().generate(asked, params)
    for options in ({"max_sequences": 1}, {"max_sequences": 3}, {"prefill_tokens": 17}, {"kv_memory": 200_000}):
        other = engine(**options).generate(asked, params)
        assert_same_draws(model("qwen3"), other, whole, params)
    assert other.stats.peak_rows < whole.stats.peak_rows == 10
    first = engine().generate(asked[:1], params[:1])
    assert_same_draws(model("qwen3"), first, first_rows(whole, 4), params)


def first_rows(rollouts, count):
    columns = {name: getattr(rollouts, name)[:count] for name in rollouts._columns()}
    return dataclasses.replace(rollouts, **columns)


def test_preempted_rows_go_on_as_if_nothing_had_happened():
    params = SamplingParams(n=4, max_new_tokens=130)
    whole = engine().generate(prompts(64), params)
    short = engine(kv_memory=6 * 32768, expected_tokens=10).generate(prompts(64), params)
    assert short.stats.cache_bytes == 6 * 32768
    assert short.stats.peak_rows == 4
    assert short.stats.preemptions > 0
    assert_same_draws(model("qwen3"), short, whole, params)
    assert_logprobs(model("qwen3"), short)


def test_another_seed_gives_other_completions():
    first, second = (engine().generate(prompts(9), SamplingParams(n=2, seed=s)).completion_ids for s in (0, 1))
    assert first != second
    assert first == engine().generate(prompts(9), SamplingParams(n=2, seed=0)).completion_ids


def test_ragged_groups_and_limits():
    params = [SamplingParams(n=n, max_new_tokens=m) for n, m in ((1, 1), (5, 3), (2, 66))]
    rollouts = engine().generate(prompts(4, 65, 128), params)
    assert rollouts.prompt_index == [0, 1, 1, 1, 1, 1, 2, 2]
    assert [len(c) for c in rollouts.completion_ids] == [1, 3, 3, 3, 3, 3, 66, 66]
    assert set(rollouts.finish_reasons) == {"length"}
    assert_logprobs(model("qwen3"), rollouts)


def test_stop_tokens_end_a_completion_and_belong_to_it():
    asked = prompts(20, 33)
    free = engine().generate(asked, SamplingParams(n=4, max_new_tokens=50))
    stops = (11, 40, 77)
    stopped = engine().generate(asked, SamplingParams(n=4, max_new_tokens=50, stop_token_ids=stops))
    assert "stop" in stopped.finish_reasons
    for long, short, reason in zip(free.completion_ids, stopped.completion_ids, stopped.finish_reasons):
        end = next((i for i, t in enumerate(long) if t in stops), None)
        assert short == (long if end is None else long[: end + 1])
        assert reason == ("length" if end is None else "stop")


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_suppressed_tokens_are_never_drawn(temperature):
    """Log-probs stay the model's, which knows of no suppression; the truncated ones are of what may be drawn."""
    asked = prompts(20, 33)
    options = dict(n=4, max_new_tokens=20, temperature=temperature)
    free = engine().generate(asked, SamplingParams(**options))
    often = collections.Counter(token for completion in free.completion_ids for token in completion).most_common(9)
    suppressed = [token for token, _ in often]
    params = [SamplingParams(**options, suppress_token_ids=[*suppressed, VOCAB + 3]), SamplingParams(**options)]
    out = engine().generate(asked, params)
    drawn = [set(completion) for completion in out.completion_ids]
    assert not set(suppressed) & set.union(*drawn[:4])
    assert out.completion_ids[4:] == free.completion_ids[4:]
    assert_logprobs(model("qwen3"), out, temperature or 1.0)
    if temperature:
        row = asked[0] + out.completion_ids[0]
        logits = model("qwen3")(torch.tensor([row])).logits[0, len(asked[0]) - 1 : -1] / temperature
        logits[:, suppressed] = -torch.inf
        allowed = logits.log_softmax(-1).gather(1, torch.tensor(out.completion_ids[0])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(out.truncated_logprobs[0]), allowed, rtol=1e-4, atol=1e-4)


def test_a_tree_of_prompts_is_prefilled_once():
    system, tools, users = prompts(128, 64, 9, 70, 30, 5)[0], prompts(64, seed=1)[0], prompts(9, 70, 30, 5, seed=2)
    asked = [system + tools + users[0], system + tools + users[1], system + users[2], users[3], users[3]]
    rollouts = engine().generate(asked, SamplingParams(n=2, max_new_tokens=10, temperature=0.8))
    assert rollouts.stats.prefill_tokens == 128 + 64 + 9 + 70 + 30 + 5
    assert rollouts.stats.prefill_tokens_saved == 2 * sum(map(len, asked)) - rollouts.stats.prefill_tokens
    assert_logprobs(model("qwen3"), rollouts, 0.8)
    assert rollouts.completion_ids[6:8] != rollouts.completion_ids[8:10]  # equal prompts, streams of their own


def test_a_session_continues_from_the_cache():
    net, asked = engine(), prompts(100, 40)
    params = SamplingParams(n=1, max_new_tokens=30)
    with net.session():
        first = net.generate(asked, params)
        turn = [p + c + extra for p, c, extra in zip(asked, first.completion_ids, prompts(7, 66, seed=5))]
        second = net.generate(turn, params)
    assert second.stats.prefill_tokens == 7 + 66 + 2  # the last token of a completion has never been fed
    fresh = engine().generate(turn, params)
    assert_same_draws(model("qwen3"), second, fresh, params)
    assert_logprobs(model("qwen3"), second)
    after = net.generate(turn, params)
    assert after.stats.prefill_tokens == sum(map(len, turn))


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, r"prompts\[1\] is empty"),
        ([VOCAB], {}, r"prompts\[1\] holds ids outside \[0, 120\)"),
        ([-1], {}, r"prompts\[1\] holds ids outside"),
        ([1] * 1000, {"max_new_tokens": 25}, r"prompts\[1\] has 1000 tokens.*1024 positions"),
        ([1], {"stop_strings": ("x",)}, "stop_strings need a tokenizer"),
    ],
)
def test_bad_requests(prompt, params, message):
    with pytest.raises(ValueError, match=message):
        engine().generate([[1], prompt], SamplingParams(**params))


@pytest.mark.parametrize(
    ("asked", "params", "message"),
    [
        ([1, 2], SamplingParams(), "prompts must be lists of token ids"),
        ("abc", SamplingParams(), "prompts must be a sequence, not str"),
        ([[1.0, 2.0]], SamplingParams(), "prompts must be lists of token ids"),
        (3, SamplingParams(), "prompts must be a sequence, not int"),
        ([[1]], None, "params must be a sequence, not NoneType"),
        ([[1]], [{"n": 2}], "params must be SamplingParams, not dict"),
    ],
)
def test_what_is_no_request(asked, params, message):
    with pytest.raises(TypeError, match=message):
        engine().generate(asked, params)


def test_prompts_may_be_tensors():
    asked = torch.tensor(prompts(5)).repeat(3, 1)
    out = engine().generate(asked, SamplingParams(max_new_tokens=4))
    assert out.prompt_ids == asked.tolist()
    assert out.stats.prefill_tokens_saved == 2 * 5


def test_params_must_match_the_prompts():
    with pytest.raises(ValueError, match="params must be one SamplingParams or one for each of 2 prompts"):
        engine().generate(prompts(3, 3), [SamplingParams()])


def test_a_request_that_cannot_fit_names_bytes():
    with pytest.raises(MemoryError, match=r"kv_memory.*bytes"):
        engine(kv_memory=100_000).generate(prompts(500), SamplingParams(max_new_tokens=200))


def test_stop_strings():
    tokenizer = types.SimpleNamespace(decode=lambda ids: "".join(chr(ord("A") + i % 26) for i in ids))
    asked = prompts(20, 33)
    free = engine().generate(asked, SamplingParams(n=3, max_new_tokens=40))
    text = tokenizer.decode(free.completion_ids[1])
    stop = text[10:13]
    stopped = engine(tokenizer=tokenizer).generate(asked, SamplingParams(n=3, max_new_tokens=40, stop_strings=(stop,)))
    assert stopped.finish_reasons[1] == "stop"
    for long, short, reason in zip(free.completion_ids, stopped.completion_ids, stopped.finish_reasons):
        at = tokenizer.decode(long).find(stop)
        assert short == (long if at < 0 else long[: at + 3])
        assert reason == ("length" if at < 0 else "stop")


def test_truncated_logprobs_are_those_of_the_filtered_distribution():
    rollouts = engine().generate(prompts(20), SamplingParams(n=3, top_k=5, max_new_tokens=20))
    assert_logprobs(model("qwen3"), rollouts)
    for full, truncated in zip(rollouts.logprobs, rollouts.truncated_logprobs):
        assert all(a < b for a, b in zip(full, truncated))
    plain = engine().generate(prompts(20), SamplingParams(n=3, max_new_tokens=20))
    assert plain.truncated_logprobs[0] is plain.logprobs[0]


def test_a_row_with_nan_ends_alone(monkeypatch):
    net, asked, params = engine(), prompts(20, 30), SamplingParams(n=2, max_new_tokens=12)
    whole = net.generate(asked, params)
    logits, calls = CausalLM.logits, []

    def spoiled(self, hidden):
        out = logits(self, hidden)
        calls.append(out.shape[0])
        if len(calls) == 6:  # a prefill, then steps
            out[1] = torch.nan
        return out

    monkeypatch.setattr(CausalLM, "logits", spoiled)
    rollouts = net.generate(asked, params)
    assert rollouts.finish_reasons == ["length", "nan", "length", "length"]
    assert rollouts.stats.nan_rows == 1
    assert len(rollouts.logprobs[1]) == 6
    assert math.isnan(rollouts.logprobs[1][-1])
    for i in (0, 2, 3):
        assert rollouts.completion_ids[i] == whole.completion_ids[i]


def test_no_prompts():
    rollouts = engine().generate([], SamplingParams())
    assert len(rollouts) == 0
    assert rollouts.stats.steps == 0


def test_progress(capsys):
    engine().generate(prompts(5, 9), SamplingParams(n=3, max_new_tokens=4), progress=True)
    shown = capsys.readouterr().err
    assert "rollout: 100%" in shown
    assert "6/6" in shown
    engine().generate(prompts(5), SamplingParams(max_new_tokens=4))
    assert not capsys.readouterr().err
