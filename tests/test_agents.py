"""examples/agents.py: who is rewarded for what, whose tokens train whose adapter, and a short run of the whole."""

import random
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
import flashpo

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import agents

sys.path.pop(0)


def rewards(plan: str, result: str) -> list[float]:
    prompt, *said = (agents.TOKENIZER(text)["input_ids"] for text in ("3+4+6=", plan, result))
    trajectory = agents.Trajectory(0, 13, prompt)
    for number, (agent, tokens) in enumerate(zip(agents.AGENTS, said)):
        start = len(trajectory.tokens)
        trajectory.tokens += tokens
        trajectory.turns.append(agents.Turn(agent, number, start, start + len(tokens)))
    agents.reward(trajectory)
    return [turn.reward for turn in trajectory.turns]


def test_the_planner_is_rewarded_for_the_result_and_the_worker_for_the_plan():
    assert rewards("7+6=", "13") == [1, 1]
    assert rewards("8+6=", "14") == [0, 1]
    assert rewards("8+6=", "13") == [1, 0]
    assert rewards("7+6=", "") == [0, 0]
    assert rewards("7,6=", "13") == pytest.approx([1, float("nan")], nan_ok=True)


@pytest.fixture(scope="module")
def conversations():
    model, parameters = agents.two_agents(agents.arithmetic.model(vocab_size=16, hidden_size=32, layers=1))
    trajectories = agents.rollout(model, problems=4, samples=4, rng=random.Random(0))
    for i, trajectory in enumerate(trajectories):
        for turn in trajectory.turns:
            turn.reward = float(i % 3)
    return model, parameters, trajectories


def said_by(agent: str, trajectories, shape) -> torch.Tensor:
    """Which next tokens are the agent's."""
    said = torch.zeros(shape, dtype=torch.bool)
    for row, trajectory in zip(said, trajectories):
        for turn in trajectory.turns:
            row[turn.start - 1 : turn.stop - 1] |= turn.agent == agent
    return said


def test_turns_follow_one_another(conversations):
    for trajectory in conversations[2]:
        planner, worker = trajectory.turns
        assert (planner.agent, planner.number, worker.agent, worker.number) == ("planner", 0, "worker", 1)
        assert 6 == planner.start < planner.stop == worker.start < worker.stop == len(trajectory.tokens)


def test_advantages_compare_one_agents_turns_on_one_problem(conversations):
    trajectories = conversations[2]
    tokens, _ = agents.padded([t.tokens for t in trajectories])
    advantage, own = agents.advantages(trajectories, tokens)
    for number, agent in enumerate(agents.AGENTS):
        assert torch.equal(own[agent], said_by(agent, trajectories, advantage.shape))
        for first in range(0, 16, 4):
            group = trajectories[first : first + 4]
            earned = torch.tensor([t.turns[number].reward for t in group])
            expected = (earned - earned.mean()) / (earned.std() + 1e-4)
            at = [t.turns[number].start - 1 for t in group]
            torch.testing.assert_close(advantage[range(first, first + 4), at], expected)


@pytest.mark.parametrize("agent", agents.AGENTS)
def test_an_agent_learns_by_its_own_tokens_and_in_its_own_adapter(conversations, agent, monkeypatch):
    model, parameters, trajectories = conversations
    before = {name: p.clone() for name, p in model.named_parameters()}
    seen, policy_loss = [], flashpo.policy_loss

    def watched(logprob, *rest, **options):
        logprob.retain_grad()
        seen.append(logprob)
        return policy_loss(logprob, *rest, **options)

    monkeypatch.setattr(flashpo, "policy_loss", watched)
    optimizer = torch.optim.SGD(parameters[agent], lr=0.1)
    agents.learn(model, agent, optimizer, trajectories, updates=2, kl_coef=0.1)
    assert len(seen) == 2
    for logprob in seen:
        own = said_by(agent, trajectories, logprob.shape)
        assert logprob.grad[own].any()
        assert not logprob.grad[~own].any()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(f"lora_A.{agent}." in name or f"lora_B.{agent}." in name for name in changed)
    assert all(p.grad is None for name, p in model.named_parameters() if "lora" not in name)


def test_both_agents_improve(capsys):
    assert agents.main(["--warm-start-steps", "250", "--steps", "20", "--problems", "24", "--margin", "0.05"]) == 0
    assert "planner's reward rose by" in capsys.readouterr().out


def test_too_little_progress_fails():
    assert agents.main(["--warm-start-steps", "1", "--steps", "1", "--problems", "2"]) == 1
