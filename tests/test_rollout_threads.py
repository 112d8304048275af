"""One rollout of a model at a time: a second one gets an error and leaves no change behind."""

import itertools
import threading
import types

import pytest
import torch
from rollout_models import FAMILIES, prompts

from flashpo._hosts import peft as _peft
from flashpo.packing import packable
from flashpo.rollout import RolloutEngine, SamplingParams, parity, support
from flashpo.rollout.runner import Step
from flashpo.rollout.seam import ModelInUse, rollout_mode

PARAMS = SamplingParams(n=2, max_new_tokens=6, seed=3)


def net(family="qwen3"):
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def engine(model, **options):
    return RolloutEngine(model, fallback="error", check=False, **options)


def state(model):
    modules = [(m.training, m.__dict__.get("forward")) for m in model.modules()]
    return modules, model.config._attn_implementation_internal


def in_a_thread(function):
    """What it returns or raises there."""
    result = []

    def run():
        try:
            result.append(function())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return result[0]


def in_the_middle(monkeypatch, model, act, first=None, asked=None):
    """What `act` answers while a rollout of the model is at its third step, and the rollout itself.

    first: the engine that rolls out, by default one of its own.
    """
    step, calls, seen = Step.__call__, [], []

    def meddling(self):
        calls.append(self)
        if len(calls) == 3:
            seen.append(act())
        step(self)

    monkeypatch.setattr(Step, "__call__", meddling)
    rollouts = (first or engine(model)).generate(asked or prompts(9, 70), PARAMS)
    monkeypatch.setattr(Step, "__call__", step)
    return seen[0], rollouts


OTHERS = {
    "a second engine": lambda net: RolloutEngine(net),
    "a rollout of a second engine": lambda net, second: second.generate(prompts(5), PARAMS),
    "the model's forward": lambda net: net(torch.tensor([[1, 2, 3]])),
    "the model's generate": lambda net: net.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2),
}


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("fallback", ["error", "generate"])
def test_nobody_else_in_another_thread(what, fallback, monkeypatch):
    model = net()
    before = state(model)
    whole = engine(model).generate(prompts(9, 70), PARAMS)
    second = [RolloutEngine(model, fallback=fallback, check=False)] if "rollout" in what else []
    act = OTHERS[what]
    answer, rollouts = in_the_middle(monkeypatch, model, lambda: in_a_thread(lambda: act(model, *second)))
    assert isinstance(answer, RuntimeError)
    assert "in the middle of a rollout in thread" in str(answer) or "no other can run its forward" in str(answer)
    assert rollouts.completion_ids == whole.completion_ids
    assert state(model) == before
    assert not isinstance(in_a_thread(lambda: act(model, *second)), Exception), "afterwards it is free again"


def test_nobody_else_further_up_in_the_same_thread():
    model = net()
    second, before = engine(model), state(model)

    def decode(tokens):
        second.generate(prompts(5), PARAMS)

    first = engine(model, tokenizer=types.SimpleNamespace(decode=decode))
    with pytest.raises(ModelInUse, match="in the middle of a rollout in this thread"):
        first.generate(prompts(5), SamplingParams(stop_strings=("x",)))
    assert state(model) == before
    assert len(second.generate(prompts(5), PARAMS)) == 2


def test_models_that_share_something():
    first, second = net(), net()
    second.config = first.config
    with rollout_mode(first), pytest.raises(ModelInUse, match="Qwen3ForCausalLM is in the middle of a rollout"):
        RolloutEngine(second)
    second = net()
    second.model.layers = first.model.layers
    with rollout_mode(first), pytest.raises(ModelInUse):
        RolloutEngine(second)
    RolloutEngine(second)


