"""Options that a user sets without editing the script, such as `flashpo run --no-trees script.py`.

The environment variable FLASHPO_OPTIONS takes the same options, for launchers that start the processes, and
`flashpo.trl.accelerate` has them as arguments. They hold for the whole process and all of its trainers.
"""

import argparse
import os
import shlex
from dataclasses import dataclass, replace
from typing import Any, NoReturn

VARIABLE = "FLASHPO_OPTIONS"
VALUED = ("--verify", "--report")  # options that are followed by a value


@dataclass(frozen=True)
class Switches:
    """The options. The parts of the trainers read them when they decide what runs."""

    rollout: bool = True
    trees: bool = True
    head: bool = True
    verify: int = 0  # how many optimizer steps are compared before each training
    report: str | None = None  # the path of the JSON file to write
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
        """The option that turns off token trees. `--no-head` does, too, because trees are scored by FlashPO's head."""
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
    """Split a command line into the options before the script, and the script with its arguments."""
    i = 0
    while i < len(arguments) and arguments[i].startswith("--"):
        i += 2 if arguments[i] in VALUED else 1
    return arguments[:i], arguments[i:]


def parse(words: list[str], before: Switches) -> Switches:
    """The switches of `before`, changed as the words say.

    Raises:
        ValueError: a word is not one of our options, or lacks its value.
    """
    given = {name: value for name, value in vars(_parser().parse_args(words)).items() if value is not None}
    return replace(before, **given)


def of_environment() -> Switches:
    try:
        return parse(shlex.split(os.environ.get(VARIABLE, "")), Switches())
    except ValueError as error:
        raise ValueError(f"{VARIABLE}: {error}") from None


_current: Switches | None = None


def current() -> Switches:
    """The switches of the process: those that `use` has set, otherwise those of FLASHPO_OPTIONS."""
    global _current
    if _current is None:
        _current = of_environment()
    return _current


def use(switches: Switches | None = None, **changes: Any) -> None:
    """Set the switches of the process.

    Args:
        switches: the new switches; None: the current ones, with the changes below.
        changes: values by the names of switches. With neither argument, FLASHPO_OPTIONS holds again.
    """
    global _current
    _current = replace(switches or current(), **changes) if switches or changes else None
