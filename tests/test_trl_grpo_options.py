"""What our GRPO and RLOO trainers add to TRL's: any loss, groups by columns, advantages of tokens, dynamic sampling."""

import contextlib

import pytest
import torch
import trl
from datasets import Dataset
from trl_models import DATA, Recorder, assert_ran, make_trainer, train

import flashpo
import flashpo.trl
from flashpo import LOSSES, LossSpec
from flashpo.trl import GRPOConfig, GRPOTrainer, RLOOConfig
from flashpo.trl.dynamic_sampling import replace_degenerate
from flashpo.trl.patch import stock


@pytest.mark.parametrize("name", [n for n in LOSSES if LOSSES[n].importance == "none"])
def test_every_loss_trains(name):
    """By its name alone; gradients flow and the log has its metrics."""
    steps = train(make_trainer("GRPO", flashpo.trl, loss=name, num_iterations=2, max_steps=2))
    assert_ran("policy_loss_fwd", "group_advantages_fwd")
    assert any(g.abs().max() > 0 for g in steps[0].gradients.values())
    if LOSSES[name].surrogate == "clip":
        assert "clip_ratio/high_mean" in steps[0].metrics


@pytest.mark.parametrize("name", ["gspo", "ppo", "dr_grpo", "cispo"])
def test_every_loss_trains_rloo(name):
    steps = train(make_trainer("RLOO", flashpo.trl, loss=name))
    assert any(g.abs().max() > 0 for g in steps[0].gradients.values())


def test_a_spec_is_a_loss():
    """Survives the configuration's way through JSON, and brings the reference model that its KL needs."""
    spec = LossSpec(surrogate="sapo", kl_coef=0.1, kl="k2")
    trainer = make_trainer("GRPO", flashpo.trl, loss=spec)
    assert trainer.args.loss_spec() == spec
    assert trainer.ref_model is not None
    assert isinstance(trainer.args.to_json_string(), str)
    (step,) = train(trainer)
    assert "kl" in step.metrics


def test_names_of_losses_agree_with_trl():
    """`loss="gspo"` is TRL's GRPO with importance_sampling_level="sequence" and loss_type="grpo"."""
    options = dict(steps_per_generation=2, num_iterations=2, max_steps=4, learning_rate=0.01)
    theirs = train(
        make_trainer(
            "GRPO", trl, importance_sampling_level="sequence", loss_type="grpo", epsilon=3e-4, epsilon_high=4e-4,
            **options,
        )
    )  # fmt: skip
    same = dict(rollout="generate", share_prefix=False)  # the same samples, and rounding: the clip range is narrow
    ours = train(make_trainer("GRPO", flashpo.trl, loss="gspo", **same, **options))
    for a, b in zip(theirs, ours):
        assert b.loss == pytest.approx(a.loss, abs=1e-5)
    assert max(step.metrics["clip_ratio/region_mean"] for step in ours) > 0


WRONG = [
    (dict(loss="gpro"), "loss must be one of"),
    (dict(loss="gspo", epsilon=0.1), "epsilon exclude each other"),
    (dict(loss="gspo", loss_type="grpo"), "loss_type exclude each other"),
    (dict(loss=LossSpec(kl_coef=0.1), beta=0.2), "contradict each other"),
    (dict(dynamic_sampling=-1), "dynamic_sampling must not be negative"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[m for _, m in WRONG])
def test_contradictory_options_raise(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)


def test_rloo_has_its_kl_in_the_reward(tmp_path):
    with pytest.raises(ValueError, match="KL in the reward"):
        RLOOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, loss=LossSpec(kl_coef=0.1))


def with_rewards(trainer, rewards):
    """A trainer whose reward function gives these, row by row and call by call."""
    calls = iter(rewards)
    trainer.reward_funcs = [lambda completions, **kwargs: next(calls)]
    return trainer


def generated(trainer, **changes):
    rows = [dict(row) for row in trainer.train_dataset.select(range(2)) for _ in range(trainer.num_generations)]
    for name, values in changes.items():
        for row, value in zip(rows, values):
            row[name] = value
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    with flashpo.trl.patched():
        return trainer._generate_and_score_completions(rows)


NAN = float("nan")
REWARDS = {
    "plain": [1.0, 2.0, 4.0, 8.0, 0.5, 0.25, 3.0, 0.0],
    "some without": [1.0, NAN, 4.0, 8.0, NAN, NAN, 3.0, NAN],
    "a group without": [1.0, 2.0, 4.0, 8.0, NAN, NAN, NAN, NAN],
}


