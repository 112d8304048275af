"""The definition of `policy_loss` in plain torch: what every backend computes."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashpo.ops.loss_spec import LossSpec
from flashpo.ops.policy_stats import LOG_RATIO_BINS, LOG_RATIO_EDGES, NAMES

SATURATION = 64.0  # the bound of |log w| in exp: e^64 per token stays finite in any batch's sum
VESPO_LOG_MIN, VESPO_LOG_MAX = math.log(1e-8), 20.0  # bounds of log W and of each of its terms


def policy_loss_fwd(
    logprob: Tensor,  # (N,) fp32 or fp64, like all float tensors here
    old_logprob: Tensor | None,  # (N,)
    advantage: Tensor,  # (N,) or (S, 1)
    mask: Tensor,  # (N,) bool or int
    cu_seqlens: Tensor,  # (S + 1,)
    ref_logprob: Tensor | None,  # (N,)
    rollout_logprob: Tensor | None,  # (N,)
    importance_ratio: Tensor | None,  # (N,) or (S, 1)
    entropy: Tensor | None,  # (N,)
    entropy_threshold: Tensor | None,  # (1,)
    num_items: Tensor | None,  # (1,)
    scale: float,
    spec: str,  # LossSpec.key
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss (), statistics (len(NAMES),), gradients (1 or 2, N) and factors of the gradients (1 or 2,).

    The rows of the gradients are d loss / d logprob and, if entropy_coef is not 0, d loss / d entropy. A row's factor
    is what a kernel knows only after its pass; here it is 1.
    """
    s, dtype = LossSpec.from_key(spec), logprob.dtype
    clip_low, clip_high = _or(s.clip_low, math.inf), _or(s.clip_high, math.inf)
    sequences = cu_seqlens.shape[0] - 1
    # Append a masked token to each sequence, so that a sequence without tokens is one whose tokens are all masked.
    segment = torch.repeat_interleave(cu_seqlens.diff(), output_size=logprob.shape[0])
    given = segment + torch.arange(logprob.shape[0], device=logprob.device)

    def ended(x: Any) -> Any:  # (N,) -> (N + S,); None and (S, 1) are returned as they are
        if x is None or x.dim() == 2:
            return x
        return x.new_zeros(x.shape[0] + sequences).index_copy_(0, given, x)

    logprob, old_logprob, mask, advantage, ref_logprob, rollout_logprob, importance_ratio, entropy = map(
        ended, (logprob, old_logprob, mask, advantage, ref_logprob, rollout_logprob, importance_ratio, entropy)
    )
    cu_seqlens = cu_seqlens + torch.arange(sequences + 1, device=logprob.device)
    segment = torch.repeat_interleave(cu_seqlens.diff(), output_size=logprob.shape[0])
    m = mask != 0

    def live(x: Tensor | None) -> Tensor:  # None is allowed only if the spec does not read the tensor
        return m.to(dtype) * 0 if x is None else torch.where(m, x, 0.0)

    def sequence_sum(x: Tensor) -> Tensor:  # (N,) -> (S,)
        return x.new_zeros(sequences).index_add_(0, segment, x)

    def spread(x: Tensor) -> Tensor:  # (S, 1) or (N,) -> (N,)
        return x.flatten()[segment] if x.dim() == 2 else x

    n = sequence_sum(m.to(dtype))
    at_least_1 = n.clamp(min=1)
    adv = spread(advantage) if advantage.dim() == 2 else live(advantage)
    logp = live(logprob)
    old = logp if old_logprob is None else live(old_logprob)

    # tokens that have a loss: those of high entropy
    kept = m if entropy_threshold is None else m & (live(entropy) >= entropy_threshold)
    weight = kept.to(dtype) if s.surrogate != "gmpo" else m.to(dtype)  # gmpo takes the others out of its mean instead

    # importance weights, and sequences too far off-policy
    rho = None
    if importance_ratio is not None:
        rho = spread(importance_ratio)
        rho_of_sequence = importance_ratio.dim() == 2
    elif s.importance != "none":
        log_rho = (old - live(rollout_logprob)).nan_to_num(nan=0.0)
        total = sequence_sum(log_rho)
        rho_of_sequence = s.importance.startswith("sequence")
        rho = (total[segment] if rho_of_sequence else log_rho).exp()
        low = _or(s.importance_min, -math.inf)
        high = _or(s.importance_max, math.inf)
        if s.importance.endswith("truncate"):
            rho = rho.clamp(low, high)
        else:
            bounded = (total / at_least_1).exp()[segment] if s.importance == "geometric_mask" else rho
            rho = rho.where((bounded >= low) & (bounded <= high), 0.0)
    dropped = torch.zeros_like(m)
    if s.off_policy_threshold is not None:
        behind = live((old if rollout_logprob is None else rollout_logprob) - logp).nan_to_num(nan=0.0)
        dropped = (adv < 0) & ((sequence_sum(behind) / at_least_1)[segment] > s.off_policy_threshold)
        weight = weight * ~dropped
    if rho is not None and s.surrogate != "vespo":
        weight = weight * live(rho)

    # log w, where it is not clamped, and w
    d = logp - old
    clipped = torch.zeros_like(m)
    if s.ratio == "token":
        log_w = d
    elif s.surrogate == "gmpo":
        gains = torch.where(adv > 0, d.clamp(max=clip_high), d.clamp(min=-clip_low))
        clipped = gains != d
        log_w = (sequence_sum(gains.where(kept, 0.0)) / sequence_sum(kept.to(dtype)).clamp(min=1))[segment]
    else:
        total = sequence_sum(d)
        log_w = (total if s.ratio == "sequence_sum" else total / at_least_1)[segment]
    low = _or(s.log_ratio_min, -math.inf)
    high = _or(s.log_ratio_max, math.inf)
    free = (log_w >= low) & (log_w <= high)
    log_w = log_w.clamp(low, high)
    saturated = log_w.abs() > SATURATION
    w = log_w.clamp(-SATURATION, SATURATION).exp()

    phi = None
    if s.surrogate == "vespo":
        log_weight = sequence_sum(d.clamp(-20, 20))
        if rho is not None:
            log_weight = log_weight + sequence_sum(live(rho.log().clamp(VESPO_LOG_MIN, 20.0)))
        log_weight = log_weight.clamp(VESPO_LOG_MIN, VESPO_LOG_MAX)[segment]
        (k0, lambda0), (k1, lambda1) = s.vespo_gamma
        k, lam = torch.where(adv >= 0, k0, k1).to(dtype), torch.where(adv >= 0, lambda0, lambda1).to(dtype)
        phi = (lam + k * log_weight - lam * log_weight.exp()).exp()
    x, by_log_w, by_logp, below, above, capped = _surrogate(s, logp, old, w, adv, phi)
    by_log_w = by_log_w.where(free, 0.0)
    x, by_log_w, by_logp = x * weight, by_log_w * weight, by_logp * weight

    # KL to the reference, to which these weights do not apply
    kl = torch.zeros_like(d)
    if s.kl_coef != 0:
        kl, d_kl = _kl(s, live(ref_logprob) - logp)
        if s.kl_ratio_correction:
            kl, d_kl = kl * w, d_kl * w
            by_log_w = by_log_w + (s.kl_coef * kl).where(free, 0.0)
        x, by_logp = x + s.kl_coef * kl, by_logp + s.kl_coef * d_kl

    # aggregation: the share of each token in the loss
    tokens, live_sequences = n.sum(), (n > 0).sum().to(dtype)
    counted = live_sequences if s.empty_sequences == "excluded" else torch.full_like(tokens, sequences)
    items = {"token_mean": tokens, "local_token_mean": tokens, "token_sum": torch.ones_like(tokens)}.get(
        s.aggregation, counted
    )
    items = items.clamp(min=1) if num_items is None else num_items[0].clamp(min=torch.finfo(dtype).tiny)
    share = m.to(dtype) / items
    if s.aggregation == "sequence_mean":
        share = share / at_least_1[segment]
    elif s.aggregation == "fixed_length":
        share = share / _or(s.max_length, math.nan)
    policy = (share * live(x)).sum()
    if s.empty_sequences == "surrogate":
        policy = policy - (advantage.flatten() * (n == 0)).sum() / items if advantage.dim() == 2 else policy

    # gradient; the gradient of a sequence's ratio goes to all tokens of the sequence
    chain = live(share * by_log_w)
    if s.ratio == "sequence_sum":
        chain = live(sequence_sum(chain)[segment])
    elif s.surrogate == "gmpo":
        each = sequence_sum(chain) / sequence_sum(kept.to(dtype)).clamp(min=1)
        chain = (each[segment] * ~clipped).where(kept, 0.0)
    elif s.ratio == "sequence":
        chain = live((sequence_sum(chain) / at_least_1)[segment])
    d_logprob = chain + live(share * by_logp)

    total, d_entropy = policy, torch.zeros_like(d)
    if s.entropy_coef != 0:
        of_mean = kept.to(dtype) / kept.sum().clamp(min=1) if s.entropy_mean == "tokens" else share
        total = total - s.entropy_coef * (of_mean * live(entropy)).sum()
        d_entropy = -s.entropy_coef * of_mean

    # statistics over tokens, or over sequences if both ratios and advantages are per sequence
    per_sequence = s.ratio in ("sequence", "sequence_sum") and advantage.dim() == 2 and s.surrogate != "gmpo"
    first = torch.zeros_like(m)
    first[cu_seqlens[:-1]] = True
    one_each = first if per_sequence else m
    one_each_float = one_each.to(dtype)

    def count(flag: Tensor) -> Tensor:
        return (flag & one_each).sum().to(dtype)

    of_phi = first if advantage.dim() == 2 else m
    ratios = w.where(one_each, 0.0)
    low_clipped, high_clipped = below & (adv < 0), above & (adv > 0)
    if s.surrogate.startswith("dppo"):
        low_clipped = below & (adv <= 0)
    beyond = torch.stack([log_w.abs() >= edge for edge in LOG_RATIO_EDGES]).sum(0)
    bins = len(LOG_RATIO_EDGES) + torch.where(log_w < 0, -beyond, beyond)
    of_bins = log_w.new_zeros(len(LOG_RATIO_BINS)).index_add_(0, bins, one_each_float)
    counts = sequence_sum(one_each_float)
    low_of_sequence = sequence_sum((low_clipped & one_each).to(dtype)) / counts
    high_of_sequence = sequence_sum((high_clipped & one_each).to(dtype)) / counts
    values = dict(
        loss=scale * total,
        policy_loss=policy,
        tokens=tokens,
        sequences=torch.full_like(tokens, sequences),
        live_sequences=live_sequences,
        entropy=live(entropy).sum(),
        kl=live(kl).sum(),
        approx_kl=-live(log_w if s.ratio == "token" else d).sum(),
        ratios=one_each_float.sum(),
        ratio=ratios.sum(),
        ratio_squared=(ratios * ratios).sum(),
        clip_low=count(low_clipped),
        clip_high=count(high_clipped),
        below=count(below),
        above=count(above),
        capped=count(capped),
        saturated=(saturated & m).sum().to(dtype),
        high_entropy_tokens=kept.sum().to(dtype),
        high_entropy=live(entropy).where(kept, 0.0).sum(),
        phis=tokens * 0 if phi is None else of_phi.sum().to(dtype),
        phi=tokens * 0 if phi is None else phi.where(of_phi, 0.0).sum(),
        off_policy_sequences=(dropped & first).sum().to(dtype),
        **dict(zip(LOG_RATIO_BINS, of_bins, strict=True)),
        ratio_min=_extreme(w, one_each, False),
        ratio_max=_extreme(w, one_each, True),
        clip_low_min=_extreme(low_of_sequence, counts > 0, False),
        clip_high_max=_extreme(high_of_sequence, counts > 0, True),
    )
    of_weight = torch.zeros_like(m) if rho is None else first & (n > 0)[segment] if rho_of_sequence else m
    rhos = torch.zeros_like(d) if rho is None else rho.where(of_weight, 0.0)
    values |= dict(
        weights=of_weight.sum().to(dtype),
        weight=rhos.sum(),
        weight_squared=(rhos * rhos).sum(),
        weight_min=_extreme(rhos, of_weight, False),
        weight_max=_extreme(rhos, of_weight, True),
    )
    grads = scale * torch.stack([d_logprob, d_entropy] if s.entropy_coef != 0 else [d_logprob])[:, given]
    stats = torch.stack([values[name] for name in NAMES])
    return values["loss"].clone(), stats, grads, grads.new_ones(grads.shape[0])


