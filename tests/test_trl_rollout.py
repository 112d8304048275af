"""GRPO, RLOO and PPO sample with the rollout engine on the weights that they train."""

import contextlib
import warnings

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from trl_models import DATA, make_trainer

import flashpo.trl
from flashpo.rollout import RolloutEngine
from flashpo.trl.patch import patched
from flashpo.trl.rollout import MISMATCH, mismatch, mismatch_metrics

LORA = dict(peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
TRAINERS = ("GRPO", "RLOO", "PPO")


@pytest.fixture(autouse=True)
def within_a_step():
    with patched():
        yield


@pytest.fixture
def calls(monkeypatch):
    """What the engine was asked for, and returned."""
    seen = []
    generate = RolloutEngine.generate

    def watched(self, prompts, params, **kwargs):
        rollouts = generate(self, prompts, params, **kwargs)
        seen.append((prompts, params, rollouts))
        return rollouts

    monkeypatch.setattr(RolloutEngine, "generate", watched)
    return seen


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, LORA], ids=["full", "checkpointing", "lora"])
@pytest.mark.parametrize("model", ["qwen3", "gemma2"])
def test_log_probs_are_the_trainers_over_several_steps(calls, model, options):
    engine = dict(rollout="engine", rollout_options={"check": False})  # the self-check would be counted, too
    trainer = make_trainer("GRPO", flashpo.trl, model, max_steps=4, learning_rate=1e-2, **engine, **options)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert len(calls) == 4
    assert any((p != before[name]).any() for name, p in trainer.model.named_parameters() if name in before)
    for name in ("mean", "max", "ratio_q01", "ratio_q50", "ratio_q99", "effective_sample_size"):
        assert len(logged(trainer, f"rollout/mismatch/{name}")) == 4, name
    assert max(logged(trainer, "rollout/mismatch/max")) < 1e-5
    assert all(abs(x - 1) < 1e-5 for x in logged(trainer, "rollout/mismatch/ratio_q99"))
    assert all(0.999 < x <= 1.0001 for x in logged(trainer, "rollout/mismatch/effective_sample_size"))


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_uses_it(calls, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer = make_trainer(name, flashpo.trl)
        trainer.train()
    assert calls
    assert logged(trainer, "rollout/tokens_per_second")[0] > 0


def test_prompts_are_grouped_by_their_tokens(calls):
    """Not by place: a rank may hold parts of groups, and two rows of a dataset may be the same prompt."""
    rows = [{"prompt": p} for p in ("a b", "c d e", "a b", "f")]
    trainer = make_trainer("GRPO", flashpo.trl, train_dataset=Dataset.from_list(rows), num_generations=2)
    ids = [[3, 4], [5], [3, 4], [5], [6, 7, 8], [3, 4]]
    completions, logprobs = trainer._generate_single_turn(ids, None, {}, 2)
    ((prompts, params, rollouts),) = calls
    assert prompts == [[3, 4], [5], [6, 7, 8]]
    assert [p.n for p in params] == [3, 2, 1]
    order = [0, 3, 1, 4, 5, 2]  # of the completions 3 + 2 + 1
    assert completions == [rollouts.completion_ids[i] for i in order]
    assert logprobs == [rollouts.logprobs[i] for i in order]


def test_another_seed_each_time_and_the_same_after_the_same_seed():
    def sampled():
        torch.manual_seed(3)
        trainer = make_trainer("GRPO", flashpo.trl)
        return [trainer._generate_single_turn([[3, 4]] * 4, None, {}, 4)[0] for _ in range(2)]

    first, second = sampled()
    assert first != second
    assert sampled() == [first, second]


def flags(model):
    return (
        [m.training for m in model.modules()],
        [getattr(m, "gradient_checkpointing", None) for m in model.modules()],
        [p.dtype for p in model.parameters()],
        [p.requires_grad for p in model.parameters()],
        [m.__dict__.get("forward") for m in model.modules()],
        model.config._attn_implementation,
        model.config.use_cache,
    )


@pytest.mark.parametrize("fails", [None, RuntimeError, KeyboardInterrupt])
def test_the_model_is_as_it_was(fails, monkeypatch):
    trainer = make_trainer("GRPO", flashpo.trl, gradient_checkpointing=True)
    trainer.model.train()
    before = flags(trainer.model)
    expected = contextlib.nullcontext()
    if fails:
        trainer._generate_single_turn([[3, 4]], None, {}, 1)  # the parity check is done before
        before = flags(trainer.model)
        monkeypatch.setattr(
            "flashpo.rollout.runner.sample", lambda *a, **k: (_ for _ in ()).throw(fails("mid-rollout"))
        )
        expected = pytest.raises(fails, match="mid-rollout")
    with expected:
        trainer._generate_single_turn([[3, 4], [3, 4]], None, {}, 2)
    assert flags(trainer.model) == before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(repetition_penalty=1.3), r"repetition_penalty=1\.3"),
        (dict(generation_kwargs={"num_beams": 2}), "num_beams=2"),
        (dict(generation_kwargs={"bad_words_ids": [[5]]}), "bad_words_ids"),
    ],
)
def test_what_it_cannot_do_goes_to_trl_visibly(options, reason, calls):
    trainer = make_trainer("GRPO", flashpo.trl, **options)
    with pytest.warns(UserWarning, match=reason):
        ids, logprobs = trainer._generate_single_turn([[3, 4]] * 4, None, {}, 4)
    assert len(ids) == 4
    assert logprobs is None
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer._generate_single_turn([[3, 4]] * 4, None, {}, 4)  # said once
    assert not calls
    demanding = make_trainer("GRPO", flashpo.trl, rollout="engine", **options)
    with pytest.raises(ValueError, match=reason):
        demanding._generate_single_turn([[3, 4]] * 4, None, {}, 4)