@pytest.mark.parametrize("rewards", REWARDS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *[("GRPO", {"scale_rewards": scale}) for scale in ("group", "batch", "none")],
        *[
            ("GRPO", {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": scale})
            for scale in ("group", "batch", "none", False)
        ],
        *[("RLOO", {"normalize_advantages": n, "beta": b}) for n in (False, True) for b in (0.0, 0.3)],
        ("RLOO", {"reward_clip_range": (0.3, 3.5)}),
    ],
    ids=str,
)
def test_advantages_are_those_of_trl(name, options, rewards):
    """Also what it logs of them."""
    trainer = with_rewards(make_trainer(name, flashpo.trl, **options), [REWARDS[rewards]] * 2)
    found, metrics = [], []
    for code in (stock, contextlib.nullcontext):
        torch.manual_seed(3)
        with code():
            found.append(generated(trainer)["advantages"])
        metrics.append({k: v for k, v in trainer._metrics["train"].items() if "reward" in k or k == "kl"})
        trainer._metrics["train"].clear()
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(metrics[1], metrics[0], equal_nan=True)


def test_equal_rewards_teach_nothing_and_are_counted():
    """TRL gives groups of equal 0.9 an advantage of rounding, and its metric does not see them."""
    rewards = [[0.9, 0.9, 0.9, 0.9, 0.0, 1.0, 0.0, 1.0]]
    ours = with_rewards(make_trainer("GRPO", flashpo.trl), rewards)
    batch = generated(ours)
    assert (batch["advantages"][:4] == 0).all()
    assert (batch["advantages"][4:] != 0).all()
    assert ours._metrics["train"]["frac_reward_zero_std"] == [0.5]
    assert list(ours._logs["advantages"]) == batch["advantages"][-4:].tolist()  # it keeps as many as a step has rows


def test_one_generation_of_a_prompt_in_evaluation():
    """It is compared with none: TRL counts its group as one of equal rewards."""
    rows = DATA["GRPO"][:4]
    settings = dict(num_generations_eval=1, per_device_eval_batch_size=4, eval_strategy="steps", eval_steps=1)
    found = []
    for package in (trl, flashpo.trl):
        trainer = make_trainer("GRPO", package, eval_dataset=Dataset.from_list(rows), **settings)
        found.append(trainer.evaluate()["eval_frac_reward_zero_std"])
    assert found == [1.0, 1.0]


def test_groups_by_columns():
    """Rewards of two agents that answered one prompt are compared with their own kind alone."""
    rewards = [[1.0, 2.0, 10.0, 30.0, 5.0, 6.0, 7.0, 9.0]]
    trainer = with_rewards(make_trainer("GRPO", flashpo.trl, group_by="agent", scale_rewards="none"), rewards)
    batch = generated(trainer, agent=["a", "a", "b", "b"] * 2)
    assert batch["advantages"].tolist() == [-0.5, 0.5, -10, 10, -0.5, 0.5, -1, 1]
    with pytest.raises(ValueError, match=r"columns \['agent'\]"):
        generated(with_rewards(trainer, rewards))


AGENTS = ["planner", "worker", "worker", "planner"] * 2
TURNS = [0, 1, 1, 0, 0, 1, 2, 0]  # the second prompt's workers are alone in their turns


def two_agents(prompts: list[str], trainer) -> dict:
    """A rollout function."""
    ids = [[5 + i, 6 + 2 * i % 7, *[9] * (i % 3), 1] for i in range(len(prompts))]
    logprobs = [[-1.0] * len(x) for x in ids]
    prompt_ids = trainer.processing_class(prompts)["input_ids"]
    return dict(prompt_ids=prompt_ids, completion_ids=ids, logprobs=logprobs, agent=AGENTS, turn=TURNS)


def test_groups_by_fields_of_a_rollout_function():
    """A step of training through TRL's own `rollout_func`: rewards are compared within prompt, agent and turn."""
    seen: dict[str, list] = {}

    class Seen(GRPOTrainer):
        def compute_advantages(self, rewards, group, inputs, batch):
            seen["prompt"] = [row["prompt"] for row in inputs]
            seen["reward"] = rewards[:, 0].tolist()
            seen["advantage"] = super().compute_advantages(rewards, group, inputs, batch)
            return seen["advantage"]

    def reward(completion_ids, agent, turn, **kwargs):  # TRL hands them to rewards, too
        assert (agent, turn) == (AGENTS, TURNS)
        return [sum(ids) % 7 + (10.0 if who == "worker" else 0.0) for ids, who in zip(completion_ids, agent)]

    options = dict(group_by=["agent", "turn"], per_device_train_batch_size=8, reward_funcs=reward)
    trainer = make_trainer("GRPO", flashpo.trl, rollout_func=two_agents, **options)
    trainer.__class__ = Seen
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    groups: dict[tuple, list[int]] = {}
    for i, key in enumerate(zip(seen["prompt"], AGENTS, TURNS)):
        groups.setdefault(key, []).append(i)
    assert sorted(map(len, groups.values())) == [1, 1, 2, 2, 2]
    expected = torch.zeros(8)
    for rows in groups.values():
        r = torch.tensor([seen["reward"][i] for i in rows])
        if len(rows) > 1:
            expected[rows] = (r - r.mean()) / (r.std() + 1e-4)
    assert (expected != 0).sum() == 6
    torch.testing.assert_close(seen["advantage"], expected)
    assert any(g.abs().max() > 0 for g in recorder.gradients[0].values())


def test_advantages_of_tokens():
    """A trainer that gives credit by token."""

    class LateCredit(GRPOTrainer):
        def compute_advantages(self, rewards, group, inputs, batch):
            whole = super().compute_advantages(rewards, group, inputs, batch)
            mask = batch["completion_mask"]
            return whole[:, None] * mask.cumsum(1) / mask.sum(1, keepdim=True)

    trainer = make_trainer("GRPO", flashpo.trl)
    trainer.__class__ = LateCredit
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    assert any(g.abs().max() > 0 for g in recorder.gradients[0].values())


def test_dynamic_sampling_replaces_degenerate_groups():
    """Round 1 replaces one group of two, round 2 the other; padding grows; the loss's normaliser counts anew."""
    rewards = [[0.5] * 8, [0.5] * 4 + [0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]]
    trainer = with_rewards(make_trainer("GRPO", flashpo.trl, dynamic_sampling=3, beta=0.04, num_iterations=2), rewards)
    batch = generated(trainer)
    assert (batch["advantages"] != 0).all()
    counts = {n.removeprefix("dynamic_sampling/"): v for n, v in trainer._metrics["train"].items() if "dynamic" in n}
    assert counts == {"degenerate": [2.0], "generated": [3.0], "replaced": [2.0], "left": [0.0]}
    assert batch["num_items_in_batch"] == batch["completion_mask"].sum()
    assert {len(x) for x in batch.values() if isinstance(x, torch.Tensor) and x.dim()} == {8}
    width = batch["completion_ids"].shape[1]
    assert batch["old_per_token_logps"].shape == batch["ref_per_token_logps"].shape == (8, width)
    # the rows are whole: scoring them again gives the log-probs that came with them
    with torch.no_grad(), flashpo.trl.patched():
        again = trainer._score(trainer.model, batch)[0]
    mask = batch["completion_mask"].bool()
    torch.testing.assert_close(again[mask], batch["old_per_token_logps"][mask], atol=1e-4, rtol=1e-4)


def test_dynamic_sampling_is_bounded():
    rewards = [[0.5] * 8] * 3
    trainer = with_rewards(make_trainer("GRPO", flashpo.trl, dynamic_sampling=2), rewards)
    batch = generated(trainer)
    assert (batch["advantages"] == 0).all()
    assert trainer._metrics["train"]["dynamic_sampling/left"] == [2.0]
    assert trainer._metrics["train"]["dynamic_sampling/generated"] == [4.0]


def test_dynamic_sampling_needs_whole_groups():
    trainer = make_trainer("GRPO", flashpo.trl, dynamic_sampling=1)
    with pytest.raises(ValueError, match="6 completions a process are no multiple of num_generations=4"):
        replace_degenerate(trainer, {}, torch.zeros(6, dtype=torch.bool), lambda rows: None)


def test_dynamic_sampling_trains():
    steps = train(make_trainer("GRPO", flashpo.trl, dynamic_sampling=1, max_steps=2))
    assert steps[0].metrics["dynamic_sampling/degenerate"] == 0


def test_metrics_are_read_when_they_are_logged():
    """Until then statistics stay on the device, for which nothing has to wait."""
    trainer = make_trainer("GRPO", flashpo.trl)
    batch = generated(trainer)
    trainer._metrics["train"].clear()
    with flashpo.trl.patched():
        trainer._compute_loss(trainer.model, batch)
    assert not trainer._metrics["train"]
    trainer.flush_metrics()
    assert trainer._metrics["train"]["entropy"]
