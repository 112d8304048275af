"""TRL made fast: `from flashpo.trl import GRPOTrainer`, or `patch()` for code one does not own.

Importing this package does not import TRL yet: a script may still want to set its environment first.
"""

import importlib

from flashpo.trl.patch import PatchError, patch, patched, unpatch
from flashpo.trl.verify import VerificationError, verify

_TRAINERS = ("SFTTrainer", "DPOTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer")
__all__ = ["PatchError", "VerificationError", "patch", "patched", "unpatch", "verify", *_TRAINERS]


def __getattr__(name: str):
    if name not in _TRAINERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("flashpo.trl.trainers"), name)
