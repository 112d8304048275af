"""examples/agents.py: the rewards of each agent, whose turns train which adapter, and a short run of the script."""

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
PLANS, RESULTS = 4, 3


def rewards(plan: str, *results: str) -> list[float]:
    planned, *worked = (agents.Turn(0, [], agents.TOKENIZER(text)["input_ids"], []) for text in (plan, *results))
    agents.reward("13", planned, worked)
    return [turn.reward for turn in (planned, *worked)]


def test_the_planner_is_rewarded_for_the_results_and_the_worker_for_the_plan():
    assert rewards("7+6=", "13") == [1, 1]
    assert rewards("8+6=", "14") == [0, 1]
    assert rewards("8+6=", "13", "14", "13", "1") == [0.5, 0, 1, 0, 0]
    assert rewards("7+6=", "") == [0, 0]
    assert rewards("7,6=", "13") == pytest.approx([1, float("nan")], nan_ok=True)


@pytest.fixture(scope="module")
def conversations():
    torch.manual_seed(0)
    model, parameters = agents.two_agents(agents.arithmetic.model(vocab_size=16, hidden_size=32, layers=1))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # else every adapter is the base
            torch.nn.init.normal_(parameter, std=0.3)
    engine = agents.RolloutEngine(model, fallback="error", check=False)
    turns = agents.rollout(engine, problems=5, plans=PLANS, results=RESULTS, rng=random.Random(0))
    for agent in agents.AGENTS:
        for i, turn in enumerate(turns[agent]):
            turn.reward = float(i % 3)
    return model, parameters, turns


def test_turns_branch_off_those_before(conversations):
    planned, worked = (conversations[2][agent] for agent in agents.AGENTS)
    assert [turn.conversation for turn in planned] == [i for i in range(5) for _ in range(PLANS)]
    assert [turn.conversation for turn in worked] == [i for i in range(5 * PLANS) for _ in range(RESULTS)]
    assert all(len(turn.before) == 6 for turn in planned)
    assert all(turn.before == planned[turn.conversation].before + planned[turn.conversation].tokens for turn in worked)


def test_each_agent_speaks_by_its_own_adapter(conversations):
    """Its log-probs are those of its adapter on the whole conversation, whatever the other one has computed of it."""
    model, _, turns = conversations
    model.eval()
    for agent in agents.AGENTS:
        model.set_adapter(agent)
        for turn in turns[agent]:
            with torch.no_grad():
                logits = model(torch.tensor([turn.before + turn.tokens])).logits[0, len(turn.before) - 1 : -1]
            exact = logits.log_softmax(-1).gather(1, torch.tensor(turn.tokens)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(turn.logprobs), exact, atol=1e-5, rtol=0)


@pytest.mark.parametrize("agent", agents.AGENTS)
def test_an_agent_learns_by_its_own_turns_and_in_its_own_adapter(conversations, agent, monkeypatch):
    model, parameters, turns = conversations
    before = {name: p.clone() for name, p in model.named_parameters()}
    seen, tokens, policy_loss = [], [], flashpo.policy_loss

    def watched(logprob, old, advantage, mask, **options):
        logprob.retain_grad()
        seen.append((logprob, old, advantage, mask))
        return policy_loss(logprob, old, advantage, mask, **options)

    monkeypatch.setattr(flashpo, "policy_loss", watched)
    flashpo.packing.prepare(model)  # what compares trees with padded rows, before the forwards are counted
    hook = model.get_base_model().model.register_forward_pre_hook(
        lambda module, args, inputs: tokens.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    optimizer = torch.optim.SGD(parameters[agent], lr=0.1)
    agents.learn(model, agent, optimizer, turns[agent], updates=2, kl_coef=0.1)
    hook.remove()
    assert len(seen) == 2
    torch.testing.assert_close(seen[0][0][seen[0][3]], seen[0][1][seen[0][3]], atol=1e-5, rtol=0)  # still on policy
    for logprob, _, advantage, mask in seen:
        for row, own, turn in zip(logprob.grad, mask, turns[agent], strict=True):
            start, stop = len(turn.before), len(turn.before) + len(turn.tokens)
            assert own.nonzero()[:, 0].tolist() == list(range(start, stop))
            assert row[own].any()
            assert not row[~own].any()
        size = PLANS if agent == "planner" else RESULTS
        earned = torch.tensor([turn.reward for turn in turns[agent]]).view(-1, size)
        expected = (earned - earned.mean(1, keepdim=True)) / (earned.std(1, keepdim=True) + 1e-4)
        torch.testing.assert_close(advantage, expected.flatten())
    assert len(tokens) == 3
    assert max(tokens) < sum(len(turn.before + turn.tokens) - 1 for turn in turns[agent])  # a tree
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(f"lora_A.{agent}." in name or f"lora_B.{agent}." in name for name in changed)
    assert all(p.grad is None for name, p in model.named_parameters() if "lora" not in name)


def test_both_agents_improve(capsys):
    assert agents.main(["--warm-start-steps", "250", "--steps", "20", "--problems", "24", "--margin", "0.05"]) == 0
    assert "planner's reward rose by" in capsys.readouterr().out
