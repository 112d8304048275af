"""Our policy losses against verl's own code on the same tensors: loss, gradient and metrics."""

import math

import pytest
import torch
from accuracy import assert_as_accurate
from verl_peer import actor_config, core, policy_batch

import flashpo
from flashpo.verl import losses

MODES = list(losses.AGGREGATION)
GLOBAL = {"dp_size": 2, "batch_num_tokens": 301, "global_batch_size": 13, "loss_scale_factor": 50}
DRAWS = 4  # a single loss may be exact in fp32 by luck; several make a yardstick


def run(fn, batch, dtype, mode, config, weights=None):
    """(loss, d loss / d log_prob, metrics)"""
    old, log_prob, advantages, mask = (x.to(dtype) if x.is_floating_point() else x for x in batch)
    log_prob = log_prob.clone().requires_grad_()
    weights = None if weights is None else weights.to(dtype)
    loss, metrics = fn(old, log_prob, advantages, mask, mode, config, weights)
    loss.backward()
    return loss.detach(), log_prob.grad, metrics


def assert_same(ours, theirs, draws, mode, config, weights=None):
    """Loss, gradient and metrics: `ours` in fp32 errs no more than `theirs` does, against `theirs` in fp64."""
    weights = weights or [None] * len(draws)
    ours32, theirs64, theirs32 = (
        [run(fn, batch, dtype, mode, config, w) for batch, w in zip(draws, weights)]
        for fn, dtype in ((ours, torch.float32), (theirs, torch.float64), (theirs, torch.float32))
    )
    for part in (0, 1):
        assert_as_accurate(*(torch.stack([result[part] for result in runs]) for runs in (ours32, theirs64, theirs32)))
    keys = theirs64[0][2].keys()
    assert all(metrics.keys() == keys and {type(x) for x in metrics.values()} <= {float} for *_, metrics in ours32)
    assert_as_accurate(
        *(torch.tensor([[m[key] for key in keys] for *_, m in runs]).double() for runs in (ours32, theirs64, theirs32))
    )


WEIGHED = ["vanilla", "gspo", "cispo", "sapo", "dppo_tv", "dppo_kl", "geo_mean", "gpg"]


@pytest.mark.parametrize(("name", "weighted"), [*((n, w) for n in WEIGHED for w in (False, True)), ("dro", False)])
@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("mode", MODES)
def test_same_as_verl(name, mode, info, weighted):
    draws = [policy_batch() for _ in range(DRAWS)]
    weights = [2 * torch.rand_like(batch[0]) for batch in draws] if weighted else None
    config = actor_config(info, clip_ratio_low=0.15, clip_ratio_high=0.25, clip_ratio_c=2.5)
    assert_same(losses.POLICY_LOSSES[name], core.get_policy_loss_fn(name), draws, mode, config, weights)


@pytest.mark.parametrize("correction", ["ppo_clip", "reinforce", "reinforce token", "reinforce rejecting"])
def test_bypass_mode(correction):
    kind, *how = correction.split()
    settings = {"loss_type": kind, "rollout_is": "token" if how else None, "rollout_is_threshold": 1.5}
    if how == ["rejecting"]:
        settings |= {"rollout_rs": "token_k1", "rollout_rs_threshold": "0.7_1.4"}
    config = actor_config(rollout_correction=settings)
    draws = [policy_batch() for _ in range(DRAWS)]
    theirs = core.get_policy_loss_fn("bypass_mode")
    assert_same(losses.bypass_mode, theirs, draws, "token-mean", config)


def test_the_batches_reach_every_edge():
    old, log_prob, _, mask = policy_batch()
    d = log_prob - old
    assert (d[mask] > 20).any()
    assert (d[mask] < -20).any()
    assert (mask.sum(-1) == 0).any()
    config = actor_config()
    for name in ("vanilla", "gspo", "cispo", "dppo_tv", "dppo_kl"):
        metrics = run(losses.POLICY_LOSSES[name], policy_batch(), torch.float32, "token-mean", config)[2]
        assert metrics["actor/pg_clipfrac"] > 0, name
    assert run(losses.vanilla, policy_batch(), torch.float32, "token-mean", config)[2]["actor/pg_clipfrac_lower"] > 0