def rounds(engines, asked, count=6):
    """Every engine's completions of each round, or its error, all threads of a round starting together."""
    barrier, out = threading.Barrier(len(engines)), [[] for _ in engines]

    def run(engine, results):
        for _ in range(count):
            barrier.wait(60)
            try:
                results.append(engine.generate(asked, PARAMS).completion_ids)
            except ModelInUse as error:
                results.append(error)

    threads = [threading.Thread(target=run, args=x) for x in zip(engines, out)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return out


def test_engines_of_one_model_are_right_or_say_so():
    model, asked = net(), prompts(9, 70)
    before, expected = state(model), engine(model).generate(asked, PARAMS).completion_ids
    results = list(itertools.chain(*rounds([engine(model) for _ in range(3)], asked)))
    assert all(x == expected for x in results if not isinstance(x, ModelInUse))
    assert any(x == expected for x in results)
    assert any(isinstance(x, ModelInUse) for x in results)
    assert state(model) == before


def test_engines_of_several_models_do_not_meet():
    nets, asked = [net(), net(), net("gemma2")], prompts(9, 70)
    expected = [engine(x).generate(asked, PARAMS).completion_ids for x in nets]
    for completions, results in zip(expected, rounds([RolloutEngine(x, fallback="error") for x in nets], asked, 3)):
        assert results == [completions] * 3


def test_self_checks_of_two_threads_wait_for_each_other(monkeypatch):
    """They seed and restore torch's own generator."""
    monkeypatch.setattr(parity, "_answers", {})
    engines = [RolloutEngine(net(family), fallback="error") for family in ("llama", "mistral")]
    expected = torch.get_rng_state()
    monkeypatch.setattr(parity, "_difference", watched(parity._difference, inside := []))
    threads = [threading.Thread(target=x.why_not) for x in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [x.why_not() for x in engines] == [None, None]
    assert inside == [1] * 4, "a twin and a model each, one after the other"
    assert torch.equal(torch.get_rng_state(), expected)


def watched(function, inside):
    """Notes at each call how many threads are in it."""
    there = []

    def noting(*args):
        there.append(args)
        inside.append(len(there))
        try:
            return function(*args)
        finally:
            there.pop()

    return noting


def with_lora(model):
    """Two adapters, one of them active; random, so that each gives other completions."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    model.add_adapter("other", config)
    return model.eval()


LOOKS_AT_ADAPTERS = {
    "a rollout": lambda model, second: second.generate(prompts(5), PARAMS),
    "a rollout of another adapter": lambda model, second: second.generate(prompts(5), PARAMS, adapters=["other"]),
    "why not": lambda model, second: second.why_not(),
    "support": lambda model, second: support(model),
    "token trees": lambda model, second: packable(model),
}


@pytest.mark.parametrize("what", LOOKS_AT_ADAPTERS)
def test_nobody_else_looks_at_the_adapters_of_a_rollout(what, monkeypatch):
    """The look itself changes the model: which adapters answer, and what the forward below PEFT's wrapper is."""
    model = with_lora(net())
    second, before = engine(model), [dict(vars(module)) for module in model.modules()]
    expected = engine(model).generate(prompts(9, 70), PARAMS).completion_ids
    changed = []
    for name in ("_left_as_found", "active_adapter"):
        monkeypatch.setattr(_peft, name, noting(getattr(_peft, name), changed))
    act = LOOKS_AT_ADAPTERS[what]

    def looks():
        changed.clear()
        answer = in_a_thread(lambda: act(model, second))
        return answer, list(changed)

    (answer, meanwhile), rollouts = in_the_middle(monkeypatch, model, looks)
    assert isinstance(answer, ModelInUse)
    assert not meanwhile, "the model is changed while another thread has it"
    assert rollouts.completion_ids == expected
    assert [dict(vars(module)) for module in model.modules()] == before
    assert not isinstance(looks()[0], Exception), "afterwards it is free again"


def noting(function, calls):
    def called(*args):
        calls.append(function.__name__)
        return function(*args)

    return called


def test_engines_of_one_model_with_adapters_are_right_or_say_so():
    model, asked = with_lora(net()), prompts(9, 70)
    before = [dict(vars(module)) for module in model.modules()]
    expected = engine(model).generate(asked, PARAMS).completion_ids
    results = list(itertools.chain(*rounds([engine(model) for _ in range(3)], asked)))
    assert all(x == expected for x in results if not isinstance(x, ModelInUse))
    assert any(x == expected for x in results)
    assert [dict(vars(module)) for module in model.modules()] == before


def test_a_refused_rollout_leaves_the_session_of_the_engine_alone(monkeypatch):
    """One engine in two threads: what the first has counted and cached stays, and so does its limit of rows."""
    model, asked = net(), prompts(9, 70)
    alone, shared = engine(model), engine(model)
    with alone.session(), shared.session():
        turns = [alone.generate(asked, PARAMS)]
        longer = [ids + more for ids, more in zip(turns[0].prompt_ids[::2], turns[0].completion_ids[::2])]
        turns.append(alone.generate(longer, PARAMS))
        refused = []

        def act():
            kept = shared.runner, shared.scheduler, shared.scheduler.max_rows
            refused.append(in_a_thread(lambda: shared.generate(prompts(400), PARAMS)))
            assert (shared.runner, shared.scheduler, shared.scheduler.max_rows) == kept

        for turn, question in zip(turns, (asked, longer)):
            rollouts = in_the_middle(monkeypatch, model, act, shared, question)[1]
            assert rollouts.completion_ids == turn.completion_ids
            for count in ("prefill_tokens", "prefill_tokens_saved", "peak_rows", "preemptions"):
                assert getattr(rollouts.stats, count) == getattr(turn.stats, count), count
        assert turns[1].stats.prefill_tokens_saved > 0
        assert [type(x) for x in refused] == [ModelInUse] * 2