def test_generation_by_trl_is_a_choice(calls):
    trainer = make_trainer("GRPO", flashpo.trl, rollout="generate")
    trainer.train()
    assert not calls
    with pytest.raises(ValueError, match="rollout must be"):
        make_trainer("GRPO", flashpo.trl, rollout="vllm")


def test_memory_is_free_for_the_update(calls, monkeypatch):
    """The same steps, though the cache is made again for each generation."""
    released, release = [], RolloutEngine.release
    monkeypatch.setattr(RolloutEngine, "release", lambda self: released.append(len(calls)) or release(self))
    completions = {}
    for frees in (False, True):
        trainer = make_trainer("GRPO", flashpo.trl, max_steps=2, rollout_release=frees)
        trainer.train()
        assert (trainer._rollouts.engine.pool.runner is None) == frees
        assert released == ([1, 2] if frees else [])  # after each generation
        completions[frees] = [rollouts.completion_ids for _, _, rollouts in calls]
        calls.clear()
    assert completions[True] == completions[False]
    with pytest.raises(ValueError, match="rollout_release"):
        make_trainer("GRPO", flashpo.trl, rollout_release=True, rollout="generate")


def test_sampling_options_reach_the_engine(calls):
    options = dict(temperature=0.7, top_p=0.9, top_k=11, min_p=0.05, max_completion_length=5)
    trainer = make_trainer("GRPO", flashpo.trl, **options)
    trainer._generate_single_turn([[3, 4]] * 4, None, {}, 4)
    ((_, (params,), _),) = calls
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.7, 0.9, 11, 0.05)
    assert params.max_new_tokens == 5
    assert params.stop_token_ids == (1,)


def test_turns_of_a_conversation_cost_their_new_tokens_only(calls):
    trainer = make_trainer("GRPO", flashpo.trl)
    prompts = [[*range(5, 70), row] for row in (10, 11)]
    with trainer._rollouts.session():
        first, _ = trainer._generate_single_turn(prompts, None, {}, 1)
        longer = [prompt + ids + [7, 8, 9] for prompt, ids in zip(prompts, first)]
        again, logprobs = trainer._generate_single_turn(longer, None, {}, 1)
    trainer._generate_single_turn(longer, None, {}, 1)
    assert calls[1][2].stats.prefill_tokens < calls[2][2].stats.prefill_tokens
    scored = [score(trainer.model, prompt, ids) for prompt, ids in zip(longer, again)]
    for ours, expected in zip(logprobs, scored):
        torch.testing.assert_close(torch.tensor(ours), expected, rtol=0, atol=1e-5)


