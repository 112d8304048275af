"""`policy_loss` in fp64 against numerical derivatives and written-out formulas. TRL and verl have their own files."""

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from inputs import backends
from policy_inputs import PRESETS, random_spec
from torch.utils.checkpoint import checkpoint
from two_processes import in_two_processes, needs_gloo

import flashpo
from flashpo import LOSSES, LossSpec, PolicyStats, policy_loss
from flashpo.ops.loss_spec import CHOICES

NAMES = sorted(LOSSES)


def batch(B=5, T=8, dtype=torch.float64, spread=0.4):
    """A ragged padded batch with holes; NaN where no result may look."""
    mask = (torch.arange(T) < torch.randint(1, T + 1, (B, 1))) & (torch.rand(B, T) < 0.8)
    mask[0] = True
    made = {"logprob": -3 * torch.rand(B, T, dtype=dtype)}
    for name in ("old_logprob", "ref_logprob", "rollout_logprob"):
        made[name] = made["logprob"] + spread * torch.randn(B, T, dtype=dtype)
    made["entropy"] = 3 * torch.rand(B, T, dtype=dtype)
    made = {name: x.masked_fill(~mask, torch.nan) for name, x in made.items()}
    return made | {"advantage": torch.randn(B, dtype=dtype), "mask": mask}


def tensors_for(spec: LossSpec, made: dict) -> dict:
    wanted = {"logprob", "old_logprob", "advantage", "mask", "entropy"}
    wanted |= {"ref_logprob"} if spec.kl_coef else set()
    wanted |= {"rollout_logprob"} if spec.importance != "none" or spec.off_policy_threshold is not None else set()
    return {name: x for name, x in made.items() if name in wanted}


def smooth(spec: LossSpec) -> bool:
    """Whether its gradient is that of its value everywhere but at kinks, without sg()."""
    return spec.surrogate in ("clip", "sapo", "gmpo") and spec.ratio != "sequence_token" and not spec.kl.endswith("+")


SMOOTH = [
    replace(spec, top_entropy=0.517) if spec.top_entropy < 1 else spec  # no token is the threshold itself
    for spec in map(random_spec, map(random.Random, range(400)))
    if smooth(spec)
]


