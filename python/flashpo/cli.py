"""`flashpo run | verify | doctor | bench`: every command parses the rest of the command line itself."""

import sys

from flashpo import _op

USAGE = """usage: flashpo <command> ...

  run script.py [args]    run an unmodified TRL script, accelerated; also: run trl grpo [args];
                          run --help tells the switches in front of the script
  verify script.py [args] take two steps of the script's first trainer by TRL's code and by
                          FlashPO's, compare, and end
  doctor                  what of FlashPO runs on this machine, and why the rest does not;
                          --model PATH: for that model; --check: compare every backend with float64
  bench [suite] [options] time the operators against torch, TRL and others (bench --help)
  --version               print the version"""


def main(argv: list[str] | None = None) -> int:
    """Run a command and return the exit status: 0 fine, 1 a check failed, 2 the command line was wrong."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command == "--version":
        from flashpo import __version__

        print(__version__)
        return 0
    try:
        _op.check_environment()
    except ValueError as error:
        print(f"flashpo: {error}", file=sys.stderr)
        return 2
    if command in ("run", "verify"):
        from flashpo.run import main as run

        return run(rest, verify_alone=command == "verify")
    if command == "doctor":
        from flashpo.doctor import main as doctor

        return doctor(rest)
    if command == "bench":
        from flashpo.bench.run import main as bench

        return bench(rest) or 0
    print(f"flashpo: unknown command {command!r}\n{USAGE}", file=sys.stderr)
    return 2