def score(model, prompt, completion, temperature=0.9):
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_old_log_probs_from_the_rollout_save_a_forward(name):
    options = dict(steps_per_generation=2, num_iterations=2, max_steps=2, per_device_train_batch_size=4)
    options = options if name == "GRPO" else {"max_steps": 2}
    scored = {}
    for source in ("trainer", "rollout"):
        trainer = make_trainer(name, flashpo.trl, old_logprobs=source, **options)
        batches, forwards = [], []
        method = trainer._generate_and_score_completions

        def generate(inputs, method=method, forwards=forwards, batches=batches, trainer=trainer):
            hook = trainer.model.register_forward_hook(lambda *a: forwards.append(1))
            batches.append(method(inputs))
            hook.remove()
            return batches[-1]

        trainer._generate_and_score_completions = generate
        trainer.train()
        scored[source] = batches[0]["old_per_token_logps"], len(forwards)
    assert scored["trainer"][1] > 0
    assert scored["rollout"][1] == 0
    torch.testing.assert_close(scored["trainer"][0], scored["rollout"][0], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="old_logprobs"):
        make_trainer(name, flashpo.trl, old_logprobs="rollout", rollout="generate")


def test_the_mismatch_is_corrected_by_trls_options_for_it(monkeypatch):
    """As TRL weighs vLLM's samples: with the rollout's log-probs falsified, tokens count by their true ratio."""
    trainer = make_trainer("GRPO", flashpo.trl, vllm_importance_sampling_mode="token_truncate")
    trainer.model.train()
    inputs = [{"prompt": "a b"}] * 4
    batch = trainer._generate_and_score_completions(inputs)
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    batch["advantages"] = torch.tensor([1.0, -0.5, 2.0, 0.3])
    trainer.current_gradient_accumulation_steps = 1
    batch["sampling_per_token_logps"] = batch["sampling_per_token_logps"] - 0.5
    spec = trainer._spec_of(batch)
    assert (spec.importance, spec.importance_max) == ("token_truncate", trainer.vllm_importance_sampling_clip_max)
    corrected = trainer._compute_loss(trainer.model, batch)
    trainer.flush_metrics()
    assert trainer._metrics["train"]["rollout/mismatch/mean"][-1] == pytest.approx(0.5, abs=1e-4)
    trainer.args.vllm_importance_sampling_correction = False
    plain = trainer._compute_loss(trainer.model, batch)
    assert corrected.item() == pytest.approx(plain.item() * torch.tensor(0.5).exp().item(), rel=1e-4)


def test_mismatch_by_hand():
    trained, sampled = torch.randn(3, 50, dtype=torch.float64), torch.randn(3, 50, dtype=torch.float64)
    mask = torch.rand(3, 50) < 0.7
    sampled[0, 0] = torch.nan
    live = mask & ~sampled.isnan()
    difference = (trained - sampled)[live]
    w = difference.exp()
    quantiles = difference.quantile(torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64)).exp()
    size = w.sum() ** 2 / (len(w) * (w * w).sum())
    expected = [difference.abs().mean(), difference.abs().max(), *quantiles, size]
    found = mismatch(trained.float(), sampled.float(), mask)
    torch.testing.assert_close(found[:-1], torch.stack(expected).float())
    assert found[-1] == live.sum()
    behind = mismatch(trained.float() - 9, trained.float(), mask)  # sums of ratios far below 1
    assert behind[MISMATCH.index("effective_sample_size")] == pytest.approx(1.0)
    nothing = mismatch(trained.float(), sampled.float(), torch.zeros_like(mask))
    rows = torch.stack([found, found * 2, nothing])
    metrics = mismatch_metrics(rows)
    assert len(metrics) == len(MISMATCH)
    assert metrics["rollout/mismatch/max"] == pytest.approx(2 * difference.abs().max().item())
    assert metrics["rollout/mismatch/mean"] == pytest.approx(difference.abs().mean().item() * 5 / 3, rel=1e-4)


def test_evaluation_uses_it(calls):
    trainer = make_trainer(
        "GRPO", flashpo.trl, eval_dataset=Dataset.from_list(DATA["GRPO"][:2]), num_generations_eval=2,
        per_device_eval_batch_size=4,
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert calls
    assert metrics["eval_rollout/mismatch/max"] < 1e-5


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_trl_generates_with_the_models_own_attention(name, monkeypatch):
    """transformers' continuous batching refuses attentions that it does not know by name."""
    seen = []
    stock = getattr(trl, f"{name}Trainer")
    generate = stock._generate_single_turn

    def watched(self, *turn):
        seen.append(self.model.config._attn_implementation)
        return generate(self, *turn)

    monkeypatch.setattr(stock, "_generate_single_turn", watched)
    trainer = make_trainer(name, flashpo.trl, rollout="generate", max_steps=3)
    own = trainer.model.config._attn_implementation.removeprefix("tree:")
    trainer.train()
    assert seen == [own] * 3
    assert trainer.model.config._attn_implementation == f"tree:{own}"
