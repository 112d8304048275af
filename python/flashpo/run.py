"""Run an unmodified TRL script, accelerated: `flashpo run [switches] script.py [args]`, or `... trl grpo [args]`.

For several processes use `accelerate launch -m flashpo.run script.py [args]`. At the end of the script, even if it
failed or was told to stop, a report says what ran and where the time went.
"""

import dataclasses
import importlib.util
import os
import runpy
import signal
import sys
import threading

from flashpo._op import check_environment, stats
from flashpo.trl import acceleration, start, switches
from flashpo.trl.acceleration import operators
from flashpo.trl.replace import handed_out
from flashpo.trl.start import is_first_process

TRLS_SCRIPTS = "trl.scripts."
USAGE = """usage: flashpo run [switches] script.py [args ...]
       flashpo run [switches] -m module [args ...]
       flashpo run [switches] trl grpo|sft|dpo ... [args ...]    a script of TRL's command line, in this process
       flashpo verify script.py [args ...]                       compare two steps with TRL's code, and end

switches, also in the variable FLASHPO_OPTIONS:
  --no-rollout      TRL generates
  --no-trees        padded rows, no token trees
  --no-head         TRL's LM head and log-probs, and with them padded rows
  --verify STEPS    before each training take so many steps by TRL's code and by FlashPO's, and compare
  --report PATH     write the numbers of the table at the end to a JSON file
  --verbose         the table with the calls of every operator"""


def main(argv: list[str], verify_alone: bool = False) -> int:
    """Run a script with the arguments after it as if it were `python script.py ...`, with TRL patched.

    Args:
        argv: switches; then the script, or `-m` and a module, or `trl` and a command; then its arguments.
        verify_alone: end once the first trainer has been verified. The exit status is 1 if the verification failed.

    Returns:
        The exit status.
    """
    words, argv = switches.split(argv)
    if "--help" in words or argv[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    command = "verify" if verify_alone else "run"
    try:
        check_environment()
        chosen = switches.parse(words, switches.of_environment())
        if argv[:1] == ["trl"] and len(argv) > 1 and not os.path.isfile("trl"):
            argv = ["-m", _script_of_trl(argv[1]), *argv[2:]]
    except ValueError as error:
        print(f"flashpo {command}: {error}", file=sys.stderr)
        return 2
    if not argv or argv == ["-m"]:
        print(USAGE, file=sys.stderr)
        return 2
    module = argv[0] == "-m"
    script, arguments = (argv[1], argv[2:]) if module else (argv[0], argv[1:])
    if not module and not os.path.isfile(script):
        print(f"flashpo {command}: no such file: {script}", file=sys.stderr)
        return 2
    if verify_alone:
        chosen = dataclasses.replace(chosen, verify=chosen.verify or 2)
        start.verify_alone = True
    switches.use(chosen)
    acceleration.install()
    sys.argv = [script, *arguments]
    sys.path[0] = os.getcwd() if module else os.path.dirname(os.path.abspath(script))
    if module and not _exists(script):
        print(f"flashpo {command}: no such module: {script}", file=sys.stderr)
        return 2
    arguments = arguments if module and script.startswith(TRLS_SCRIPTS) else []
    try:
        _stop_on_sigterm()
        if module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script, run_name="__main__")
    except start.Verified as end:
        return int(str(end.code))
    except _Terminated:
        _report(False, [])
        sys.stdout.flush()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)  # so that the process which started this one sees what stopped it
    except SystemExit as end:
        _report(not end.code, arguments)
        raise
    except BaseException:
        _report(False, arguments)
        raise
    if verify_alone:
        print("flashpo verify: the script trained nothing, so that nothing was verified", file=sys.stderr)
        return 1
    _report(True, [])
    return 0


class _Terminated(SystemExit):
    """SIGTERM has come: from a scheduler, or from a launcher after another of its processes has failed."""


def _stop_on_sigterm() -> None:
    """Let SIGTERM end the script like an exception, unless another handler is installed."""
    here = os.getpid()

    def stop(number: int, frame: object) -> None:
        if os.getpid() != here:  # a forked child, such as a worker of a data loader, which has no report to make
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        raise _Terminated(128 + signal.SIGTERM)

    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, stop)


def _report(finished: bool, arguments: list[str]) -> None:
    """Report at the end of a run. `arguments` are those of a failed TRL script, which may not have known them."""
    if not is_first_process():
        return
    print(summary(finished), file=sys.stderr)
    try:
        acceleration.write(finished)
    except OSError as error:
        print(f"flashpo run: --report: {error}", file=sys.stderr)
    if not finished:
        for note in _notes_on(arguments):
            print(note, file=sys.stderr)


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
    """Whether the module exists. This imports the packages that contain it, as running it does."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError as error:
        if f"{module}.".startswith(f"{error.name}."):
            return False
        raise  # the package exists, but imports something that does not


def _notes_on(arguments: list[str]) -> list[str]:
    """A line for each option that only FlashPO's configurations have and TRL's scripts do not read."""
    given = {argument.removeprefix("--").partition("=")[0] for argument in arguments if argument.startswith("--")}
    if not given:
        return []
    import trl

    from flashpo.trl.grpo import GRPOConfig

    ours = {field.name for field in dataclasses.fields(GRPOConfig)}
    ours -= {field.name for field in dataclasses.fields(trl.GRPOConfig)}
    return [
        f"flashpo: --{name} is an option of the configurations in flashpo.trl, which TRL's own scripts do not "
        "read: set it in a script of your own (from flashpo.trl import GRPOConfig)"
        for name in sorted(ours & given)
    ]


def summary(finished: bool = True) -> str:
    """A table per trainer of this process, what was left to other code, and with --verbose the calls of every operator.

    Args:
        finished: whether the script came to its end. If not, no reasons are given for what did not run.
    """
    report = sys.modules.get("flashpo.trl.report")  # loaded once the script has imported a trainer
    lines: list[str] = report.lines(finished) if report else []
    counts = stats()
    if switches.current().verbose:
        lines += operators()
    if counts and handed_out:
        lines.insert(0, f"in the place of TRL's classes: {', '.join(sorted(handed_out))}")
    if not finished:
        how = "what ran until then" if counts else "none of its operators ran in this process until then"
        lines.insert(0, f"the script did not come to its end; {how}")
    elif not counts:
        imported = "trl.trainer.utils" in sys.modules
        why = "no trainer ran" if imported else "the script did not import a TRL trainer"
        why = "see the trainers" if report and report.ran else why
        lines.append(f"WARNING: none of its operators ran in this process: {why}; nothing was accelerated")
    return "\n".join(f"flashpo: {line}" for line in lines)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
