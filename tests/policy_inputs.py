"""Random specs and inputs of `policy_loss`, and the comparison of a backend's results with the float64 reference."""

import random
from dataclasses import replace

import torch
from accuracy import assert_as_accurate

import flashpo
from flashpo import policy_loss
from flashpo.ops.loss_spec import CHOICES, LOSSES, LossSpec
from flashpo.ops.policy_stats import NAMES

FLOATS = ("logprob", "old_logprob", "ref_logprob", "rollout_logprob", "importance_ratio", "entropy", "advantage")
PRESETS = {name: replace(spec, max_length=40) if name == "dr_grpo" else spec for name, spec in LOSSES.items()}


def random_spec(rng: random.Random) -> LossSpec:
    """Any combination that LossSpec accepts, or a preset."""
    while True:
        maybe = lambda value, p=0.5: value if rng.random() < p else None  # noqa: E731
        extra = dict(
            kl_coef=rng.choice([0.0, 0.1]),
            kl=rng.choice(CHOICES["kl"]),
            kl_ratio_correction=rng.random() < 0.3,
            kl_log_clamp=maybe(0.8, 0.2),
            kl_clamp=maybe(0.45, 0.2),
            importance=rng.choice(CHOICES["importance"]),
            importance_min=maybe(0.4),
            importance_max=maybe(1.5),
            off_policy_threshold=maybe(0.02, 0.3),
            top_entropy=rng.choice([1.0, 0.6]),
            entropy_coef=rng.choice([0.0, 0.02]),
            entropy_mean=rng.choice(CHOICES["entropy_mean"]),
            aggregation=rng.choice(CHOICES["aggregation"]),
            max_length=40,
            empty_sequences=rng.choice(CHOICES["empty_sequences"]),
        )
        if extra["importance"] == "none":
            extra["importance_min"] = extra["importance_max"] = None
        if extra["aggregation"] != "fixed_length":
            extra["max_length"] = None
        if not extra["kl"].startswith("k3"):
            extra["kl_log_clamp"] = None
        own = dict(
            ratio=rng.choice(CHOICES["ratio"]),
            surrogate=rng.choice(CHOICES["surrogate"]),
            clip_low=rng.choice([None, 0.1, 0.2]),
            clip_high=rng.choice([None, 0.1, 0.3, 2.0]),
            ratio_cap=maybe(1.4, 0.3),
            dual_clip=maybe(1.3, 0.3),
            log_ratio_min=maybe(-0.7, 0.2),
            log_ratio_max=maybe(0.6, 0.2),
            sapo_temperatures=(1.0, 1.3),
            vespo_gamma=((2.0, 3.0), (3.0, 2.5)),
        )
        if own["surrogate"] in ("sapo", "vespo", "reinforce"):
            own["clip_low"] = own["clip_high"] = None
        try:
            if rng.random() < 0.3:
                name = rng.choice(sorted(LOSSES))
                return replace(LOSSES[name], **extra)
            return LossSpec(**own, **extra)
        except ValueError:
            continue


# of the sequences of a batch; the last are parted among programs on a GPU
LENGTHS = ([40] * 5, [1, 0, 17, 16, 3, 33], [1500, 70], [7], [0, 5, 0], [2100, 0, 3000, 4500])


