"""Metrics of GRPO, RLOO and PPO.

Statistics stay on the device until they are logged, so that the host does not wait for them at each step; TRL reduces
and reads about a dozen numbers for each micro-batch. In addition to TRL's metrics there are `ratio/q01` and
`ratio/q99`: 98 % of the ratios lie between them, see `PolicyStats.ratio_quantile`.
"""

import math
from typing import Any

import torch
from torch import Tensor

from flashpo.ops.policy_stats import PolicyStats
from flashpo.trl.accelerated import overridden
from flashpo.trl.advantages import GroupComparing
from flashpo.trl.rollout import MISMATCH, merged, mismatch_metrics


class PolicyMetrics(GroupComparing):
    """The part of a policy trainer that logs; to be combined with a TRL class."""

    router_aux_loss_coef: Any

    def _metrics_of(self, stats: PolicyStats) -> dict[str, float]:
        """TRL's metrics of one micro-batch, from the statistics of all ranks."""
        raise NotImplementedError

    def flush_metrics(self) -> None:
        """Move the pending statistics into `_metrics`, with two collectives for all micro-batches together."""
        for mode, pending in self._pending.stats.items():
            if not pending:
                continue
            table = PolicyStats(torch.stack([stats.values for stats in pending], dim=1))
            if self.accelerator.num_processes > 1:
                table = table.reduce()
            for values in table.values.cpu().unbind(1):
                stats = PolicyStats(values)
                for name, value in (self._metrics_of(stats) | ratio_metrics(stats)).items():
                    self._metrics[mode][name].append(value)
            pending.clear()
            if self._rollouts.mode != "generate":
                self._flush_mismatch(mode)

    def _flush_mismatch(self, mode: str) -> None:
        """Log the mismatch. Every rank contributes a row, with 0 tokens if it compared none: the engine may have
        generated on some ranks only."""
        compared = self._pending.mismatch[mode]
        none = torch.zeros(len(MISMATCH) + 1, device=self.accelerator.device)
        rows = self.accelerator.gather(merged(torch.stack(compared or [none]))[None])
        for name, value in mismatch_metrics(rows).items():
            self._metrics[mode][name].append(value)
        compared.clear()

    def log(self, logs, *args, **kwargs):
        self.flush_metrics()
        return super().log(logs, *args, **kwargs)

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if overridden(self, "log"):
            self.flush_metrics()  # the subclass's `log` may read `_metrics` before it calls ours, or never call it
        return loss

    def _add_aux_loss(self, loss: Tensor, aux_loss: Tensor | None, scale: float) -> Tensor:
        if not self.aux_loss_enabled:
            return loss
        self._metrics[self._mode]["aux_loss"].append(self.accelerator.gather_for_metrics(aux_loss).mean().item())
        return loss + self.router_aux_loss_coef * aux_loss * scale


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
