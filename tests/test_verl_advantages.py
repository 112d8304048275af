"""Our advantage estimators against verl's code, on live tokens only: verl leaves other values at masked tokens."""

import itertools

import numpy as np
import pytest
import torch
from accuracy import assert_as_accurate
from verl_peer import AlgoConfig, core, ragged_mask

import flashpo
from flashpo.verl import advantages

DRAWS = 4


def batch(sequences=23, tokens=19, groups=5):
    """(token_level_rewards, values, mask, index): ragged groups of string labels, one of them a group of one."""
    mask = ragged_mask(sequences, tokens)
    rewards = torch.zeros(sequences, tokens, dtype=torch.float64)
    last = tokens - 1 - mask.int().flip(-1).argmax(-1)
    rewards[torch.arange(sequences), last] = torch.randn(sequences, dtype=torch.float64)
    rewards[mask] += 0.05 * torch.randn(int(mask.sum()), dtype=torch.float64)  # a KL penalty for each token
    numbers = torch.randint(0, groups, (sequences,))
    numbers[0] = groups  # alone; the sequence without live tokens, 1, is not
    numbers[1 : 1 + 2 * groups] = torch.arange(2 * groups) % groups
    index = np.array([f"prompt-{n}" for n in numbers.tolist()], dtype=object)
    return rewards, torch.randn_like(rewards), mask, index


def assert_same(ours, theirs, draws):
    """`ours` in fp32 errs no more than `theirs` does, against `theirs` in fp64, at live tokens."""
    runs = []
    for fn, dtype in ((ours, torch.float32), (theirs, torch.float64), (theirs, torch.float32)):
        # verl's functions write over what they are given, and multiply by masks
        results = [fn(*(x.to(dtype) for x in (r, v, m)), i) for r, v, m, i in draws]
        runs.append([torch.cat([x[part][d[2]] for x, d in zip(results, draws)]) for part in (0, 1)])
    for part in (0, 1):
        assert_as_accurate(*(run[part] for run in runs))


# name -> what verl's compute_advantage hands it besides rewards and mask
EXTRA = {
    "grpo": ("index",),
    "grpo_vectorized": ("index",),
    "rloo": ("index",),
    "rloo_vectorized": ("index",),
    "opo": ("index",),
    "gpg": ("index",),
    "gdpo": ("index",),
    "reinforce_plus_plus": (),
    "reinforce_plus_plus_baseline": ("index",),
    "remax": ("reward_baselines",),
}


@pytest.mark.parametrize("name", EXTRA)
def test_same_as_verl(name):
    config = AlgoConfig(gamma=0.97)

    def run(fn):
        def of(rewards, values, mask, index):
            known = {"index": index, "reward_baselines": values[:, 0]}
            return fn(rewards, response_mask=mask, config=config, **{key: known[key] for key in EXTRA[name]})

        return of

    draws = [batch() for _ in range(DRAWS)]
    assert_same(run(advantages.ADV_ESTIMATORS[name]), run(core.get_adv_estimator_fn(name)), draws)


@pytest.mark.parametrize("by_std", [True, False])
@pytest.mark.parametrize("name", ["grpo", "grpo_vectorized", "gdpo", "grpo_passk"])
def test_with_and_without_standard_deviation(name, by_std):
    config = AlgoConfig(norm_adv_by_std_in_grpo=by_std)

    def run(fn):
        return lambda rewards, values, mask, index: fn(
            rewards, response_mask=mask, index=index, norm_adv_by_std_in_grpo=by_std, config=config
        )

    draws = [batch() for _ in range(DRAWS)]
    for *_, index in draws if name == "grpo_passk" else []:
        index[0] = index[3]  # it refuses a group of one
    assert_same(run(advantages.ADV_ESTIMATORS[name]), run(core.get_adv_estimator_fn(name)), draws)


