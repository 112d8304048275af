"""Generation with a KV cache on the trainer's live weights: every distinct prompt token is computed and cached once."""

from flashpo.rollout.engine import RolloutEngine
from flashpo.rollout.params import Rollouts, RolloutStats, SamplingParams
from flashpo.rollout.seam import ModelInUse
from flashpo.rollout.support import support

__all__ = ["ModelInUse", "RolloutEngine", "RolloutStats", "Rollouts", "SamplingParams", "support"]
