"""`flashpo.trl.accelerate()`: does from within a notebook or a script what `flashpo run` does from outside."""

import json
import sys
from typing import Any

from flashpo._hosts.trl import PatchError
from flashpo._on_import import when_imported
from flashpo._op import stats
from flashpo.trl import start, switches
from flashpo.trl.patch import patch
from flashpo.trl.replace import replace_trainers

MODULES = ("trl", "trl.trainer", "trl.trainer.utils")


def accelerate(
    *,
    rollout: bool = True,
    trees: bool = True,
    head: bool = True,
    verify: int = 0,
    report: str | None = None,
    verbose: bool = False,
) -> None:
    """From now on `from trl import GRPOTrainer` gives FlashPO's trainer, and TRL's other trainers use its log-probs.

    Call it before you import names from `trl`. After each training a table is printed that says which parts of FlashPO
    ran and how much time each part took.

    Args:
        rollout: True: FlashPO's rollout engine generates. False: TRL generates.
        trees: True: models run on token trees. False: models run on padded rows.
        head: True: FlashPO computes the LM head and the log-probs. False: TRL does, and models run on padded rows.
        verify: how many optimizer steps to compare with TRL's code before each training (`flashpo.trl.verify`).
        report: the path of a JSON file, into which the numbers of the table are written after each training.
        verbose: also print how often each operator was called.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        VerificationError: raised by `train` of a trainer for which TRL and FlashPO disagree (only with `verify`).
    """
    chosen = switches.Switches(rollout, trees, head, verify, report, verbose)
    switches.use(chosen)
    install()
    from flashpo.trl import report as reports

    if show not in reports.after:
        reports.after.append(show)


def show() -> None:
    """Print the table, and write the file of `report` if there is one."""
    from flashpo.trl import report as reports

    if not start.is_first_process():
        return
    for line in reports.lines() + (operators() if switches.current().verbose else []):
        print(f"flashpo: {line}", file=sys.stderr)
    write(finished=True)


def operators() -> list[str]:
    """One line for each operator: how often each backend was called."""
    return [f"{op}: " + ", ".join(f"{n} x {backend}" for backend, n in used.items()) for op, used in stats().items()]


def write(finished: bool) -> None:
    """Write the file of `--report`, if one was asked for. It lists no trainer if none was imported."""
    path = switches.current().report
    if path is None:
        return
    reports = sys.modules.get("flashpo.trl.report")
    numbers: dict[str, Any] = reports.as_dict() if reports else {"trainers": []}
    with open(path, "w") as file:
        json.dump({"finished": finished, "switches": vars(switches.current())} | numbers, file, indent=2)
        file.write("\n")


def install() -> None:
    """Act on TRL's modules as soon as they are imported.

    They are not imported here, because a script may first set environment variables that libraries read on import.
    """
    for name in MODULES:
        when_imported(name, _act)


def _act(name: str) -> None:
    if name != "trl.trainer.utils":
        replace_trainers(name)
        return
    from flashpo.trl import report as reports

    reports.watch_trainers()
    try:
        patch()
    except PatchError as error:  # FlashPO's trainers still work with this TRL, only without the replaced scoring
        if start.is_first_process():
            print(f"flashpo: {error}", file=sys.stderr)
