"""What a user turns off, or asks for, beside a script that is not edited: `flashpo run --no-trees script.py`.

The same words stand in the variable FLASHPO_OPTIONS, for launchers that start the processes, and are arguments of
`flashpo.trl.accelerate`. They hold for the whole process and every trainer of it.
"""

import argparse
import os
import shlex
from dataclasses import dataclass, replace
from typing import Any, NoReturn

VARIABLE = "FLASHPO_OPTIONS"
VALUED = ("--verify", "--report")  # a word follows


@dataclass(frozen=True)
class Switches:
    """Read by the trainers' parts where they decide what runs."""

    rollout: bool = True
    trees: bool = True
    head: bool = True
    verify: int = 0  # optimization steps that are compared before a training begins
    report: str | None = None  # the path of a JSON file
    verbose: bool = False

    def __post_init__(self):
        for name in ("rollout", "trees", "head", "verbose"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.verify, int) or isinstance(self.verify, bool) or self.verify < 0:
            raise ValueError(f"verify must be a number of steps, 0 for none, got {self.verify!r}")
        if not isinstance(self.report, str | None):
            raise TypeError(f"report must be a path or None, got {self.report!r}")

    @property
    def why_no_rollout(self) -> str:
        return "" if self.rollout else "--no-rollout"

    @property
    def why_no_trees(self) -> str:
        """Token trees are scored by FlashPO's head, so that they go with it."""
        return "--no-trees" if not self.trees else "" if self.head else "--no-head"

    def off(self) -> list[str]:
        return [f"--no-{name}" for name in ("rollout", "trees", "head") if not getattr(self, name)]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    for name in ("rollout", "trees", "head"):
        parser.add_argument(f"--no-{name}", dest=name, action="store_false", default=None)
    parser.add_argument("--verify", type=int, metavar="STEPS")
    parser.add_argument("--report", metavar="PATH")
    parser.add_argument("--verbose", action="store_true", default=None)
    return parser


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The options in front of a script, and the script with its own."""
    i = 0
    while i < len(arguments) and arguments[i].startswith("--"):
        i += 2 if arguments[i] in VALUED else 1
    return arguments[:i], arguments[i:]


def parse(words: list[str], beside: Switches) -> Switches:
    """`beside` with what the words change.

    Raises:
        ValueError: a word is none of ours, or lacks its value.
    """
    given = {name: value for name, value in vars(_parser().parse_args(words)).items() if value is not None}
    return replace(beside, **given)


def of_environment() -> Switches:
    try:
        return parse(shlex.split(os.environ.get(VARIABLE, "")), Switches())
    except ValueError as error:
        raise ValueError(f"{VARIABLE}: {error}") from None


_current: Switches | None = None


def current() -> Switches:
    """Those of the process: what `use` has set, else the variable's."""
    global _current
    if _current is None:
        _current = of_environment()
    return _current


def use(switches: Switches | None = None, **changes: Any) -> None:
    """From now on; `changes` of the current ones by their names. None without changes: the variable's again."""
    global _current
    _current = replace(switches or current(), **changes) if switches or changes else None
