"""The pages of documentation that users read, and the blocks of code on them."""

import pathlib
import re
from typing import NamedTuple

TESTS = pathlib.Path(__file__).parent
ROOT = TESTS.parent
WRITTEN_BY_TOOLS = ("models.md", "versions.md")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name not in WRITTEN_BY_TOOLS),
]
BLOCK = re.compile(r"(<!-- not run: [^\n]+ -->\n)?^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    language: str
    code: str
    runs: bool  # unless the line before it is `<!-- not run: REASON -->`
    line: int  # of the page, where the code begins


def name_of(page: pathlib.Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: pathlib.Path, language: str) -> list[Block]:
    text = page.read_text()
    return [
        Block(match[2], match[3], match[1] is None, text[: match.start(3)].count("\n") + 1)
        for match in BLOCK.finditer(text)
        if match[2] == language
    ]
