"""`make matrix`: the short parity tests with every TRL and transformers of `flashpo._hosts.versions`; their table in
README.md and docs/versions.md.

Each row has an environment of its own that borrows the packages of the one that runs this, but for what the row pins.
"""

import argparse
import datetime
import os
import platform
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import torch

from flashpo._hosts.versions import MATRIX, Row

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "versions.md")
TESTS = "tests/test_matrix.py"
HEAD = [
    "| TRL | transformers | torch | Python | date | passed | of TRL |",
    "| --- | --- | --- | --- | --- | --- | --- |",
]


def environment(row: Row, folder: Path) -> Path:
    """The Python of the row's environment, made where it is not there yet."""
    where = folder / f"trl-{row.trl}-transformers-{row.transformers}"
    python = where / "bin" / "python"
    if not (where / "ready").exists():
        venv.create(where, with_pip=True)
        libraries = next(where.glob("lib/python*/site-packages"))
        borrowed = sysconfig.get_path("purelib")  # with its own .pth files, of which the editable FlashPO is one
        (libraries / "borrowed.pth").write_text(f"import site; site.addsitedir({borrowed!r})\n")
        wanted = [f"trl=={row.trl}", f"transformers=={row.transformers}"]
        subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True)
        (where / "ready").touch()
    return python


def run(python: Path) -> tuple[str, str]:
    """How many tests passed, and the first line that doctor says of TRL."""
    settings = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS]
    tests = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    print(tests.stdout[-2000:], flush=True)
    found = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", tests.stdout)}
    if tests.returncode and "failed" not in found:
        print(tests.stderr[-3000:], flush=True)
    ask = "from flashpo._hosts import report; print(report.of_trl()[0])"
    said = subprocess.run([python, "-c", ask], cwd=ROOT, env=settings, capture_output=True, text=True).stdout
    passed, every = found.get("passed", 0), sum(found.values())
    return f"{passed} of {every}", said.strip().partition("; ")[2]


def filled(page: str, rows: list[str]) -> str:
    """The page with these rows of the table between `<!-- matrix -->` and `<!-- end -->`."""
    marked = re.compile(r"<!-- matrix -->\n.*?<!-- end -->", re.DOTALL)
    made = "\n".join(["<!-- matrix -->", *HEAD, *rows, "<!-- end -->"])
    return marked.sub(lambda _: made, page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the environments are")
    parser.add_argument("--only", nargs="*", default=[], help="versions of TRL, all by default")
    parser.add_argument("--in-turn", action="store_true", help="one that is not the newest, another each day")
    args = parser.parse_args()
    rows = [row for row in MATRIX if not args.only or row.trl in args.only]
    if args.in_turn:
        older = MATRIX[:-1]
        rows = [older[datetime.date.today().toordinal() % len(older)]]
    lines, failed = [], False
    for row in rows:
        print(f"TRL {row.trl}, transformers {row.transformers}", flush=True)
        passed, said = run(environment(row, args.folder))
        done, of = passed.split(" of ")
        failed |= done != of or done == "0"
        versions = (row.trl, row.transformers, torch.__version__, platform.python_version())
        lines.append(f"| {' | '.join(versions)} | {datetime.date.today()} | {passed} | {said} |")
    if rows == list(MATRIX):
        for page in PAGES:
            page.write_text(filled(page.read_text(), lines))
    print("\n".join(lines))
    return failed


if __name__ == "__main__":
    sys.exit(main())