@pytest.mark.parametrize("i", range(40))
def test_explicit_gradients_are_the_derivatives(i):
    """Those specs whose gradient is that of their value: what sg() holds back is compared with TRL and verl."""
    spec, made = SMOOTH[i], batch(3, 5)
    inputs = tensors_for(spec, made)
    constants = {name: x for name, x in inputs.items() if name not in ("logprob", "entropy")}

    def loss(logprob, entropy):
        return policy_loss(logprob, entropy=entropy, loss=spec, scale=0.7, **constants).loss

    # rubbish behind the mask has no derivative either
    leaves = [made[name].nan_to_num(nan=1.0).requires_grad_() for name in ("logprob", "entropy")]
    assert torch.autograd.gradcheck(loss, leaves, eps=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_flat_is_padded(name):
    """Also with empty sequences, advantages and importance ratios of tokens or of sequences."""
    spec = PRESETS[name]
    made = batch(B=6)
    made["mask"][3] = False
    B, T = made["mask"].shape
    lengths = torch.tensor([T, 3, 5, 2, T, 1])
    made["mask"] &= torch.arange(T) < lengths[:, None]
    inside = torch.arange(T) < lengths[:, None]
    cu = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    for per_token, ratio in itertools.product((False, True), (None, "token", "sequence")):
        inputs = tensors_for(spec, made)
        if per_token:
            inputs["advantage"] = torch.randn(B, T, dtype=torch.float64)
        if ratio and not (spec.surrogate == "vespo" and ratio == "sequence"):
            inputs["importance_ratio"] = torch.rand(B, T if ratio == "token" else 1, dtype=torch.float64) + 0.5
        padded = policy_loss(**inputs, loss=spec)
        flat = {n: x[inside] if x.shape == (B, T) else x for n, x in inputs.items()}
        logprob = flat["logprob"].requires_grad_()
        out = policy_loss(**flat, loss=spec, cu_seqlens=cu)
        torch.testing.assert_close(out.loss, padded.loss)
        torch.testing.assert_close(out.stats.values, padded.stats.values)
        again = inputs["logprob"].clone().requires_grad_()
        policy_loss(**inputs | {"logprob": again}, loss=spec).loss.backward()
        out.loss.backward()
        torch.testing.assert_close(logprob.grad, again.grad[inside])
        assert (again.grad[~made["mask"]] == 0).all()


@pytest.mark.parametrize("mode", [m for m in CHOICES["importance"] if m != "none"])
def test_importance_weights_are_those_of_trl(mode):
    """TRL's formula, grpo_trainer.py 1.16 lines 2659 to 2707; `geometric_mask` as OpenRLHF's seq-mask-tis."""
    made = batch(spread=0.6)
    made["rollout_logprob"][0, 0] = torch.nan  # the sampler did not say: weight 1
    mask = made["mask"]
    x = ((made["old_logprob"] - made["rollout_logprob"]) * mask).nan_to_num(nan=0.0).masked_fill(~mask, 0.0)
    total = x.sum(-1, keepdim=True)
    low, high = 0.8, 1.3
    ratio = (total if mode.startswith("sequence") else x).exp()
    if mode.endswith("truncate"):
        expected = ratio.clamp(low, high)
    else:
        judged = (total / mask.sum(-1, keepdim=True)).exp() if mode == "geometric_mask" else ratio
        expected = ratio.masked_fill((judged < low) | (judged > high), 0.0)
    spec = replace(LOSSES["dapo"], importance=mode, importance_min=low, importance_max=high)
    ours = policy_loss(**tensors_for(spec, made), loss=spec)
    given = policy_loss(**tensors_for(LOSSES["dapo"], made), loss="dapo", importance_ratio=expected)
    torch.testing.assert_close(ours.loss, given.loss)
    torch.testing.assert_close(ours.stats.values, given.stats.values)
    of_each = expected[:, 0] if mode.startswith("sequence") else expected.expand_as(mask)[mask]
    assert 0 < (of_each == 0).sum() < len(of_each) or mode.endswith("truncate")
    torch.testing.assert_close(ours.stats.weight, of_each.mean())
    torch.testing.assert_close(ours.stats.weight_max, of_each.max())
    share = of_each.sum() ** 2 / (of_each**2).sum() / len(of_each)
    torch.testing.assert_close(ours.stats.weight_sample_size, share)


def test_statistics_are_what_they_say():
    made = batch(B=7, T=20, spread=0.5)
    mask, adv = made["mask"], made["advantage"][:, None]
    spec = replace(LOSSES["dapo"], kl_coef=0.1, dual_clip=1.3, top_entropy=0.4)
    stats = policy_loss(**tensors_for(spec, made), loss=spec).stats
    w = (made["logprob"] - made["old_logprob"]).exp()
    of_tokens = {
        "clip_low": (w < 0.8) & (adv < 0),
        "clip_high": (w > 1.28) & (adv > 0),
        "below": w < 0.8,
        "above": w > 1.28,
        "capped": (w > 1.3) & (adv < 0),
        "ratio": w,
        "entropy": made["entropy"],
        "approx_kl": made["old_logprob"] - made["logprob"],
    }
    for name, x in of_tokens.items():
        torch.testing.assert_close(getattr(stats, name), x.double()[mask].mean(), msg=name)
    assert stats.tokens == mask.sum()
    assert stats.ratio_max == w[mask].max()
    assert stats.ratio_min == w[mask].min()
    threshold = made["entropy"][mask].quantile(0.6)
    kept = mask & (made["entropy"] >= threshold)
    assert stats.high_entropy_tokens == kept.sum()
    torch.testing.assert_close(stats.high_entropy, made["entropy"][kept].mean())
    share = w[mask].sum() ** 2 / (w[mask] ** 2).sum() / mask.sum()
    torch.testing.assert_close(stats.effective_sample_size, share)
    low = torch.stack([of_tokens["clip_low"][i][mask[i]].double().mean() for i in range(7) if mask[i].any()])
    torch.testing.assert_close(stats.clip_low_min, low.min())
    numbers = stats.as_dict()
    assert numbers["tokens"] == mask.sum().item()
    with pytest.raises(AttributeError, match="no 'clip_lo'"):
        stats.clip_lo  # noqa: B018


def check_rank(rank):
    torch.manual_seed(3)
    made = batch(B=8)
    half = {name: x[4 * rank : 4 * rank + 4] for name, x in made.items()}
    spec = replace(LOSSES["dapo"], top_entropy=0.5)
    options = dict(num_items=made["mask"].sum(), entropy_group=dist.group.WORLD)
    out = policy_loss(**tensors_for(spec, half), loss=spec, **options)
    whole = policy_loss(**tensors_for(spec, made), loss=spec)
    loss = out.loss.detach().clone()
    dist.all_reduce(loss)
    assert math.isclose(loss.item(), whole.loss.item(), rel_tol=1e-12)
    three = PolicyStats(torch.stack([out.stats.values] * 3, dim=1)).reduce()
    assert torch.equal(three.values[:, 2], out.stats.reduce().values)
    torch.testing.assert_close(three.values[:, 0], whole.stats.values)
    both = PolicyStats(three.values[:, 0])
    torch.testing.assert_close(both.ratio_quantile(0.9), whole.stats.ratio_quantile(0.9))


@needs_gloo
def test_statistics_and_entropy_threshold_of_two_ranks():
    in_two_processes((check_rank,))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_live_gives_zero_in_the_graph(name):
    spec = PRESETS[name]
    made = batch(dtype=torch.float32)
    made["mask"][:] = False
    made["advantage"][:] = 0
    logprob = made["logprob"].requires_grad_()
    loss = policy_loss(**tensors_for(spec, made), loss=spec).loss
    loss.backward()
    assert loss == 0
    assert (logprob.grad == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_far_log_ratios_are_finite_and_counted(name):
    """Beyond +-88, where exp overflows, on live tokens of either advantage; the KL's too."""
    spec = replace(PRESETS[name], kl_coef=0.1)
    made = batch(dtype=torch.float32)
    made = {name: x.nan_to_num(nan=-1.0) if x.is_floating_point() else x for name, x in made.items()}
    for i, far in enumerate((-300.0, -100.0, 100.0, 300.0)):
        for other in ("old_logprob", "ref_logprob"):
            made[other][i % 2, i] = made["logprob"][i % 2, i] - far
    made["mask"][:2, :4] = True
    made["advantage"][:2] = torch.tensor([1.0, -1.0])
    logprob = made["logprob"].requires_grad_()
    out = policy_loss(**tensors_for(spec, made), loss=spec)
    out.loss.backward()
    assert out.loss.isfinite()
    assert logprob.grad.isfinite().all()
    if spec.ratio == "token" and spec.log_ratio_max is None:
        assert out.stats.saturated > 0


def test_an_on_policy_ratio_is_1():
    made = batch()
    del made["old_logprob"]
    stats = policy_loss(**tensors_for(LOSSES["grpo"], made), old_logprob=None, loss="grpo").stats
    assert stats.ratio == stats.ratio_min == stats.ratio_max == 1
    torch.testing.assert_close(stats.effective_sample_size, torch.ones((), dtype=torch.float64))


def test_upstream_gradients_and_repeated_backward():
    """The loss enters a larger graph: weighted, used twice, checkpointed, and differentiated twice in turn."""
    made = batch(dtype=torch.float32)
    logprob = made["logprob"].nan_to_num(nan=0.0).requires_grad_()
    made["logprob"] = logprob
    loss = policy_loss(**tensors_for(LOSSES["dapo"], made), loss="dapo").loss
    (once,) = torch.autograd.grad(loss, logprob, retain_graph=True)
    kept = once.clone()
    (twice,) = torch.autograd.grad(3 * loss, logprob, retain_graph=True)
    torch.testing.assert_close(twice, 3 * kept)
    (again,) = torch.autograd.grad(loss, logprob, retain_graph=True)
    assert torch.equal(again, kept)
    once.mul_(0)  # the caller's own, not what backward needs again
    assert torch.equal(torch.autograd.grad(loss, logprob, retain_graph=True)[0], kept)
    made["logprob"] = None

    def f(x):
        return policy_loss(**tensors_for(LOSSES["dapo"], made | {"logprob": x}), loss="dapo").loss

    (recomputed,) = torch.autograd.grad(checkpoint(f, logprob, use_reentrant=False), logprob)
    assert torch.equal(recomputed, kept)


def of_each(advantage, lengths, **options):
    """The loss of a flat batch of log-ratios 0.1, 0.2, ..., and its gradient."""
    logprob = (-1 + 0.1 * torch.arange(sum(lengths), dtype=torch.float64)).requires_grad_()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    mask = options.pop("mask", torch.ones_like(logprob, dtype=torch.bool))
    old = torch.full_like(logprob.detach(), -1)
    loss = policy_loss(logprob, old, advantage, mask, cu_seqlens=cu_seqlens, **options).loss
    return loss.detach(), torch.autograd.grad(loss, logprob)[0]


@pytest.mark.parametrize("argument", ["advantage", "importance_ratio"])
def test_as_many_tokens_as_sequences(argument):
    """A flat (N,) could be of either then: it raises, unless both readings agree. Other shapes say which is meant."""
    given = torch.tensor([5.0, 2.0, 7.0], dtype=torch.float64)

    def run(x, lengths):
        return of_each(**{"advantage": torch.ones_like(given)[:, None], argument: x}, lengths=lengths, loss="grpo")

    with pytest.raises(ValueError, match=rf"{argument} \(3,\) could be of the 3 sequences or of the 3 tokens"):
        run(given, [0, 2, 1])
    of_sequences, of_tokens = run(given[:, None], [0, 2, 1]), run(given[None], [0, 2, 1])
    assert not torch.equal(of_sequences[1], of_tokens[1])
    assert all(torch.equal(x, y) for x, y in zip(of_sequences, run(given[[1, 1, 2]][None], [0, 2, 1])))
    alike = [run(x, [1, 1, 1]) for x in (given, given[:, None], given[None])]
    assert all(torch.equal(x, y) for one in alike for x, y in zip(one, alike[0]))


def test_sequences_of_one_masked_token_have_their_surrogate():
    """The loss at ratio 1 of a sequence without live tokens counts, in whatever shape its advantage comes."""
    mask, advantage = torch.tensor([True, False, True]), torch.tensor([1.0, 5.0, 2.0], dtype=torch.float64)
    options = dict(loss="rloo")
    losses = [of_each(x, [1, 1, 1], mask=mask, **options)[0] for x in (advantage, advantage[:, None])]
    logprob, old = torch.full((3, 1), -1.0, dtype=torch.float64), torch.full((3, 1), -1.0, dtype=torch.float64)
    logprob[:, 0] += 0.1 * torch.arange(3)
    losses += [policy_loss(logprob, old, x, mask[:, None], **options).loss for x in (advantage, advantage[:, None])]
    wide = [torch.cat([x, x], 1) for x in (logprob, old, mask[:, None])]  # a column of padding more
    wide[2][:, 1] = False
    losses.append(policy_loss(wide[0], wide[1], advantage, wide[2], **options).loss)
    assert all(torch.equal(x, losses[0]) for x in losses)


@pytest.mark.parametrize("loss", ["gspo", "rloo", "vespo", "ppo"])
@pytest.mark.parametrize("backend", [b for b in backends() if b != "torch"])
def test_statistics_of_sequences_without_live_tokens(loss, backend):
    """An empty part of a flat batch counts as a row of padding does."""
    lengths, width = torch.tensor([3, 0, 5, 0]), 5
    mask = torch.arange(width) < lengths[:, None]
    logprob, old, advantage = -torch.rand(4, width), -torch.rand(4, width), torch.randn(4)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    seen = []
    for used in (backend, "torch"):
        with flashpo.backend(used):
            seen.append(policy_loss(logprob, old, advantage, mask, loss=loss).stats.values)
            live = [x[mask] for x in (logprob, old)]
            flat = policy_loss(*live, advantage, mask[mask], cu_seqlens=cu_seqlens, loss=loss)
            seen.append(flat.stats.values)
            nothing = [x[:0] for x in live]
            empty = policy_loss(*nothing, advantage, mask[mask][:0], cu_seqlens=0 * cu_seqlens, loss=loss)
            padding = policy_loss(logprob, old, advantage, mask & False, loss=loss)
            torch.testing.assert_close(empty.stats.values, padding.stats.values)
    for values in seen:
        torch.testing.assert_close(values, seen[0])
    assert flat.stats.ratios == (8 if loss in ("vespo", "ppo") else 4)


@pytest.mark.parametrize("kl_coef", [0.1, 0.0])
def test_compiles_into_one_graph(graphs, counting, kl_coef):
    def with_override(made):
        return policy_loss(**made, loss="gspo", kl_coef=0.1, scale=0.5).loss

    def without(made):
        return policy_loss(**made, loss="gspo", scale=0.5).loss

    loss = with_override if kl_coef else without

    compiled = torch.compile(loss, backend=counting, fullgraph=True, dynamic=True)
    for B, T in ((5, 8), (6, 11), (3, 9)):
        made = batch(B, T, torch.float32)
        spec = replace(LOSSES["gspo"], kl_coef=kl_coef)
        inputs = {name: x.nan_to_num(nan=0.0) if x.is_floating_point() else x for name, x in made.items()}
        inputs = tensors_for(spec, inputs)
        inputs["logprob"].requires_grad_()
        expected = torch.autograd.grad(loss(inputs), inputs["logprob"])[0]
        assert torch.equal(torch.autograd.grad(compiled(inputs), inputs["logprob"])[0], expected)
    assert len(graphs) == 1


def test_only_logprob_and_entropy_are_differentiated():
    made = tensors_for(LOSSES["dapo"], batch(dtype=torch.float32))
    constants = {name: made[name].clone().requires_grad_() for name in ("old_logprob", "advantage")}
    assert not policy_loss(**made | constants).loss.requires_grad
    logprob = made["logprob"].clone().requires_grad_()
    policy_loss(**made | constants | {"logprob": logprob}).loss.backward()
    assert logprob.grad.abs().sum() > 0
    assert all(x.grad is None for x in constants.values())


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_what_is_not_0_in_a_mask_is_live(dtype, backend):
    if backend not in flashpo._op.OPS["policy_loss_fwd"].kernels and backend != "torch":
        pytest.skip("not built")
    made = tensors_for(LOSSES["dapo"], batch(T=19, dtype=torch.float32))
    other = torch.tensor([2, 100, 1 if dtype == torch.uint8 else -1])[torch.randint(3, made["mask"].shape)].to(dtype)
    with flashpo.backend(backend):
        expected, found = (
            policy_loss(**made | {"mask": mask}) for mask in (made["mask"], other.where(made["mask"], 0))
        )
    assert torch.equal(found.stats.values, expected.stats.values)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_openrlhf(dual_clip):
    """Its PolicyLoss and k3 as written (models/loss.py, models/utils.py): mean of live tokens or of samples' means."""
    made = batch(spread=1.5)
    mask, adv = made["mask"], made["advantage"][:, None]
    w = (made["logprob"] - made["old_logprob"]).exp()
    surrogate = torch.minimum(w * adv, w.clamp(0.8, 1.2) * adv)
    if dual_clip:
        surrogate = torch.where(adv < 0, torch.maximum(surrogate, dual_clip * adv), surrogate)
    delta = made["ref_logprob"] - made["logprob"]
    kl = (delta.exp() - 1 - delta).clamp(-10, 10)
    of_tokens = (0.1 * kl - surrogate).masked_fill(~mask, 0.0)
    samples = of_tokens.sum(1) / mask.sum(1)
    for aggregation, expected in (
        ("token_mean", of_tokens.sum() / mask.sum()),
        ("sequence_mean", samples[mask.any(1)].mean()),
    ):
        spec = replace(LOSSES["openrlhf_ppo"], aggregation=aggregation, kl_coef=0.1, dual_clip=dual_clip)
        torch.testing.assert_close(policy_loss(**tensors_for(spec, made), loss=spec).loss, expected)


@pytest.mark.parametrize("name", ["dapo", "gspo"])
def test_completions_longer_than_65535_tokens(name):
    """Liger's kernel, whose grid has the length on an axis of 16 bits, fails to launch."""
    made = batch(2, 70_000)
    exact = policy_loss(**tensors_for(LOSSES[name], made), loss=name)
    single = {n: x.float() if x.is_floating_point() else x for n, x in made.items()}
    ours = policy_loss(**tensors_for(LOSSES[name], single), loss=name)
    torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=1e-4, atol=1e-5)
    assert ours.stats.tokens == exact.stats.tokens


def test_presets_and_stats_are_public():
    assert flashpo.LOSSES["dapo"].clip_high == 0.28
    made = tensors_for(LOSSES["dapo"], batch(dtype=torch.float32))
    assert isinstance(policy_loss(**made).stats, PolicyStats)
