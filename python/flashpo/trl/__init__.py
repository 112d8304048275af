"""Faster TRL: `from flashpo.trl import GRPOTrainer`, or `patch()` for a script that you do not want to edit.

Importing this package does not import TRL: a script may still want to set environment variables that TRL reads.
"""

import importlib

from flashpo._hosts.trl import TRAINERS, PatchError, lacks, version
from flashpo.trl.acceleration import accelerate
from flashpo.trl.patch import patch, patched, unpatch
from flashpo.trl.verify import VerificationError, verify

_MODULES = {  # the module that has each class
    name: module
    for kind, module in {
        "SFT": "sft", "DPO": "dpo", "KTO": "kto", "Reward": "reward", "GRPO": "grpo", "RLOO": "rloo",
        "Distillation": "distillation",
    }.items()
    for name in (f"{kind}Trainer", f"{kind}Config")
} | {"PPOTrainer": "ppo", "PPOConfig": "ppo_config"}  # fmt: skip
__all__ = ["PatchError", "VerificationError", "accelerate", "patch", "patched", "unpatch", "verify", *_MODULES]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    trainer = name.replace("Config", "Trainer")
    if trainer in TRAINERS and lacks(trainer):
        raise ImportError(f"TRL {version()} has no {trainer}, so flashpo.trl has no {name}")
    return getattr(importlib.import_module(f"flashpo.trl.{_MODULES[name]}"), name)
