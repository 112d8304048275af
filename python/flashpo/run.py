"""Runs an unmodified TRL script, accelerated: `python -m flashpo.run script.py [args]`.

For several processes: `accelerate launch -m flashpo.run script.py [args]`. At the end, also of a script that failed,
says what ran on which backend and how often.
"""

import importlib.abc
import importlib.util
import os
import runpy
import sys
from typing import Any

from flashpo._op import stats

USAGE = "usage: flashpo run script.py [args ...]\n       flashpo run -m module [args ...]"


class PatchOnImport(importlib.abc.MetaPathFinder):
    """Patches TRL the moment that the script imports it, and not before: the script may first set variables that
    libraries read when they are imported (HF_HOME, ...)."""

    def find_spec(self, name, path, target=None):
        if name != "trl.trainer.utils":
            return None
        sys.meta_path.remove(self)
        spec: Any = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            from flashpo.trl.patch import patch

            execute(module)
            patch()

        spec.loader.exec_module = exec_module
        return spec


def main(argv: list[str]) -> int:
    """Run `argv[0]` with the arguments after it as if it were `python argv[0] ...`, with TRL patched."""
    if not argv or argv[0] in ("-h", "--help") or argv == ["-m"]:
        print(USAGE, file=sys.stderr)
        return 2
    module = argv[0] == "-m"
    script, arguments = (argv[1], argv[2:]) if module else (argv[0], argv[1:])
    if not module and not os.path.isfile(script):
        print(f"flashpo run: no such file: {script}", file=sys.stderr)
        return 2
    if "trl.trainer.utils" in sys.modules:
        from flashpo.trl.patch import patch

        patch()
    else:
        sys.meta_path.insert(0, PatchOnImport())
    sys.argv = [script, *arguments]
    sys.path[0] = os.getcwd() if module else os.path.dirname(os.path.abspath(script))
    try:
        if module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script, run_name="__main__")
    finally:
        if os.environ.get("RANK", "0") == "0":
            print(summary(), file=sys.stderr)
    return 0


def summary() -> str:
    """What of ours ran in this process, one line an operator."""
    counts = stats()
    if not counts:
        why = "TRL scored no token" if "trl.trainer.utils" in sys.modules else "the script did not import a TRL trainer"
        return f"flashpo: WARNING: none of its operators ran in this process: {why}; nothing was accelerated"
    lines = [f"flashpo: {op}: " + ", ".join(f"{n} x {b}" for b, n in used.items()) for op, used in counts.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