def test_defaults_are_verls():
    """clip_ratio alone changes nothing in verl 0.9.1: clip_ratio_low and clip_ratio_high default to 0.2, not None."""
    draws = [policy_batch() for _ in range(DRAWS)]
    for name, loss in losses.POLICY_LOSSES.items():
        if name != "bypass_mode":
            assert_same(loss, core.get_policy_loss_fn(name), draws, "token-mean", actor_config(clip_ratio=0.05))
    assert losses.clip(actor_config(clip_ratio=0.05)) == {"clip_low": 0.2, "clip_high": 0.2}
    unset = actor_config(clip_ratio=0.05, clip_ratio_low=None, clip_ratio_high=None)
    assert losses.clip(unset) == {"clip_low": 0.05, "clip_high": 0.05}
    assert_same(losses.vanilla, core.get_policy_loss_fn("vanilla"), draws, "token-mean", unset)


PRESETS = {
    "verl_ppo": "vanilla",
    "verl_gspo": "gspo",
    "verl_cispo": "cispo",
    "verl_sapo": "sapo",
    "verl_gmpo": "geo_mean",
    "verl_dppo_tv": "dppo_tv",
    "verl_dppo_kl": "dppo_kl",
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_of_policy_loss(preset):
    """`policy_loss(loss="verl_...")` with fields of the spec in place of verl's configuration."""
    spec = flashpo.LOSSES[preset]
    bounds = {"clip_ratio_low": spec.clip_low, "clip_ratio_high": spec.clip_high}
    if cap := spec.ratio_cap or spec.dual_clip:
        bounds["clip_ratio_c"] = cap
    mode = "seq-mean-token-mean" if spec.aggregation == "sequence_mean" else "token-mean"

    def ours(old, log_prob, advantages, mask, *_):
        return flashpo.policy_loss(log_prob, old, advantages[:, 0].contiguous(), mask, loss=preset).loss, {}

    def theirs(*args):
        return core.get_policy_loss_fn(PRESETS[preset])(*args)[0], {}

    draws = [policy_batch(per_sequence=True) for _ in range(DRAWS)]
    assert_same(ours, theirs, draws, mode, actor_config(**bounds))


KL = {"kl": "k1", "k1+": "k1+", "abs": "abs", "abs+": "abs+", "mse": "k2", "low_var_kl": "k3", "k3+": "k3+"}


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("kind", KL)
def test_kl_and_entropy_as_the_actor_adds_them(kind, mode):
    """The sum of three terms that verl's `ppo_loss` makes, in one call; verl clamps the estimate k3 alone."""
    coef, entropy_coef = 0.05, 0.01
    reference = {}

    def with_kl(old, log_prob):
        ref = log_prob.detach() + reference["offset"].to(old)
        return ref, reference["entropy"].to(old)

    def theirs(old, log_prob, advantages, mask, mode, config, _):
        ref, entropy = with_kl(old, log_prob)
        loss, _ = core.compute_policy_loss_vanilla(old, log_prob, advantages, mask, mode, config)
        loss = loss - entropy_coef * core.agg_loss(entropy, mask, mode)
        return loss + coef * core.agg_loss(core.kl_penalty(log_prob, ref, kind), mask, mode), {}

    def ours(old, log_prob, advantages, mask, mode, config, _):
        ref, entropy = with_kl(old, log_prob)
        clamps = {} if KL[kind].startswith("k3") else {"kl_log_clamp": None, "kl_clamp": None}
        loss, _ = flashpo.policy_loss(
            log_prob, old, advantages, mask, loss="verl_ppo", aggregation=losses.AGGREGATION[mode],
            ref_logprob=ref, kl=KL[kind], kl_coef=coef, **clamps,
            entropy=entropy, entropy_coef=entropy_coef, entropy_mean="loss",
        )  # fmt: skip
        return loss, {}

    draws = [policy_batch()]
    offset = 1.5 * torch.randn_like(draws[0][0])
    offset[0, 0], offset[2, 0], offset[3, 0] = 24.0, -24.0, 3.0  # beyond the clamp of the log-ratio, and of the value
    reference.update(offset=offset, entropy=torch.rand_like(offset))
    assert_same(ours, theirs, draws, mode, actor_config())


def test_a_micro_batch_without_live_tokens():
    """verl: 0 / 0, unless it is told the tokens of the global batch. Here: 0, with a gradient of zeros."""
    *tensors, mask = policy_batch()
    batch = (*tensors, torch.zeros_like(mask))
    for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"):
        assert run(core.compute_policy_loss_vanilla, batch, torch.float32, mode, actor_config())[0].isnan()
        for info in ({}, GLOBAL):
            loss, gradient, metrics = run(losses.vanilla, batch, torch.float32, mode, actor_config(info))
            assert loss == 0
            assert not gradient.any()
            assert set(metrics.values()) == {0.0}


@pytest.mark.parametrize("mode", MODES)
def test_nan_where_the_mask_is_0(mode):
    """A log-prob that nobody computed. verl's sequence modes mask by a product: NaN."""
    old, log_prob, advantages, mask = policy_batch()
    clean = run(losses.vanilla, (old, log_prob, advantages, mask), torch.float32, mode, actor_config())
    dirty = old, log_prob.masked_fill(~mask, math.nan), advantages, mask
    loss, gradient, metrics = run(losses.vanilla, dirty, torch.float32, mode, actor_config())
    assert (loss, metrics) == (clean[0], clean[2])
    assert torch.equal(gradient, clean[1])
    loss, *_ = run(core.compute_policy_loss_vanilla, dirty, torch.float32, mode, actor_config())
    assert loss.isnan() == mode.startswith("seq")


def test_a_ratio_that_overflows():
    """verl's geo_mean does not clamp: a sequence e^100 times likelier than before is inf, and a GMPO run is over."""
    old, log_prob, advantages, mask = policy_batch(per_sequence=True)
    old[0], log_prob[0], advantages[0] = -100.5, -0.5, -1.0
    batch = old, log_prob, advantages, mask
    loss, gradient, _ = run(core.compute_policy_loss_geo_mean, batch, torch.float32, "token-mean", actor_config())
    assert loss.isinf()
    assert not gradient.isfinite().all()
    loss, gradient, _ = run(losses.geo_mean, batch, torch.float32, "token-mean", actor_config())
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl"])
def test_dppo_truncates_at_clip_ratio_c(name):
    """ActorConfig has clip_ratio_c = 3, for the dual clip; the 20 that verl's DPPO names as its default is not used."""
    batch = policy_batch()
    for fn in (losses.POLICY_LOSSES[name], core.get_policy_loss_fn(name)):
        default, at_3, at_20 = (
            run(fn, batch, torch.float32, "token-mean", config)[0]
            for config in (actor_config(), actor_config(clip_ratio_c=3.0), actor_config(clip_ratio_c=20.0))
        )
        assert default == at_3
        assert default != at_20


def test_low_precision_and_masks_of_other_types():
    old, log_prob, advantages, mask = policy_batch()
    expected = run(losses.vanilla, (old, log_prob, advantages, mask), torch.float32, "token-mean", actor_config())
    for other in (mask.float(), mask.long()):
        loss, *_ = run(losses.vanilla, (old, log_prob, advantages, other), torch.float32, "token-mean", actor_config())
        assert loss == expected[0]
    loss, gradient, _ = run(
        losses.vanilla, (old, log_prob, advantages, mask), torch.bfloat16, "token-mean", actor_config()
    )
    assert loss.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("message", "name", "options"),
    [
        ("config must be", "vanilla", {"config": None}),
        ("config must be", "geo_mean", {"config": None}),
        ("loss_agg_mode must be one of", "gspo", {"loss_agg_mode": "mean"}),
        ("batch_num_tokens", "vanilla", {"config": {"dp_size": 2}}),
        ("global_batch_size", "gspo", {"config": {"dp_size": 2}, "loss_agg_mode": "seq-mean-token-sum"}),
        ("world_size", "vanilla", {"config": {"world_size": 2}}),
        ("dual_clip must be above 1", "vanilla", {"config": actor_config(clip_ratio_c=0.9)}),
        ("rollout_is_weights", "dro", {"rollout_is_weights": torch.ones(6, 29)}),
        ("dro_beta", "dro", {"config": actor_config(dro_beta=None)}),
        ("rollout_correction", "bypass_mode", {}),
        ("loss_type", "bypass_mode", {"config": actor_config(rollout_correction={"loss_type": "ppo"})}),
        ("other than 0 and 1", "cispo", {"response_mask": torch.full((6, 29), 0.5)}),
    ],
)
def test_what_is_refused(message, name, options):
    old, log_prob, advantages, mask = (x.float() for x in policy_batch())
    config = options.pop("config", {})
    config = actor_config(config) if isinstance(config, dict) else config
    args = dict(old_log_prob=old, log_prob=log_prob, advantages=advantages, response_mask=mask, config=config)
    with pytest.raises(ValueError, match=message):
        losses.POLICY_LOSSES[name](**{"loss_agg_mode": "token-mean", **args, **options})
