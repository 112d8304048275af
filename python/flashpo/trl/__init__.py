"""TRL made fast: `from flashpo.trl import GRPOTrainer`, or `patch()` for code one does not own.

Importing this package does not import TRL yet: a script may still want to set its environment first.
"""

import importlib

from flashpo.trl.patch import PatchError, patch, patched, unpatch

_TRAINERS = ("SFTTrainer", "DPOTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer")
_LAZY = {name: "trainers" for name in _TRAINERS} | {"verify": "verify", "VerificationError": "verify"}
__all__ = ["PatchError", "VerificationError", "patch", "patched", "unpatch", "verify", *_TRAINERS]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value  # also replaces the submodule that the import has just bound to the name `verify`
    return value