class Term(NamedTuple):
    """One entry per token. The flags are counted in the statistics."""

    x: Tensor  # the loss of the token
    by_log_w: Tensor  # its derivative by the logarithm of the ratio
    by_logp: Tensor  # its derivative by the token's log-prob, apart from the one through the ratio
    below: Tensor  # the ratio is below its lower bound, or above its upper one
    above: Tensor
    capped: Tensor  # the ratio is held by dual_clip or ratio_cap


def _surrogate(s: LossSpec, logp: Tensor, old: Tensor, w: Tensor, adv: Tensor, phi: Tensor | None) -> Term:
    """The surrogates of loss_spec.py. For gmpo, and if ratios are per sequence, w is the ratio of the token's
    sequence."""
    clip_low, clip_high, cap = (_or(x, math.inf) for x in (s.clip_low, s.clip_high, s.ratio_cap))
    lowest, highest = 1 - clip_low, 1 + clip_high
    nothing, never = torch.zeros_like(w), torch.zeros_like(w, dtype=torch.bool)
    if s.surrogate == "clip":
        capped, w_capped, inside = w > cap, w.clamp(max=cap), (w >= lowest) & (w <= highest)
        one, two = -w_capped * adv, -w.clamp(lowest, highest) * adv
        x = torch.maximum(one, two)
        by_log_w = torch.where(one >= two, ~capped, inside) * (-adv * w)
        if s.dual_clip is not None:
            dual = (adv < 0) & (x > -s.dual_clip * adv)
            x = torch.where(dual, -s.dual_clip * adv, x)
            by_log_w, capped = by_log_w.masked_fill(dual, 0.0), capped | dual
        return Term(x, by_log_w, nothing, w_capped < lowest, w_capped > highest, capped)  # bounds are counted as in TRL
    if s.surrogate == "sapo":
        positive, other = s.sapo_temperatures
        t = torch.where(adv > 0, positive, other).to(w.dtype)
        gate = torch.sigmoid(t * (w - 1))
        by_log_w = -4 * adv * gate * torch.sigmoid(-t * (w - 1)) * w
        return Term(-4 / t * gate * adv, by_log_w, nothing, never, never, never)
    if s.surrogate == "gmpo":
        d = logp - old
        return Term(-adv * w, -adv * w, nothing, d < -clip_low, d > clip_high, never)
    if s.surrogate == "cispo":
        by_logp = -w.clamp(lowest, highest) * adv
        return Term(by_logp * logp, nothing, by_logp, w < lowest, w > highest, never)
    if s.surrogate in ("vespo", "reinforce"):
        by_logp = -adv if phi is None else -phi * adv
        return Term(by_logp * logp, nothing, by_logp, never, never, never)
    p, q = logp.exp(), old.exp()
    if s.surrogate == "dppo_tv":
        above, below = p - q > clip_high, p - q < -clip_low
    else:
        kl = q * (old - logp) + (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
        above, below = (kl > clip_high) & (p > q), (kl > clip_low) & (p < q)
    keep = ~torch.where(adv > 0, above, below)
    by_logp = -adv * w.clamp(max=cap) * keep
    return Term(by_logp * logp, nothing, by_logp, below, above, (w > cap) & keep)


def _kl(s: LossSpec, delta: Tensor) -> tuple[Tensor, Tensor]:
    """The KL estimate from delta = log pi_ref - log pi, and its derivative by log pi."""
    estimator = s.kl.removesuffix("+")
    if estimator == "k3":
        clamp = _or(s.kl_log_clamp, math.inf)
        held = delta.clamp(-clamp, clamp)
        growth = held.clamp(max=SATURATION).exp()
        kl, slope = growth - held - 1, (1 - growth).masked_fill(delta.abs() > clamp, 0.0)
    elif estimator == "k2":
        kl, slope = delta * delta / 2, -delta
    elif estimator == "abs":
        kl, slope = delta.abs(), -delta.sign()
    else:
        kl, slope = -delta, torch.ones_like(delta)
    if s.kl_clamp is not None:
        slope = slope.where(kl.abs() <= s.kl_clamp, 0.0)
        kl = kl.clamp(-s.kl_clamp, s.kl_clamp)
    return kl, -delta if s.kl.endswith("+") else slope


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def _extreme(x: Tensor, among: Tensor, largest: bool) -> Tensor:
    """The largest or smallest x where `among`; -inf or inf if there is none."""
    x = x.masked_fill(~among, -math.inf if largest else math.inf)
    if x.shape[0] == 0:
        return x.new_tensor(-math.inf if largest else math.inf)
    return x.max() if largest else x.min()
