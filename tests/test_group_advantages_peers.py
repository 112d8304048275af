"""Conventions of group_advantages against TRL's own trainers and against the published formulas of verl and OpenRLHF.

The exact value is the peer's computation in float64, and the yardstick is the peer's own error in float32.
`test_equal_rewards` shows what each peer computes for a group whose rewards are equal.
"""

import pytest
import torch
from accuracy import assert_as_accurate
from advantage_inputs import batch, combine, members

from flashpo import group_advantages

GDPO = "normalize_then_sum"


@pytest.fixture(scope="module")
def trainers():
    trl = pytest.importorskip("trl")
    from trl_models import make_trainer

    return {name: make_trainer(name, trl, max_completion_length=2, beta=0.0) for name in ("GRPO", "RLOO")}


def of_trl(trainer, rewards, generations, weights, **attributes):
    """What TRL's own `_generate_and_score_completions` makes of these rewards: rows of a group stand together."""
    from trl_models import PROMPTS

    rows, functions = rewards.shape
    trainer.reward_funcs = trainer.reward_func_names = [f"function {k}" for k in range(functions)]
    trainer.reward_weights = torch.tensor(weights)
    trainer.num_generations = trainer.num_generations_eval = generations
    trainer._calculate_rewards = lambda *_: rewards.clone()
    for name, value in attributes.items():
        assert hasattr(trainer, name)
        setattr(trainer, name, value)
    prompts = [{"prompt": PROMPTS[i // generations % len(PROMPTS)]} for i in range(rows)]
    return trainer._generate_and_score_completions(prompts)["advantages"]


def check_trl(trainer, rewards, generations, attributes, **options):
    group = torch.arange(len(rewards)) // generations * 1001 - 7
    weights = [1.0, 0.25, 2.0][: rewards.shape[1]]
    exact = of_trl(trainer, rewards.double(), generations, weights, **attributes)
    trls = of_trl(trainer, rewards, generations, weights, **attributes)
    ours = group_advantages(rewards, group, reward_weights=weights, **options).advantage
    assert (exact != 0).any()
    assert_as_accurate(ours, exact, trls)
    order = torch.randperm(len(rewards))
    shuffled = group_advantages(rewards[order], group[order], reward_weights=weights, **options).advantage
    assert torch.equal(shuffled, ours[order])


# NaN: none, some functions of some rows, and (the first groups) one scorable row and none
def scored(rows, functions, generations, nan):
    rewards = batch(rows, 1, functions, nan)[0]
    if nan:
        rewards[1:generations] = torch.nan
        rewards[generations : 2 * generations] = torch.nan
    return rewards


@pytest.mark.parametrize("nan", [0.0, 0.35])
@pytest.mark.parametrize(("functions", "generations"), [(1, 2), (1, 7), (3, 4)])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_trl_grpo(trainers, scale, functions, generations, nan):
    rewards = scored(6 * generations, functions, generations, nan)
    attributes = {"scale_rewards": scale, "multi_objective_aggregation": "sum_then_normalize"}
    check_trl(trainers["GRPO"], rewards, generations, attributes, scale=scale)


@pytest.mark.parametrize("nan", [0.0, 0.35])
@pytest.mark.parametrize(("functions", "generations"), [(1, 5), (2, 8), (3, 4)])
def test_trl_gdpo(trainers, functions, generations, nan):
    rewards = scored(6 * generations, functions, generations, nan)
    check_trl(trainers["GRPO"], rewards, generations, {"multi_objective_aggregation": GDPO}, aggregation=GDPO)


@pytest.mark.parametrize("nan", [0.0, 0.35])
@pytest.mark.parametrize(("functions", "generations"), [(1, 2), (1, 7), (3, 4)])
def test_trl_rloo(trainers, functions, generations, nan):
    rewards = scored(6 * generations, functions, generations, nan)
    attributes = {"normalize_advantages": False}
    check_trl(trainers["RLOO"], rewards, generations, attributes, baseline="leave_one_out", scale="none")


def test_trl_groups_of_one(trainers):
    """As in evaluation with one generation."""
    rewards = torch.randn(6, 1)
    group = torch.arange(6)
    grpo, rloo = trainers["GRPO"], trainers["RLOO"]
    for scale in ("group", "none"):
        attributes = {"scale_rewards": scale, "multi_objective_aggregation": "sum_then_normalize"}
        assert (of_trl(grpo, rewards, 1, [1.0], **attributes) == 0).all()
        assert (group_advantages(rewards, group, scale=scale).advantage == 0).all()
    assert (of_trl(rloo, rewards, 1, [1.0]) == 0).all()
    assert (group_advantages(rewards, group, baseline="leave_one_out").advantage == 0).all()


def verl(x, group, estimator, lengths):
    """verl 0.5's outcome estimators (core_algos.py), a group of one included; x in any float dtype."""
    out = torch.empty_like(x)
    for rows in members(group):
        r, n = x[rows], len(rows)
        mean = r.mean() if n > 1 else r.new_zeros(())
        std = r.std() if n > 1 else r.new_ones(())
        if estimator == "grpo":
            out[rows] = (r - mean) / (std + 1e-6)
        elif estimator == "dr_grpo":
            out[rows] = r - mean
        elif estimator == "rloo":
            out[rows] = r * n / (n - 1) - mean * n / (n - 1) if n > 1 else r
        elif estimator == "opo":
            w = lengths[rows]
            out[rows] = r - (w * r).sum() / w.sum() if n > 1 else r
        elif estimator == "grpo_passk":  # raises for a group of one: there the best is not ahead of anything
            best, second = r.topk(2).values if n > 1 else (r[0], r[0])
            out[rows] = torch.zeros_like(r)
            out[rows[int(r.argmax())]] = (best - second) / ((r.std() if n > 1 else std) + 1e-6)
    return out


def masked_whiten(x, lengths):
    """verl's, of values that are the same for each of a row's tokens."""
    tokens = lengths.sum()
    mean = (lengths * x).sum() / (tokens + 1e-8)
    variance = (lengths * (x - mean) ** 2).sum() / (tokens + 1e-8) * tokens / (tokens - 1)
    return (x - mean) * (variance + 1e-8).rsqrt()


VERL = {
    "grpo": {},
    "dr_grpo": {"scale": "none"},
    "rloo": {"baseline": "leave_one_out", "scale": "none"},
    "opo": {"scale": "none"},
    "grpo_passk": {"baseline": "second_best"},
}


@pytest.mark.parametrize("estimator", VERL)
def test_verl(estimator):
    rewards, group, lengths = batch(300, 40)
    assert 1 in map(len, members(group))
    x = rewards[:, 0]
    options = VERL[estimator] | ({"lengths": lengths} if estimator == "opo" else {})
    ours = group_advantages(rewards, group, convention="verl", **options).advantage
    assert_as_accurate(ours, verl(x.double(), group, estimator, lengths), verl(x, group, estimator, lengths))


def test_verl_gdpo():
    rewards, group, lengths = batch(300, 40, 3)
    weights = [1.0, 0.5, 2.0]

    def gdpo(x):
        parts = [w * verl(x[:, k], group, "grpo", lengths) for k, w in enumerate(weights)]
        return masked_whiten(sum(parts), lengths)

    options = {"aggregation": GDPO, "convention": "verl", "lengths": lengths}
    ours = group_advantages(rewards, group, reward_weights=weights, **options).advantage
    assert_as_accurate(ours, gdpo(rewards.double()), gdpo(rewards))


def test_verl_reinforce_plus_plus():
    """Its whitening over tokens is one group of all rows; only eps stands beside the deviation, not in its square."""
    rewards, group, lengths = batch(300, 40)
    ours = group_advantages(rewards, torch.zeros_like(group), convention="verl", lengths=lengths).advantage
    torch.testing.assert_close(ours, masked_whiten(rewards[:, 0], lengths), rtol=1e-5, atol=1e-5)


def openrlhf(x, generations, estimator):
    """experience_maker.py; groups of one size."""
    r = x.view(-1, generations)
    if estimator == "rloo":
        return (r - (r.sum(-1, keepdim=True) - r) / (generations - 1)).view(-1)
    above = r - r.mean(-1, keepdim=True)
    return (above / (r.std(-1, keepdim=True) + 1e-9) if estimator == "group_norm" else above).view(-1)


OPENRLHF = {
    "group_norm": {},
    "dr_grpo": {"scale": "none"},
    "rloo": {"baseline": "leave_one_out", "scale": "none"},
}


@pytest.mark.parametrize("estimator", OPENRLHF)
@pytest.mark.parametrize("generations", [2, 5, 16])
def test_openrlhf(estimator, generations):
    x = torch.randn(12 * generations)
    group = torch.arange(len(x)) // generations
    ours = group_advantages(x, group, convention="openrlhf", **OPENRLHF[estimator]).advantage
    assert_as_accurate(ours, openrlhf(x.double(), generations, estimator), openrlhf(x, generations, estimator))


def test_a_group_of_one_in_openrlhf():
    """Where its formula has no value, 0."""
    assert openrlhf(torch.ones(3), 1, "group_norm").isnan().all()
    ours = group_advantages(torch.ones(3), torch.arange(3), convention="openrlhf")
    assert (ours.advantage == 0).all()
    assert ours.degenerate.all()


# of each peer's error, a lower bound: what they are exactly depends on how torch's sums round on this machine
LEAST_ERROR = {"trl": 1e-4, "verl": 1e-2, "openrlhf": 0.5}


def test_equal_rewards(trainers):
    """Rewards that binary fractions cannot hold: each peer moves the policy by its rounding error, we by exactly 0."""
    worst = dict.fromkeys(LEAST_ERROR, 0.0)
    attributes = {"scale_rewards": "group", "multi_objective_aggregation": "sum_then_normalize"}
    for value in (0.3, 0.7, 0.9, 1 / 3):
        for generations in (3, 5, 6, 7, 8, 10, 12, 16, 24):
            x, group = torch.full((generations,), value), torch.zeros(generations, dtype=torch.long)
            peers = {
                "trl": of_trl(trainers["GRPO"], x[:, None], generations, [1.0], **attributes),
                "verl": verl(x, group, "grpo", None),
                "openrlhf": openrlhf(x, generations, "group_norm"),
            }
            for convention, theirs in peers.items():
                worst[convention] = max(worst[convention], theirs.abs().max().item())
                ours = group_advantages(x, group, convention=convention)
                assert (ours.advantage == 0).all()
                assert ours.degenerate.all()
    for convention, least in LEAST_ERROR.items():
        assert worst[convention] > least, worst


def test_combine_is_trls_sum(trainers):
    """The helper that the other tests take their exact values from."""
    rewards = scored(24, 3, 4, 0.35).double()
    weights = [1.0, 0.25, 2.0]
    attributes = {"scale_rewards": "none", "multi_objective_aggregation": "sum_then_normalize"}
    x = combine(rewards, weights).view(-1, 4)
    expected = (x - x.nanmean(1, keepdim=True)).nan_to_num(0.0).view(-1)
    torch.testing.assert_close(of_trl(trainers["GRPO"], rewards, 4, weights, **attributes), expected)