@pytest.mark.parametrize("weights", [None, [0.5, 2.0]])
@pytest.mark.parametrize("by_std", [True, False])
def test_gdpo_of_several_rewards(by_std, weights):
    """verl puts each reward at the last token of its row, found by the attention mask."""
    config = AlgoConfig(gdpo_reward_keys=["format", "accuracy"], gdpo_reward_weights=weights)
    draws = [batch() for _ in range(DRAWS)]
    rewards = [{name: np.random.default_rng(7).normal(size=23) for name in ("format", "accuracy")} for _ in draws]

    def run(fn):
        singles = itertools.cycle(rewards)

        def of(token_level_rewards, values, mask, index):
            tensors = {"prompts": torch.zeros(23, 3), "attention_mask": torch.ones(23, 3 + 19, dtype=torch.long)}
            return fn(
                token_level_rewards, mask, index, norm_adv_by_std_in_grpo=by_std, config=config,
                non_tensor_batch=next(singles), batch=tensors,
            )  # fmt: skip

        return of

    assert_same(run(advantages.gdpo), run(core.compute_gdpo_outcome_advantage), draws)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0)])
def test_gae(gamma, lam):
    """With observation tokens inside. Both forms: as verl calls it, and `flashpo.gae` itself."""
    draws = [batch() for _ in range(DRAWS)]

    def ours(rewards, values, mask, index):
        return advantages.gae(rewards, values, mask, gamma, lam)

    def direct(rewards, values, mask, index):
        return flashpo.gae(rewards, values, mask.bool(), gamma=gamma, lam=lam, whiten=True)

    def theirs(rewards, values, mask, index):
        return core.compute_gae_advantage_return(rewards, values, mask, gamma, lam)

    assert_same(ours, theirs, draws)
    assert_same(direct, theirs, draws)


DIRECT = {
    "grpo": {},
    "grpo_vectorized": {},
    "rloo": {"baseline": "leave_one_out", "scale": "none"},
    "rloo_vectorized": {"baseline": "leave_one_out", "scale": "none", "convention": "trl"},  # which has no singletons
    "opo": {"scale": "none", "lengths": True},
    "gdpo": {"aggregation": "normalize_then_sum", "lengths": True},
    "grpo_passk": {"baseline": "second_best"},
}


@pytest.mark.parametrize("name", DIRECT)
def test_group_advantages(name):
    """`flashpo.group_advantages(convention="verl")` itself, on a reward for each row."""
    options = {"convention": "verl", **DIRECT[name]}
    weighed = options.pop("lengths", False)

    def ours(rewards, values, mask, index):
        lengths = mask.sum(-1).long() if weighed else None
        group = advantages.keys(index, rewards)
        result = flashpo.group_advantages(rewards.sum(-1), group, lengths=lengths, **options)
        return advantages.spread(result.advantage, mask)

    def theirs(rewards, values, mask, index):
        return core.get_adv_estimator_fn(name)(rewards, mask, index=index, config=AlgoConfig())

    draws = [batch() for _ in range(DRAWS)]
    for _, _, mask, index in draws:
        mask[1, 0] = True  # lengths are positive
        if name == "grpo_passk":
            index[0] = index[3]
    assert_same(ours, theirs, draws)


def run(fn, scores, index, mask=None, **options):
    """Advantage of each row's first token, for a reward at the last one."""
    rewards = torch.zeros(len(scores), 4)
    rewards[:, -1] = torch.tensor(scores)
    mask = torch.ones(len(scores), 4) if mask is None else mask
    return fn(rewards, response_mask=mask, index=np.array(index), **options)[0][:, 0]


def test_equal_rewards_give_exactly_0():
    """In verl the mean is rounded, and its rounding divided by almost nothing: up to 0.1."""
    groups = [([reward] * n, [0] * n) for reward in (0.3, 0.7, 0.9, 1 / 3) for n in range(2, 17)]
    for name in ("grpo", "grpo_vectorized", "rloo", "rloo_vectorized", "opo", "gpg"):
        assert not any(run(advantages.ADV_ESTIMATORS[name], *group).any() for group in groups), name
    assert max(run(core.compute_grpo_outcome_advantage, *group).abs().max() for group in groups) > 0.01


