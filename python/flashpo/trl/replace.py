"""Lets `from trl import GRPOTrainer` give FlashPO's class, so that scripts do not have to be edited."""

import importlib
import os
import sys
from types import ModuleType

from flashpo._hosts.report import of_trainer
from flashpo._hosts.trl import TRAINERS, lacks

handed_out: set[str] = set()  # the names that the script has asked for


def replace_trainers(name: str) -> None:
    """From now on the imported package `trl` or `trl.trainer` gives FlashPO's trainers instead of TRL's.

    TRL imports a class when it is first asked for, and so do we. Classes that are imported from the module of a trainer
    (`trl.trainer.grpo_trainer`) stay TRL's; TRL's experimental trainers import their base classes in this way.
    """
    package = sys.modules[name]
    lazy: type[ModuleType] = type(package)

    class Replaced(lazy):  # type: ignore[misc, valid-type]
        def __getattr__(self, attribute: str):
            if attribute not in TRAINERS or lacks(attribute):
                return super().__getattr__(attribute)  # type: ignore[misc]  # TRL's lazy import
            value = getattr(importlib.import_module("flashpo.trl"), attribute)
            if attribute not in handed_out and os.environ.get("RANK", "0") == "0":
                for seam in of_trainer(attribute):
                    if seam.reason:
                        print(f"flashpo: {seam}", file=sys.stderr)
            handed_out.add(attribute)
            setattr(self, attribute, value)
            return value

    for attribute in TRAINERS:
        vars(package).pop(attribute, None)  # if it was imported before
    package.__class__ = Replaced
