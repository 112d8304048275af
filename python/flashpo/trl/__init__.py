"""TRL made fast: `from flashpo.trl import GRPOTrainer`, or `patch()` for code one does not own.

Importing this package does not import TRL yet: a script may still want to set its environment first.
"""

import importlib

from flashpo._hosts.trl import PatchError
from flashpo.trl.acceleration import accelerate
from flashpo.trl.patch import patch, patched, unpatch
from flashpo.trl.verify import VerificationError, verify

_MODULES = {  # where the classes are
    **dict.fromkeys(("SFTTrainer", "DPOTrainer", "KTOTrainer", "RewardTrainer"), "trainers"),
    "GRPOTrainer": "grpo",
    "RLOOTrainer": "rloo",
    "DistillationTrainer": "distillation",
    **dict.fromkeys(
        ("SFTConfig", "DPOConfig", "KTOConfig", "RewardConfig", "GRPOConfig", "RLOOConfig", "DistillationConfig"),
        "config",
    ),
    "PPOTrainer": "ppo",
    "PPOConfig": "ppo_config",
}
__all__ = ["PatchError", "VerificationError", "accelerate", "patch", "patched", "unpatch", "verify", *_MODULES]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"flashpo.trl.{_MODULES[name]}"), name)
