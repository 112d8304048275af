"""What the engine cannot run or cannot finish within a trainer: training continues, and the reason is given."""

import logging
import math
import warnings

import pytest
import torch
from test_rollout_faults import failing
from trl_models import make_trainer

import flashpo.trl
from flashpo.bench.tiny_models import tiny_model
from flashpo.rollout import RolloutEngine
from flashpo.rollout.runner import Step
from flashpo.trl.patch import patched

TURN = ([[3, 4]] * 2 + [[5, 6, 7]] * 2, None, {}, 2)


@pytest.fixture(autouse=True)
def within_a_step():
    with patched():
        yield


def assert_trl_answers(trainer, turn, reason):
    with pytest.warns(UserWarning, match=f"rollout engine does not generate here: {reason}"):
        ids, logprobs = trainer._generate_single_turn(*turn)
    assert len(ids) == len(turn[0])
    assert logprobs is None
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert trainer._generate_single_turn(*turn)[1] is None  # said once


def assert_refused(reason, turn=TURN, **options):
    assert_trl_answers(make_trainer("GRPO", flashpo.trl, **options), turn, reason)
    demanding = make_trainer("GRPO", flashpo.trl, rollout="engine", **options)
    for _ in range(2):  # not answered the second time, either
        with pytest.raises(ValueError, match=f"rollout='engine', but {reason}"):
            demanding._generate_single_turn(*turn)


def test_an_unsupported_model(tmp_path):
    tiny_model("bloom").save_pretrained(tmp_path)
    assert_refused("BloomForCausalLM does not use transformers' attention interface", model=str(tmp_path))


def test_a_model_that_fails_the_self_check(tmp_path):
    tiny_model("recurrent_gemma").save_pretrained(tmp_path)
    assert_refused("a small RecurrentGemmaForCausalLM of the same config answers otherwise", model=str(tmp_path))


def test_no_memory_for_the_self_check(monkeypatch):
    failing(monkeypatch, flashpo.rollout.parity, "check", lambda i, *rest: True)
    assert_refused("there is no memory for its self-check: no memory")


def test_a_prompt_longer_than_the_limit():
    long = [[3] * 250] * 2, None, {}, 2
    assert_refused("a prompt with max_completion_length passes the 256 positions of the model", long)
    trainer = make_trainer("GRPO", flashpo.trl)
    with pytest.warns(UserWarning, match="passes the 256 positions"):
        trainer._generate_single_turn(*long)
    assert trainer._generate_single_turn(*TURN)[1] is not None, "others are the engine's"


@pytest.mark.parametrize(
    ("images", "fields", "flag", "reason"),
    [
        ([["an image"]], {}, None, "the prompts have images"),
        (None, {"pixel_values": torch.zeros(1)}, None, "the prompts have images: qwen3 names no image token"),
        (None, {}, "use_vllm", "use_vllm is set"),
        (None, {}, "use_transformers_continuous_batching", "use_transformers_continuous_batching is set"),
    ],
)
def test_what_only_trl_generates(images, fields, flag, reason):
    trainer = make_trainer("GRPO", flashpo.trl)
    if flag:
        setattr(trainer, flag, True)
    with pytest.warns(UserWarning, match=reason):
        assert trainer._rollouts.generate([[3, 4]], images, fields) is None


def test_memory_that_runs_out_in_the_middle(monkeypatch, caplog):
    """What is finished stays, transformers' `generate` answers the rest: the same completions."""

    def generate(**options):
        torch.manual_seed(7)
        return make_trainer("GRPO", flashpo.trl, rollout_options={"max_sequences": 1}, **options)

    trainer = generate()
    trainer._generate_single_turn(*TURN)  # with the self-check
    torch.manual_seed(8)
    whole = trainer._generate_single_turn(*TURN)
    failing(monkeypatch, Step, "__call__", lambda i, step: i > 8)
    torch.manual_seed(8)
    with caplog.at_level(logging.WARNING, logger="flashpo"):
        ids, logprobs = trainer._generate_single_turn(*TURN)
    assert "the rollout goes on with transformers' generate: no memory" in caplog.text
    assert ids == whole[0]
    for ours, theirs in zip(logprobs, whole[1]):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-5, rtol=0)
    with pytest.raises(torch.OutOfMemoryError):
        generate(rollout="engine")._generate_single_turn(*TURN)


def test_a_row_of_nan_is_counted_and_trains_nothing(monkeypatch):
    """TRL takes a missing log-prob of the rollout for a ratio of 1."""
    generate = RolloutEngine.generate

    def spoiled(self, *args, **kwargs):
        rollouts = generate(self, *args, **kwargs)
        rollouts.finish_reasons[1], rollouts.logprobs[1][-1] = "nan", math.nan
        return rollouts

    trainer = make_trainer("GRPO", flashpo.trl, max_steps=2)
    assert RolloutEngine(trainer.model).why_not() is None  # the self-check runs engines, too: before they are spoiled
    monkeypatch.setattr(RolloutEngine, "generate", spoiled)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 2
    for row in rows:
        assert row["rollout/nan_completions"] == 1
        assert all(math.isfinite(row[name]) for name in row if name in ("loss", "grad_norm") or "mismatch" in name)
