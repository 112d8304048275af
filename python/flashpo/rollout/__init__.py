"""Generation with a KV cache on the trainer's live weights: every distinct prompt token is computed and cached once."""

from flashpo.rollout.params import Rollouts, RolloutStats, SamplingParams

__all__ = ["RolloutStats", "Rollouts", "SamplingParams"]
