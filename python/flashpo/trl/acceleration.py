"""`flashpo.trl.accelerate()`: in a notebook or a script what `flashpo run` does around one."""

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
    """Let `from trl import GRPOTrainer` give FlashPO's trainers from now on, and TRL's other trainers score with it.

    Call it before names are imported from `trl`. After each training a table tells what ran and where its time went.

    Args:
        rollout: generate with FlashPO's engine; False: TRL generates.
        trees: run models on token trees; False: on padded rows.
        head: FlashPO's LM head and log-probs; False: TRL's, and with them padded rows.
        verify: so many optimization steps of each training are first taken by TRL's code and by FlashPO's, and compared
            (`flashpo.trl.verify`).
        report: the path of a JSON file that gets the numbers of the table after each training.
        verbose: with the number of calls of every operator.

    Raises:
        TypeError, ValueError: naming the argument.
        VerificationError: from a trainer's `train`, where TRL and FlashPO disagree.
    """
    chosen = switches.Switches(rollout, trees, head, verify, report, verbose)
    switches.use(chosen)
    install()
    from flashpo.trl import report as reports

    if show not in reports.after:
        reports.after.append(show)


def show() -> None:
    """The table, and the file that was asked for."""
    from flashpo.trl import report as reports

    if not start.is_first_process():
        return
    for line in reports.lines() + (operators() if switches.current().verbose else []):
        print(f"flashpo: {line}", file=sys.stderr)
    write(finished=True)


def operators() -> list[str]:
    """The calls of each, by backend."""
    return [f"{op}: " + ", ".join(f"{n} x {backend}" for backend, n in used.items()) for op, used in stats().items()]


def write(finished: bool) -> None:
    """The file of `--report`, if there is to be one; an empty table where no trainer was imported."""
    path = switches.current().report
    if path is None:
        return
    reports = sys.modules.get("flashpo.trl.report")
    numbers: dict[str, Any] = reports.as_dict() if reports else {"trainers": []}
    with open(path, "w") as file:
        json.dump({"finished": finished, "switches": vars(switches.current())} | numbers, file, indent=2)
        file.write("\n")


def install() -> None:
    """Act on TRL's modules as soon as they are imported, not before: a script may first set variables that libraries
    read then."""
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
    except PatchError as error:  # the trainers that the script gets do without
        if start.is_first_process():
            print(f"flashpo: {error}", file=sys.stderr)