def test_a_group_of_one():
    """verl's forms disagree: GRPO and the loop of RLOO leave the reward, vectorised RLOO gives 0. So do ours."""
    scores, index = [2.0, 1.0, 3.0], ["a", "b", "b"]
    for name in ("grpo", "grpo_vectorized", "rloo", "rloo_vectorized"):
        expected = pytest.approx(0.0 if name == "rloo_vectorized" else 2.0, rel=1e-5)
        for fn in (advantages.ADV_ESTIMATORS[name], core.get_adv_estimator_fn(name)):
            assert run(fn, scores, index)[0] == expected
    for fn in (advantages.grpo_passk, core.compute_grpo_passk_outcome_advantage):
        with pytest.raises(ValueError, match="at least 2 samples"):
            run(fn, scores, index, config=AlgoConfig())


def test_a_reward_that_is_nan():
    """verl: the whole group is NaN. Here: the row has advantage 0, its siblings theirs without it."""
    scores, index = [1.0, torch.nan, 3.0, 2.0], [0, 0, 0, 1]
    for name in ("grpo", "grpo_vectorized", "rloo", "opo", "gpg"):
        theirs = run(core.get_adv_estimator_fn(name), scores, index)
        assert theirs[:3].isnan().all(), name
        ours = run(advantages.ADV_ESTIMATORS[name], scores, index)
        assert ours.isfinite().all()
        assert ours[1] == 0
        without = run(advantages.ADV_ESTIMATORS[name], [1.0, 3.0, 2.0], [0, 0, 1])
        assert torch.equal(ours[[0, 2, 3]], without)


def test_whitening_of_one_token_or_none():
    rewards, values = torch.randn(2, 3), torch.randn(2, 3)
    for live in (0, 1):
        mask = torch.zeros(2, 3)
        mask[0, :live] = 1
        with pytest.raises(ValueError, match="mask"):
            core.compute_gae_advantage_return(rewards, values, mask, 1.0, 1.0)
        result = advantages.gae(rewards, values, mask, 1.0, 1.0)[0]
        assert torch.equal(result, torch.zeros(2, 3))
        assert not advantages.reinforce_plus_plus_baseline(rewards, mask, [0, 0])[0].any()


def test_nan_where_the_mask_is_0():
    """A critic's value at a padding token: verl multiplies it by the mask, and the sequence before it is NaN."""
    rewards, values, mask, _ = (x.float() if isinstance(x, torch.Tensor) else x for x in batch())
    values = values.masked_fill(mask == 0, torch.nan)
    assert core.compute_gae_advantage_return(rewards, values, mask, 1.0, 0.95)[0].isnan().any()
    assert torch.stack(advantages.gae(rewards, values, mask, 1.0, 0.95)).isfinite().all()


def test_rows_without_live_tokens():
    """They weigh nothing in OPO's baseline, which is 0 / 0 in verl for a group of nothing else."""
    mask = torch.tensor([[0.0] * 4, [0.0] * 4, [1.0] * 4, [1.0] * 4, [0.0] * 4, [1.0] * 4])
    scores, index = [1.0, 2.0, 3.0, 5.0, 7.0, 6.0], [0, 0, 1, 1, 2, 2]
    theirs = run(core.compute_opo_outcome_advantage, scores, index, mask)
    assert theirs[:2].isnan().all()
    ours = run(advantages.opo, scores, index, mask)
    assert ours.tolist() == [0.0, 0.0, *theirs[2:].tolist()] == [0.0, 0.0, -1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("message", "name", "options"),
    [
        ("epsilon", "grpo", {"epsilon": 1e-4}),
        ("epsilon", "gdpo", {"epsilon": 1e-4}),
        ("config", "grpo_passk", {}),
        ("config", "reinforce_plus_plus", {}),
        ("flashpo.verl.replace", "gdpo", {"config": AlgoConfig(gdpo_reward_keys=["a"])}),
        ("gdpo_reward_keys", "gdpo", {"config": AlgoConfig(), "non_tensor_batch": {}, "batch": {}}),
        ("'a'", "gdpo", {"config": AlgoConfig(gdpo_reward_keys=["a"]), "non_tensor_batch": {}, "batch": {}}),
        ("other than 0 and 1", "opo", {"mask": torch.full((2, 4), 0.5)}),
    ],
)
def test_what_is_refused(message, name, options):
    with pytest.raises(ValueError, match=message):
        run(advantages.ADV_ESTIMATORS[name], [1.0, 2.0], [0, 0], **options)
