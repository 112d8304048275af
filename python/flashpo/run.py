"""Runs an unmodified TRL script, accelerated: `python -m flashpo.run script.py [args]`, or `... trl grpo [args]`.

For several processes: `accelerate launch -m flashpo.run script.py [args]`. At the end, also of a script that failed,
says what ran on which backend and how often.
"""

import dataclasses
import importlib.util
import os
import runpy
import sys

from flashpo._on_import import when_imported
from flashpo._op import check_environment, stats

MODULES = ("trl", "trl.trainer", "trl.trainer.utils")
TRLS_SCRIPTS = "trl.scripts."
USAGE = """usage: flashpo run script.py [args ...]
       flashpo run -m module [args ...]
       flashpo run trl grpo|sft|dpo ... [args ...]    a script of TRL's command line, in this process"""


def accelerate(name: str) -> None:
    """What is done to a module of TRL that has been imported."""
    from flashpo._hosts.trl import PatchError
    from flashpo.trl.patch import patch
    from flashpo.trl.replace import replace_trainers

    if name != "trl.trainer.utils":
        replace_trainers(name)
        return
    from flashpo.trl.report import watch_trainers

    watch_trainers()
    try:
        patch()
    except PatchError as error:  # the trainers that the script gets do without
        if os.environ.get("RANK", "0") == "0":
            print(f"flashpo: {error}", file=sys.stderr)


def main(argv: list[str]) -> int:
    """Run `argv[0]` with the arguments after it as if it were `python argv[0] ...`, with TRL patched."""
    try:
        check_environment()
        if argv[:1] == ["trl"] and len(argv) > 1 and not os.path.isfile("trl"):
            argv = ["-m", _script_of_trl(argv[1]), *argv[2:]]
    except ValueError as error:
        print(f"flashpo run: {error}", file=sys.stderr)
        return 2
    if argv[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if not argv or argv == ["-m"]:
        print(USAGE, file=sys.stderr)
        return 2
    module = argv[0] == "-m"
    script, arguments = (argv[1], argv[2:]) if module else (argv[0], argv[1:])
    if not module and not os.path.isfile(script):
        print(f"flashpo run: no such file: {script}", file=sys.stderr)
        return 2
    for name in MODULES:  # not before: the script may first set variables that libraries read when they are imported
        when_imported(name, accelerate)
    sys.argv = [script, *arguments]
    sys.path[0] = os.getcwd() if module else os.path.dirname(os.path.abspath(script))
    if module and not _exists(script):
        print(f"flashpo run: no such module: {script}", file=sys.stderr)
        return 2
    finished = False
    try:
        if module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script, run_name="__main__")
        finished = True
    except SystemExit as end:
        finished = not end.code
        raise
    finally:
        if os.environ.get("RANK", "0") == "0":
            print(summary(finished), file=sys.stderr)
            if not finished and module and script.startswith(TRLS_SCRIPTS):
                for note in _notes_on(arguments):
                    print(note, file=sys.stderr)
    return 0


def _script_of_trl(command: str) -> str:
    """The module of `trl COMMAND`, found without importing TRL."""
    package = importlib.util.find_spec("trl")
    if package is None or package.origin is None:
        raise ValueError("trl is not installed")
    folder = os.path.join(os.path.dirname(package.origin), "scripts")
    names = sorted(name for name, extension in map(os.path.splitext, os.listdir(folder)) if extension == ".py")
    commands = [name for name in names if not name.startswith("_") and name != "utils"]
    if (name := command.replace("-", "_")) not in commands:
        raise ValueError(f"trl has no command {command!r}; it has {', '.join(commands)}")
    return TRLS_SCRIPTS + name


def _exists(module: str) -> bool:
    """Imports the packages that the module is in, as running it does."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError as error:
        if f"{module}.".startswith(f"{error.name}."):
            return False
        raise  # of a package that exists and imports something that does not


def _notes_on(arguments: list[str]) -> list[str]:
    """A line for each option that only FlashPO's configurations have: TRL's scripts do not read those."""
    import trl

    from flashpo.trl.config import GRPOConfig

    ours = {field.name for field in dataclasses.fields(GRPOConfig)}
    ours -= {field.name for field in dataclasses.fields(trl.GRPOConfig)}
    given = {argument.removeprefix("--").partition("=")[0] for argument in arguments if argument.startswith("--")}
    return [
        f"flashpo: --{name} is an option of the configurations in flashpo.trl, which TRL's own scripts do not "
        "read: set it in a script of your own (from flashpo.trl import GRPOConfig)"
        for name in sorted(ours & given)
    ]


def summary(finished: bool = True) -> str:
    """What of ours ran in this process, one line a trainer and one an operator; `finished`: the script came to its
    end."""
    from flashpo.trl.replace import handed_out

    report = sys.modules.get("flashpo.trl.report")  # there once the script has imported a trainer
    trainers: list[str] = report.lines() if report else []
    counts = stats()
    lines = [f"flashpo: {op}: " + ", ".join(f"{n} x {b}" for b, n in used.items()) for op, used in counts.items()]
    if counts and handed_out:
        lines.insert(0, f"flashpo: in the place of TRL's classes: {', '.join(sorted(handed_out))}")
    if not counts and not finished:
        lines = ["flashpo: none of its operators ran in this process before the script ended with an error"]
    elif not counts:
        imported = "trl.trainer.utils" in sys.modules
        why = "no trainer ran" if imported else "the script did not import a TRL trainer"
        why = "see the trainers" if trainers else why
        lines = [f"flashpo: WARNING: none of its operators ran in this process: {why}; nothing was accelerated"]
    return "\n".join(trainers + lines)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