def random_inputs(rng: random.Random, spec: LossSpec, lengths, live: float = 0.7, spread: float = 0.3) -> dict:
    """Float64 inputs of float32 values, `live` of the tokens unmasked; NaN and the like wherever nobody may look.
    Log-ratios are near multiples of 1/256 and a bit: none is so close to a bound or an edge of the statistics' bins
    that rounding decides."""
    flat = rng.random() < 0.5 or len(set(lengths)) > 1
    shape = (sum(lengths),) if flat else (len(lengths), lengths[0])
    sequences = len(lengths)
    old = -3 * torch.rand(shape)
    noise = lambda: old + ((256 * spread * torch.randn(shape)).round() + 0.37) / 256  # noqa: E731
    mask = torch.rand(shape) < live
    inputs = dict(
        logprob=noise(),
        old_logprob=old if rng.random() < 0.85 else None,
        advantage=torch.randn(sequences) if rng.random() < 0.6 else torch.randn(shape),
        mask=mask.to(rng.choice([torch.bool, torch.int32, torch.int64])),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0) if flat else None,
        ref_logprob=noise() if spec.kl_coef != 0 else None,
        rollout_logprob=noise() if spec.importance != "none" or rng.random() < 0.3 else None,
        entropy=2 * torch.rand(shape) if spec.entropy_coef != 0 or spec.top_entropy < 1 else None,
    )
    if spec.importance == "none" and rng.random() < 0.4:
        inputs["importance_ratio"] = (0.3 * torch.randn(sequences if rng.random() < 0.5 else shape)).exp()
    if spec.aggregation not in ("local_token_mean", "token_sum") and rng.random() < 0.4:
        inputs["num_items"] = 37.0
    inputs["advantage"].view(-1)[3::10] = 0.0  # groups of equal rewards
    for name, x in inputs.items():
        if name in FLOATS and x is not None:
            inputs[name] = x.double()
            if x.shape == shape:
                inputs[name][~mask] = rng.choice([torch.nan, torch.inf, 1e30])
    if inputs["rollout_logprob"] is not None:
        inputs["rollout_logprob"][torch.rand(shape) < 0.05] = torch.nan  # the sampler gave none
    return inputs


def far_apart(spec: LossSpec, sign: float) -> dict:
    """Log-ratios d where e^d is inf or 0 in float32; advantages of one sign."""
    d = torch.tensor([-200.0, -89, -65, -30, 0, 30, 65, 89, 200]).repeat(4, 3)
    old = -torch.rand(4, 27) - 1
    return dict(
        logprob=(old + d).double(),
        old_logprob=old.double(),
        ref_logprob=(old - d).double() if spec.kl_coef != 0 else None,
        advantage=sign * torch.rand(4).double(),
        mask=torch.ones(4, 27, dtype=torch.bool),
    )


def run(inputs: dict, spec: LossSpec, backend: str, dtype: torch.dtype, upstream: float = 1.0):
    """Gradients, and the loss with the statistics."""
    inputs = {k: x.to(dtype, copy=True) if k in FLOATS and x is not None else x for k, x in inputs.items()}
    leaves = [inputs[name].requires_grad_() for name in ("logprob", "entropy") if inputs.get(name) is not None]
    with flashpo.backend(backend):
        result = policy_loss(**inputs, loss=spec, scale=0.5)
        grads = torch.autograd.grad(result.loss, leaves, torch.tensor(upstream, dtype=dtype), allow_unused=True)
    return [g for g in grads if g is not None], torch.cat([result.loss.detach()[None], result.stats.values.detach()])


def compare(backend: str, spec: LossSpec, draws: list[dict], upstream: float = 1.0, without: tuple[str, ...] = ()):
    """A sum's error is a matter of luck in a single draw: it is judged over all of them together."""
    gradients, values = [], []
    for name, dtype in ((backend, torch.float32), ("torch", torch.float64), ("torch", torch.float32)):
        grads, stats = zip(*(run(inputs, spec, name, dtype, upstream) for inputs in draws))
        gradients.append([torch.cat([g.flatten() for g in of_leaf]) for of_leaf in zip(*grads, strict=True)])
        values.append(torch.stack(stats, 1))
    for out, true, baseline in zip(*gradients, strict=True):
        assert_as_accurate(out, true, baseline)
    for name, out, true, baseline in zip(("returned", *NAMES), *values, strict=True):
        if name in without:
            continue
        infinite = true.float().isinf()  # an extreme of nothing, or the square of a ratio beyond fp32
        assert torch.equal(out[infinite], true[infinite].float()), name
        assert_as_accurate(*(x[~infinite] for x in (out, true, baseline)))
