"""The rollout engine: it samples completions with the weights that a trainer is training.

Each distinct prompt token is computed once, and its keys and values are cached once for all completions that need them.
"""

from flashpo.rollout.engine import RolloutEngine
from flashpo.rollout.params import Rollouts, RolloutStats, SamplingParams
from flashpo.rollout.seam import ModelInUse
from flashpo.rollout.support import support

__all__ = ["ModelInUse", "RolloutEngine", "RolloutStats", "Rollouts", "SamplingParams", "support"]
