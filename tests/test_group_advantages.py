"""group_advantages against a loop over groups in float64, for every option, kind of batch and backend."""

import itertools

import pytest
import torch
import torch.distributed as dist
from accuracy import assert_as_accurate
from advantage_inputs import batch, members, plain
from inputs import sanitized
from two_processes import in_two_processes, needs_gloo

import flashpo
from flashpo import Advantages, group_advantages
from flashpo.ops.group_advantages import AGGREGATIONS, BASELINES, CONVENTIONS, SCALES

GDPO = {"aggregation": "normalize_then_sum"}
COMBINATIONS = list(itertools.product(BASELINES, SCALES, CONVENTIONS))


def run(backend, *args, **options) -> Advantages:
    flashpo.stats(reset=True)
    with flashpo.backend(backend):
        out = group_advantages(*args, **options)
    assert flashpo.stats() == {"group_advantages_fwd": {backend: 1}}
    return out


def same(a: Advantages, b: Advantages) -> bool:
    return all(torch.equal(x.nan_to_num(-77), y.nan_to_num(-77)) for x, y in zip(a, b))


def check(backend, rewards, group, **options):
    out = run(backend, rewards, group, **options)
    *exact, degenerate = plain(rewards.double(), group, **options)
    *baseline, _ = plain(rewards, group, **options)
    for x, true, torchs in zip(out, exact, baseline):
        assert x.dtype == rewards.dtype
        known = ~true.isnan()
        assert torch.equal(x.isnan(), ~known)
        assert_as_accurate(x[known], true[known], torchs[known])
    assert torch.equal(out.degenerate, degenerate)


@sanitized
@pytest.mark.parametrize(("baseline", "scale", "convention"), COMBINATIONS)
@pytest.mark.usefixtures("poisoned")
def test_every_combination(backend, baseline, scale, convention):
    options = {"baseline": baseline, "scale": scale, "convention": convention}
    for rows, groups, nan in ((200, 30, 0.0), (200, 30, 0.4), (60, 60, 0.3), (77, 1, 0.1), (1, 1, 0.0), (2, 1, 1.0)):
        rewards, group, lengths = batch(rows, groups, nan=nan)
        check(backend, rewards, group, **options)
        if baseline == "mean":
            check(backend, rewards, group, lengths=lengths, **options)


@sanitized
@pytest.mark.usefixtures("poisoned")
def test_several_functions(backend):
    for functions, nan in ((2, 0.0), (3, 0.5), (7, 0.2)):
        rewards, group, _ = batch(150, 20, functions, nan)
        check(backend, rewards, group)
        check(backend, rewards, group, reward_weights=[0.5, -1.0, 2.0, 0.0, 1.0, 3.0, 0.25][:functions], scale="batch")


@sanitized
def test_of_no_rows(backend):
    for functions in ((), (3,)):
        for options in ({}, GDPO, {"scale": "batch"}):
            out = run(backend, torch.empty(0, *functions), torch.empty(0, dtype=torch.long), **options)
            assert [tuple(x.shape) for x in out] == [(0,)] * 4


