"""`python tools/options_page.py`: writes the options that FlashPO adds to TRL's configurations into docs/trainers.md.

The table stands between `<!-- options -->` and `<!-- end -->`. Its texts are those of the fields' metadata, which
`--help` of a script with TRL's parser shows, too.
"""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "docs" / "trainers.md"
CONFIGS = ("SFT", "DPO", "KTO", "Reward", "GRPO", "RLOO", "Distillation", "PPO")
BASE = {"PPO": "GRPO"}  # whose configuration a class extends, where TRL has none of its name


def added(name: str) -> list[dataclasses.Field]:
    """The fields of a configuration that TRL's does not have, or that have another default there."""
    import trl

    import flashpo.trl

    known = {field.name: field for field in dataclasses.fields(getattr(trl, f"{BASE.get(name, name)}Config"))}
    ours = dataclasses.fields(getattr(flashpo.trl, f"{name}Config"))
    return [field for field in ours if field.name not in known or field.default != known[field.name].default]


def table() -> list[str]:
    trainers: dict[tuple[str, str, str], list[str]] = {}
    for name in CONFIGS:
        for field in added(name):
            text = _one_line(field.metadata.get("help", ""))
            trainers.setdefault((field.name, repr(_default(field)), text), []).append(name)
    rows = ["| option | default | configurations | meaning |", "| --- | --- | --- | --- |"]
    for (option, default, text), names in trainers.items():
        where = "all" if len(names) == len(CONFIGS) else ", ".join(names)
        rows.append(f"| `{option}` | `{default}` | {where} | {text} |")
    return rows


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def filled(text: str) -> str:
    marked = re.compile(r"<!-- options -->\n.*?<!-- end -->", re.DOTALL)
    made = "\n".join(["<!-- options -->", *table(), "<!-- end -->"])
    return marked.sub(lambda _: made, text)


def main() -> int:
    PAGE.write_text(filled(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
