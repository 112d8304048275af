"""Numbers of `PolicyStats` under the names with which trainers log them."""

import math

from flashpo.ops.policy_stats import PolicyStats


def ratio_metrics(stats: PolicyStats) -> dict[str, float]:
    return {"ratio/q01": stats.ratio_quantile(0.01).item(), "ratio/q99": stats.ratio_quantile(0.99).item()}


def clip_metrics(stats: PolicyStats) -> dict[str, float]:
    extremes = {"low_min": stats.clip_low_min.item(), "high_max": stats.clip_high_max.item()}
    return {
        "clip_ratio/low_mean": stats.clip_low.item(),
        "clip_ratio/high_mean": stats.clip_high.item(),
        "clip_ratio/region_mean": (stats.clip_low + stats.clip_high).item(),
        **{f"clip_ratio/{name}": x if math.isfinite(x) else math.nan for name, x in extremes.items()},
    }
