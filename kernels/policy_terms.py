"""The terms of single tokens in a policy loss, in Triton: their inputs, surrogate losses, KL, and the derivatives.

The formulas are in `flashpo.ops.loss_spec` and `flashpo.ops._policy_loss_reference`.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl

from flashpo.ops._policy_loss_reference import SATURATION as _SATURATION
from flashpo.ops._policy_loss_reference import VESPO_LOG_MAX as _VESPO_LOG_MAX
from flashpo.ops._policy_loss_reference import VESPO_LOG_MIN as _VESPO_LOG_MIN
from flashpo.ops.loss_spec import LossSpec

SATURATION: tl.constexpr = tl.constexpr(_SATURATION)
VESPO_LOG_MIN: tl.constexpr = tl.constexpr(_VESPO_LOG_MIN)
VESPO_LOG_MAX: tl.constexpr = tl.constexpr(_VESPO_LOG_MAX)
LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
LN2_HIGH: tl.constexpr = tl.constexpr(0.693359375)  # has few bits, so that its multiples are exact
LN2_LOW: tl.constexpr = tl.constexpr(math.log(2.0) - 0.693359375)
LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)


class Numbers(NamedTuple):
    """The run-time values of a LossSpec. A bound that the spec does not have is infinite."""

    scale: float
    clip_low: float
    clip_high: float
    lowest: float
    highest: float
    ratio_cap: float
    dual_clip: float
    log_ratio_min: float
    log_ratio_max: float
    sapo_gain: float
    sapo_other: float
    vespo_k_gain: float
    vespo_lambda_gain: float
    vespo_k_other: float
    vespo_lambda_other: float
    kl_coef: float
    kl_log_clamp: float
    kl_clamp: float
    importance_min: float
    importance_max: float
    off_policy_threshold: float | None  # None: the code for it is not compiled
    max_length: float
    entropy_coef: float

    @classmethod
    def of(cls, spec: LossSpec, scale: float) -> "Numbers":
        def bound(value: float | None) -> float:
            return math.inf if value is None else float(value)

        (k_gain, lambda_gain), (k_other, lambda_other) = spec.vespo_gamma
        low, high = bound(spec.clip_low), bound(spec.clip_high)
        return cls(
            scale=scale,
            clip_low=low,
            clip_high=high,
            lowest=1 - low,
            highest=1 + high,
            ratio_cap=bound(spec.ratio_cap),
            dual_clip=bound(spec.dual_clip),
            log_ratio_min=-math.inf if spec.log_ratio_min is None else float(spec.log_ratio_min),
            log_ratio_max=bound(spec.log_ratio_max),
            sapo_gain=float(spec.sapo_temperatures[0]),
            sapo_other=float(spec.sapo_temperatures[1]),
            vespo_k_gain=float(k_gain),
            vespo_lambda_gain=float(lambda_gain),
            vespo_k_other=float(k_other),
            vespo_lambda_other=float(lambda_other),
            kl_coef=float(spec.kl_coef),
            kl_log_clamp=bound(spec.kl_log_clamp),
            kl_clamp=bound(spec.kl_clamp),
            importance_min=-math.inf if spec.importance_min is None else float(spec.importance_min),
            importance_max=bound(spec.importance_max),
            off_policy_threshold=None if spec.off_policy_threshold is None else float(spec.off_policy_threshold),
            max_length=float(spec.max_length or 1),
            entropy_coef=float(spec.entropy_coef),
        )


class Tokens(NamedTuple):
    """The values of a block of tokens. They are 0 where a token is not live, whatever is in memory there."""

    live: tl.tensor
    kept: tl.tensor  # live, and of high entropy
    logp: tl.tensor
    old: tl.tensor
    d: tl.tensor  # log pi - log pi_old
    advantage: tl.tensor
    entropy: tl.tensor
    log_rho: tl.tensor  # log pi_old - log pi_rollout
    behind: tl.tensor  # log pi_rollout - log pi; with pi_old if there is no pi_rollout


@triton.jit
def load_live(x, at, live, otherwise):
    if x is None:
        return otherwise
    else:
        return tl.load(x + at, mask=live, other=0.0)


@triton.jit
def load_spread(x, at, live, s, OF_SEQUENCE: tl.constexpr):
    """The values of the tokens, or the one value of their sequence s."""
    if OF_SEQUENCE:
        return tl.load(x + s) + tl.zeros(at.shape, tl.float32)
    else:
        return tl.load(x + at, mask=live, other=0.0)


@triton.jit
def known(x):
    """Replace NaN by 0 and bound infinities."""
    x = tl.where(x == x, x, 0.0)
    return tl.minimum(tl.maximum(x, -LARGEST), LARGEST)


@triton.jit
def load_tokens(
    logprob,
    old_logprob,
    advantage,
    mask,
    rollout_logprob,
    entropy,
    entropy_threshold,
    at,
    inside,
    s,
    ADVANTAGE_OF_SEQUENCE: tl.constexpr,
):
    live = tl.load(mask + at, mask=inside, other=0) != 0
    zeros = tl.zeros(at.shape, tl.float32)
    logp = load_live(logprob, at, live, zeros)
    old = load_live(old_logprob, at, live, logp)
    h = load_live(entropy, at, live, zeros)
    kept = live
    if entropy_threshold is not None:
        kept = live & (h >= tl.load(entropy_threshold))
    rollout = load_live(rollout_logprob, at, live, old)
    adv = load_spread(advantage, at, live, s, ADVANTAGE_OF_SEQUENCE)
    return Tokens(live, kept, logp, old, logp - old, adv, h, known(old - rollout), known(rollout - logp))


@triton.jit
def clamp(x, low, high):
    return tl.clamp(x, low, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def exp(x):
    """Accurate to the last bits. tl.exp loses as many bits as x has before its binary point."""
    x = clamp(x, -128.0, 128.0)  # beyond these bounds exp(x) is 0 or inf
    n = tl.floor(x * LOG2E + 0.5)
    rest = (x - n * LN2_HIGH) - n * LN2_LOW
    return tl.exp2(n) * tl.exp2(rest * LOG2E)


@triton.jit
def importance_weight(log_rho, total, mean, numbers, IMPORTANCE: tl.constexpr):
    """rho of tokens with these log rho, whose sum and mean over the sequence are given."""
    if IMPORTANCE == "sequence_truncate" or IMPORTANCE == "sequence_mask":
        log_rho = tl.zeros(log_rho.shape, tl.float32) + total
    rho = exp(log_rho)
    if IMPORTANCE == "token_truncate" or IMPORTANCE == "sequence_truncate":
        return clamp(rho, numbers.importance_min, numbers.importance_max)
    else:
        bounded = rho
        if IMPORTANCE == "geometric_mask":
            bounded = tl.zeros(log_rho.shape, tl.float32) + exp(mean)
        return tl.where((bounded >= numbers.importance_min) & (bounded <= numbers.importance_max), rho, 0.0)


@triton.jit
def gmpo_gain(d, advantage, numbers):
    high = tl.where(advantage > 0, numbers.clip_high, float("inf"))
    low = tl.where(advantage > 0, float("-inf"), -numbers.clip_low)
    return clamp(d, low, high)


@triton.jit
def vespo_phi(log_weight, advantage, numbers):
    gains = advantage >= 0
    k = tl.where(gains, numbers.vespo_k_gain, numbers.vespo_k_other)
    lam = tl.where(gains, numbers.vespo_lambda_gain, numbers.vespo_lambda_other)
    return exp(lam + k * log_weight - lam * exp(log_weight))


@triton.jit
def surrogate(t, w, phi, numbers, SURROGATE: tl.constexpr):
    """Loss, its derivatives by log w and (apart from that) by log pi; whether w is below, above its bounds, or
    capped."""
    adv = t.advantage
    never = t.live & False
    zeros = tl.zeros(w.shape, tl.float32)
    below, above, capped = w < numbers.lowest, w > numbers.highest, never
    by_log_w, by_logp = zeros, zeros
    if SURROGATE == "clip":
        capped = w > numbers.ratio_cap
        w_capped = clamp(w, 0.0, numbers.ratio_cap)
        below, above = w_capped < numbers.lowest, w_capped > numbers.highest
        one, two = -w_capped * adv, -clamp(w, numbers.lowest, numbers.highest) * adv
        x = tl.maximum(one, two, propagate_nan=tl.PropagateNan.ALL)
        inside = (w >= numbers.lowest) & (w <= numbers.highest)
        passes = tl.where(one >= two, (w <= numbers.ratio_cap) | ((one == two) & inside), inside)
        dual = (adv < 0) & (x > -numbers.dual_clip * adv)
        x = tl.where(dual, -numbers.dual_clip * adv, x)
        by_log_w = tl.where(passes & (dual == 0), -adv * w, 0.0)
        capped = capped | dual
    elif SURROGATE == "sapo":
        temperature = tl.where(adv > 0, numbers.sapo_gain, numbers.sapo_other)
        z = temperature * (w - 1)
        gate = 1 / (1 + exp(-z))
        x = -4 / temperature * gate * adv
        by_log_w = -4 * adv * gate * w / (1 + exp(z))
        below, above = never, never
    elif SURROGATE == "gmpo":
        x = -adv * w
        by_log_w = x
        below, above = t.d < -numbers.clip_low, t.d > numbers.clip_high
    else:  # a factor that is constant for the gradient, times log pi
        if SURROGATE == "cispo":
            by_logp = -clamp(w, numbers.lowest, numbers.highest) * adv
        elif SURROGATE == "vespo":
            by_logp = -phi * adv
            below, above = never, never
        elif SURROGATE == "reinforce":
            by_logp = -adv
            below, above = never, never
        else:  # dppo
            p, q = exp(t.logp), exp(t.old)
            if SURROGATE == "dppo_tv":
                below, above = p - q < -numbers.clip_low, p - q > numbers.clip_high
            else:
                kl = q * (t.old - t.logp) + (1 - q) * tl.log((1 - q + 1e-8) / (1 - p + 1e-8))
                below, above = (kl > numbers.clip_low) & (p < q), (kl > numbers.clip_high) & (p > q)
            keep = tl.where(adv > 0, above, below) == 0
            capped = (w > numbers.ratio_cap) & keep
            by_logp = tl.where(keep, -adv * clamp(w, 0.0, numbers.ratio_cap), 0.0)
        x = by_logp * t.logp
    return x, by_log_w, by_logp, below, above, capped


@triton.jit
def exp_rest(x):
    """exp(x) - 1 - x, computed by its series near 0."""
    series = 1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040)))
    series = x * x * (1 / 2 + x * (1 / 6 + x * series))
    return tl.where(tl.abs(x) < 0.3, series, exp(clamp(x, float("-inf"), SATURATION)) - x - 1)


@triton.jit
def kl_estimate(delta, numbers, KL: tl.constexpr):
    """The KL estimate from delta = log ref - log pi, and its derivative by log pi."""
    if KL == "k3" or KL == "k3+":
        held = clamp(delta, -numbers.kl_log_clamp, numbers.kl_log_clamp)
        kl = exp_rest(held)
        d_kl = tl.where(tl.abs(delta) > numbers.kl_log_clamp, 0.0, -(kl + held))
    elif KL == "k2":
        kl, d_kl = delta * delta / 2, -delta
    elif KL == "abs" or KL == "abs+":
        kl, d_kl = tl.abs(delta), tl.where(delta > 0, -1.0, tl.where(delta < 0, 1.0, 0.0))
    else:
        kl, d_kl = -delta, tl.full(delta.shape, 1.0, tl.float32)
    d_kl = tl.where(tl.abs(kl) > numbers.kl_clamp, 0.0, d_kl)
    kl = clamp(kl, -numbers.kl_clamp, numbers.kl_clamp)
    if KL == "k1+" or KL == "abs+" or KL == "k3+":
        d_kl = -delta
    return kl, d_kl