@sanitized
def test_keys_of_every_pattern(backend):
    """Regular keys in the high or the low bits, and as many groups as rows."""
    rewards = torch.randn(5000)
    for keys in (torch.arange(5000), torch.arange(5000) << 32, torch.arange(5000) << 51, -torch.arange(5000) * 4096):
        for group in (keys, keys // 7 * 7, keys[torch.randperm(5000)]):
            rows = torch.unique(group, return_inverse=True)[1]
            assert same(run(backend, rewards, group), run(backend, rewards, rows))


@sanitized
def test_does_not_depend_on_the_order_of_rows(backend):
    for functions, options in ((1, {}), (1, {"scale": "batch"}), (3, GDPO), (1, {"baseline": "leave_one_out"})):
        rewards, group, _ = batch(400, 40, functions, nan=0.2)
        order = torch.randperm(400)
        shuffled = run(backend, rewards[order], group[order], **options)
        ordered = Advantages(*(x[order] for x in run(backend, rewards, group, **options)))
        if backend == "native":
            assert same(shuffled, ordered)  # fixed-point sums: to the bit
        for x, y in zip(shuffled, ordered):
            torch.testing.assert_close(x, y, equal_nan=True)


@sanitized
def test_a_group_does_not_depend_on_its_batch(backend):
    rewards, group, _ = batch(300, 25, 2, nan=0.2)
    together = run(backend, rewards, group)
    for rows in members(group):
        assert same(run(backend, rewards[rows], group[rows]), Advantages(*(x[rows] for x in together)))


@sanitized
def test_rewards_far_from_zero(backend):
    """Two passes: E[x^2] - E[x]^2 would have lost the spread, which is 1e-7 of the squares here."""
    rewards, group = 3000 + torch.randn(512, 1), torch.arange(512) // 16
    check(backend, rewards, group)
    check(backend, rewards, group, scale="batch")


@sanitized
@pytest.mark.parametrize("value", [0.3, 0.7, 0.9, 1 / 3, -0.1, 1e-30, 3e38, 16777217.0])
def test_equal_rewards_give_exactly_zero(backend, value):
    sizes = torch.arange(1, 66)
    group = torch.repeat_interleave(sizes, sizes)[torch.randperm(int(sizes.sum()))]
    rewards = torch.full((len(group),), value)
    rewards[::7] = torch.nan
    for baseline, scale in itertools.product(("mean", "leave_one_out", "second_best"), SCALES):
        out = run(backend, rewards, group, baseline=baseline, scale=scale)
        assert (out.advantage == 0).all()
        assert out.degenerate.all()
    several = torch.stack([rewards, rewards / 3, 1 - rewards / 7], 1)
    if value < 1e38:
        for options in ({}, GDPO, {"baseline": "none"}):
            out = run(backend, several, group, reward_weights=[1.0, 0.3, 0.7], **options)
            assert (out.advantage == 0).all()
            assert out.degenerate.all()


@sanitized
def test_equal_rewards_among_others(backend):
    """With a scale over the batch, too, and where the other groups do differ."""
    rewards, group, lengths = batch(300, 20, 3)
    dead = group == group[5]
    rewards[dead] = torch.tensor([0.3, 0.7, 0.9])
    for options in ({}, {"scale": "batch"}, {"scale": "none"}, GDPO, {"lengths": lengths}):
        out = run(backend, rewards, group, **options)
        assert (out.advantage[dead] == 0).all()
        assert out.degenerate[dead].all()
        counts = torch.tensor([len(set(rewards[group == key].sum(1).tolist())) for key in group.tolist()])
        assert torch.equal(out.degenerate, counts == 1)


@sanitized
def test_unscorable_rows_change_nothing(backend):
    """They get 0, and the others what they get without them."""
    rewards, group, _ = batch(200, 20, 2)
    out = run(backend, rewards, group)
    more = torch.cat([rewards, torch.full((50, 2), torch.nan)])
    keys = torch.cat([group, group[:40], torch.full((10,), 5)])
    with_them = run(backend, more, keys)
    assert same(out, Advantages(*(x[:200] for x in with_them)))
    assert (with_them.advantage[200:] == 0).all()
    assert torch.equal(with_them.mean[200:240], out.mean[:40])
    assert with_them.degenerate[240:].all()
    assert with_them.mean[240:].isnan().all()


@sanitized
def test_other_dtypes_and_strides(backend):
    rewards, group, _ = batch(100, 9, 3)
    for dtype in (torch.bfloat16, torch.float16):
        assert same(run(backend, rewards.to(dtype), group), run(backend, rewards.to(dtype).float(), group))
    wide = torch.full((100, 8), torch.nan)
    wide[:, 2:8:2] = rewards
    assert same(run(backend, wide[:, 2:8:2], torch.stack([group, group], 1)[:, 1]), run(backend, rewards, group))
    assert not run(backend, rewards.clone().requires_grad_(), group).advantage.requires_grad


def test_the_reference_takes_what_the_kernel_does_not():
    """float64 results for float64 rewards, and any number of functions; seen in stats."""
    rewards, group, _ = batch(64, 8, 65)
    for x in (rewards.double(), rewards):
        flashpo.stats(reset=True)
        out = group_advantages(x, group)
        assert flashpo.stats() == {"group_advantages_fwd": {"torch": 1}}
        assert out.advantage.dtype == x.dtype
        torch.testing.assert_close(out.advantage, plain(x, group)[0])


@sanitized
def test_compiles_into_one_graph(backend, graphs, counting):
    def advantages(rewards, group):
        return group_advantages(rewards * 2, group, reward_weights=[1.0, 0.5], scale="batch")

    compiled = torch.compile(advantages, backend=counting, fullgraph=True, dynamic=True)
    with flashpo.backend(backend):
        for rows in (12, 20, 33):
            rewards, group, _ = batch(rows, 4, 2)
            assert same(compiled(rewards, group), advantages(rewards, group))
    assert len(graphs) == 1


@sanitized
@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinite_rewards_raise(backend, value):
    rewards, group, lengths = batch(20, 3, 2, nan=0.3)
    rewards[3, 1] = value
    for options in ({}, {"reward_weights": [1.0, 0.0]}, GDPO, GDPO | {"convention": "verl", "lengths": lengths}):
        with pytest.raises(ValueError, match="rewards must be finite"):
            run(backend, rewards, group, **options)
    both = torch.tensor([[torch.inf, -torch.inf]])
    with pytest.raises(ValueError, match="rewards must be finite"):
        run(backend, both, group[:1])
    with pytest.raises(ValueError, match="weighted sum"):
        run(backend, torch.tensor([[3e38, 3e38]]), group[:1])


@sanitized
def test_lengths_must_be_positive(backend):
    rewards, group, lengths = batch(20, 3)
    lengths[7] = 0
    with pytest.raises(ValueError, match="lengths must be positive"):
        run(backend, rewards, group, lengths=lengths)


R, G = torch.rand(6, 2), torch.arange(6) // 3
VERL_GDPO = GDPO | {"convention": "verl"}


@pytest.mark.parametrize(
    ("rewards", "group", "options", "error", "message"),
    [
        ([1.0], G, {}, TypeError, "rewards must be a torch.Tensor"),
        (R.long(), G, {}, TypeError, "rewards must be float32"),
        (R[None], G, {}, ValueError, "rewards must be"),
        (R[:, :0], G, {}, ValueError, "rewards must be"),
        (R, G.int(), {}, TypeError, "group must be int64"),
        (R, G.tolist(), {}, TypeError, "group must be a torch.Tensor"),
        (R, G[:5], {}, ValueError, "group must be \\(6,\\)"),
        (R, G.to("meta"), {}, ValueError, "group is on meta"),
        (R, G, {"lengths": G.float() + 1}, TypeError, "lengths must be int64"),
        (R, G, {"lengths": G[:5]}, ValueError, "lengths must be \\(6,\\)"),
        (R, G, {"lengths": G + 1, "baseline": "none"}, ValueError, "lengths weigh"),
        (R, G, {"reward_weights": [1.0]}, ValueError, "reward_weights must be 2 numbers"),
        (R, G, {"reward_weights": [1.0, torch.nan]}, ValueError, "reward_weights must be finite"),
        (R, G, {"reward_weights": torch.ones(2, device="meta")}, ValueError, "reward_weights must be on the host"),
        (R, G, {"baseline": "median"}, ValueError, "baseline must be one of"),
        (R, G, {"scale": None}, ValueError, "scale must be one of"),
        (R, G, {"convention": "rllm"}, ValueError, "convention must be one of"),
        (R, G, {"aggregation": "sum"}, ValueError, "aggregation must be one of"),
        (R, G, GDPO | {"baseline": "leave_one_out"}, ValueError, "needs baseline 'mean'"),
        (R, G, GDPO | {"scale": "batch"}, ValueError, "needs baseline 'mean'"),
        (R, G, GDPO | {"convention": "openrlhf"}, ValueError, "no convention 'openrlhf'"),
        (R, G, GDPO | {"lengths": G + 1}, ValueError, "weighs by lengths"),
        (R, G, VERL_GDPO, ValueError, "weighs by lengths"),
    ],
)
def test_bad_arguments(rewards, group, options, error, message):
    with pytest.raises(error, match=message):
        group_advantages(rewards, group, **options)


DISTRIBUTED = [
    {},
    {"scale": "batch", "reward_weights": [1.0, 0.5, 2.0]},
    {"baseline": "leave_one_out", "scale": "none"},
    GDPO,
    VERL_GDPO | {"lengths": True},
]
assert {options.get("aggregation", AGGREGATIONS[0]) for options in DISTRIBUTED} == set(AGGREGATIONS)


def check_rank(rank):
    torch.manual_seed(0)
    rewards, group, lengths = batch(90, 12, 3, nan=0.3)
    # groups spread over the ranks; then one rank without rows
    for first in (37, 0):
        mine = slice(0, first) if rank == 0 else slice(first, 90)
        for options in DISTRIBUTED:
            whole_options, own_options = dict(options), dict(options)
            if "lengths" in options:
                whole_options["lengths"], own_options["lengths"] = lengths, lengths[mine]
            whole = group_advantages(rewards, group, **whole_options)
            own = group_advantages(rewards[mine], group[mine], process_group=dist.group.WORLD, **own_options)
            assert same(own, Advantages(*(x[mine] for x in whole)))
    with pytest.raises(ValueError, match="rewards must have one K"):
        group_advantages(rewards[:, : 1 + rank], group, process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="all or none"):
        group_advantages(rewards, group, lengths=lengths if rank else None, process_group=dist.group.WORLD)


@needs_gloo
def test_statistics_over_the_rows_of_all_ranks():
    in_two_processes((check_rank,))
