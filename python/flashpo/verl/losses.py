"""verl's policy losses, computed by `flashpo.policy_loss`, with the arguments, gradients and metrics of verl 0.9.1.

They differ from verl only where verl would be NaN or infinite. A micro-batch without live tokens gives 0. A NaN at a
masked position is ignored. A ratio that overflows saturates; in verl only geo_mean does not clamp it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask

from flashpo.ops._wide import wide
from flashpo.ops.policy_loss import policy_loss
from flashpo.ops.policy_stats import NAMES

AGGREGATION = {  # verl's loss_agg_mode -> ours
    "token-mean": "token_mean",
    "token-sum": "token_sum",
    "seq-mean-token-mean": "sequence_mean",
    "seq-mean-token-sum": "sequence_sum",
    "seq-mean-token-sum-norm": "sequence_sum",  # divided by a constant, which is part of `scale`
}
CLIPPED = ("clip_low", "clip_high")  # counts tokens whose gradient is stopped by clipping
OUTSIDE = ("below", "above")  # counts tokens whose ratio is outside the bounds, for either sign of the advantage


@dataclass(frozen=True)
class VerlLoss:
    """A policy loss with the call that verl makes: padded tensors (B, T) and an ActorConfig give `(loss, metrics)`.

    Args:
        preset: The name of the loss in `flashpo.LOSSES`.
        options: Takes the fields of the LossSpec from verl's config.
        clipfrac, clipfrac_lower: Which counts verl logs under these names as shares of the tokens. An empty tuple logs
            0; None logs nothing.
        kl: Whether verl logs `actor/ppo_kl`.
        default_mode: The aggregation where loss_agg_mode is not given.
        only_mode: The aggregation that verl uses whatever loss_agg_mode is; None: loss_agg_mode decides.
    """

    preset: str
    options: Callable[[Any], dict[str, Any]]
    clipfrac: tuple[str, ...] | None = CLIPPED
    clipfrac_lower: tuple[str, ...] | None = ()
    kl: bool = True
    default_mode: str = "token-mean"
    only_mode: str | None = None

    def __call__(
        self,
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str | None = None,
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        if config is None:
            raise ValueError("config must be verl's ActorConfig, got None")
        mode = self.only_mode or loss_agg_mode or self.default_mode
        loss, stats = policy_loss(
            wide(log_prob),
            wide(old_log_prob),
            wide(advantages),
            live(response_mask),
            loss=self.preset,
            importance_ratio=None if rollout_is_weights is None else wide(rollout_is_weights),
            **aggregation(mode, log_prob.shape[1], config.global_batch_info),
            **self.options(config),
        )
        return loss, self.metrics(dict(zip(NAMES, stats.values.tolist(), strict=True)))

    def metrics(self, counts: dict[str, float]) -> dict[str, float]:
        tokens = max(counts["tokens"], 1.0)
        sums = {
            "actor/pg_clipfrac": self.clipfrac,
            "actor/ppo_kl": ("approx_kl",) if self.kl else None,
            "actor/pg_clipfrac_lower": self.clipfrac_lower,
        }
        return {
            key: sum((counts[name] for name in names), 0.0) / tokens for key, names in sums.items() if names is not None
        }


def aggregation(mode: str, width: int, global_batch_info: Any) -> dict[str, Any]:
    """The arguments of `policy_loss` that aggregate as verl's `agg_loss(loss_agg_mode=mode, **global_batch_info)`.

    `width` is the number of tokens T of the padded tensors.
    """
    if mode not in AGGREGATION:
        raise ValueError(f"loss_agg_mode must be one of {tuple(AGGREGATION)}, got {mode!r}")
    info: dict[str, Any] = dict(dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None)
    if unknown := set(global_batch_info) - set(info):
        raise ValueError(f"config.global_batch_info holds {sorted(unknown)}; known are {sorted(info)}")
    info |= dict(global_batch_info)
    scale = info["dp_size"]
    count = {"token-mean": "batch_num_tokens", "token-sum": None}.get(mode, "global_batch_size")
    if count is not None and info[count] is None and scale > 1:
        raise ValueError(f"loss_agg_mode={mode!r} needs global_batch_info[{count!r}] where dp_size is {scale}")
    if mode == "seq-mean-token-sum-norm":
        scale = scale / (width if info["loss_scale_factor"] is None else info["loss_scale_factor"])
    return {
        "aggregation": AGGREGATION[mode],
        "empty_sequences": "excluded",
        "num_items": None if count is None else info[count],
        "scale": scale,
    }


def live(mask: Tensor) -> Tensor:
    """A mask of verl as bool. Some of its masks are float."""
    if mask.is_floating_point():
        fine = ((mask == 0) | (mask == 1)).all()
        if mask.device.type != "cpu":
            torch._assert_async(fine, "response_mask holds values other than 0 and 1")
        elif not fine:
            raise ValueError("response_mask holds values other than 0 and 1")
    return mask.bool()


def clip(config: Any) -> dict[str, Any]:
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return {
        "clip_low": config.clip_ratio if low is None else low,
        "clip_high": config.clip_ratio if high is None else high,
    }


def dual_clip(config: Any) -> dict[str, Any]:
    return clip(config) | {"dual_clip": config.get("clip_ratio_c", 3.0)}


def divergence(config: Any) -> dict[str, Any]:
    return clip(config) | {"ratio_cap": config.get("clip_ratio_c", 20.0)}


def temperatures(config: Any) -> dict[str, Any]:
    return {"sapo_temperatures": (config.tau_pos, config.tau_neg)}


vanilla = VerlLoss("verl_ppo", dual_clip, clipfrac_lower=("capped",))
gspo = VerlLoss("verl_gspo", clip, default_mode="seq-mean-token-mean")
cispo = VerlLoss("verl_cispo", clip, clipfrac=OUTSIDE)
sapo = VerlLoss("verl_sapo", temperatures, clipfrac=(), only_mode="seq-mean-token-mean")
dppo_tv = VerlLoss("verl_dppo_tv", divergence, clipfrac_lower=("capped",))
dppo_kl = VerlLoss("verl_dppo_kl", divergence, clipfrac_lower=("capped",))
gpg = VerlLoss("reinforce", lambda config: {}, clipfrac=None, clipfrac_lower=None, kl=False)
reinforce = VerlLoss("reinforce", lambda config: {}, clipfrac=None, clipfrac_lower=None)


def geo_mean(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """GMPO. As in verl, loss_agg_mode and the global batch are not used: the loss is the mean over this call's
    sequences."""
    if config is None:
        raise ValueError("config must be verl's ActorConfig, got None")
    mask = live(response_mask)
    weights = rollout_is_weights
    if weights is not None:  # the weight of a sequence is the geometric mean over its tokens
        log_weights = torch.where(mask, (wide(weights) + 1e-10).log(), 0.0)
        weights = (log_weights.sum(-1) / mask.sum(-1).clamp(min=1)).exp()
    bounds = clip(config)
    loss, stats = policy_loss(
        wide(log_prob),
        wide(old_log_prob),
        wide(advantages),
        mask,
        loss="verl_gmpo",
        importance_ratio=weights,
        **bounds,
    )
    d = log_prob.detach() - old_log_prob
    outside = mask & ((d < -bounds["clip_low"]) | (d > bounds["clip_high"]))
    tokens = stats.tokens.clamp(min=1)
    higher, lower = (outside & (advantages > 0)).sum() / tokens, (outside & (advantages < 0)).sum() / tokens
    keys = "actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"
    return loss, dict(zip(keys, torch.stack([higher, stats.approx_kl, lower]).tolist(), strict=True))


def dro(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """DRO: REINFORCE plus a penalty of dro_beta times half the squared log-ratio to the old policy (k2)."""
    if rollout_is_weights is not None:
        raise ValueError("rollout_is_weights: the penalty of flashpo_dro takes no importance weights")
    if config is None or not config.policy_loss.dro_beta or config.policy_loss.dro_beta < 0:
        raise ValueError("config.policy_loss.dro_beta must be positive for flashpo_dro")
    old = wide(old_log_prob)
    loss, stats = policy_loss(
        wide(log_prob),
        old,
        wide(advantages),
        live(response_mask),
        loss="reinforce",
        ref_logprob=old,
        kl="k2",
        kl_coef=config.policy_loss.dro_beta,
        **aggregation(loss_agg_mode, log_prob.shape[1], config.global_batch_info),
    )
    return loss, {"actor/ppo_kl": stats.approx_kl.item()}


def bypass_mode(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """verl's bypass mode: old_log_prob is the rollout's, so that there are two policies instead of three.

    verl's own code computes importance weights and rejections; then REINFORCE or PPO follows. As in verl,
    rollout_is_weights is not used: the weights are computed with the current policy.
    """
    settings = None if config is None else config.policy_loss.get("rollout_correction")
    if settings is None:
        raise ValueError("config.policy_loss.rollout_correction is needed for flashpo_bypass_mode")
    kind = settings.get("loss_type", "ppo_clip")
    if kind not in ("ppo_clip", "reinforce"):
        raise ValueError(f"rollout_correction.loss_type must be 'reinforce' or 'ppo_clip', got {kind!r}")
    with torch.no_grad():
        weights, mask, metrics = compute_rollout_correction_and_rejection_mask(
            old_log_prob=log_prob,
            rollout_log_prob=old_log_prob,
            response_mask=response_mask,
            rollout_is=settings.get("rollout_is"),
            rollout_is_threshold=settings.get("rollout_is_threshold", 2.0),
            rollout_is_batch_normalize=settings.get("rollout_is_batch_normalize", False),
            rollout_rs=settings.get("rollout_rs"),
            rollout_rs_threshold=settings.get("rollout_rs_threshold"),
        )
    args = old_log_prob, log_prob, advantages, mask, loss_agg_mode, config
    if kind == "reinforce":
        loss, own = reinforce(*args, rollout_is_weights=weights.batch["rollout_is_weights"] if weights else None)
    else:  # the clipped surrogate includes the ratio to the rollout already
        loss, own = vanilla(*args)
    return loss, own | metrics


POLICY_LOSSES: dict[str, Callable] = {
    "vanilla": vanilla,
    "gspo": gspo,
    "cispo": cispo,
    "sapo": sapo,
    "dppo_tv": dppo_tv,
    "dppo_kl": dppo_kl,
    "geo_mean": geo_mean,
    "gpg": gpg,
    "dro": dro,
    "bypass_mode": bypass_mode,
}
