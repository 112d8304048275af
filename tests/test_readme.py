"""The pages are true: their tables match bench/results and the configurations, and the things that they name exist."""

import ast
import re
import runpy

import pytest
from pages import PAGES, ROOT, TESTS, name_of

from flashpo._hosts.versions import MATRIX
from flashpo.bench import readme
from flashpo.bench.algorithms import ALGORITHMS

LINK = re.compile(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)")


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_results(page):
    """`python -m flashpo.bench.readme` changes nothing."""
    text = page.read_text()
    assert "<!-- table: " in text
    assert readme.filled(text) == text


def test_options_are_those_of_the_configurations():
    """`python tools/options_page.py` changes nothing."""
    pytest.importorskip("trl")
    tool = runpy.run_path(str(ROOT / "tools" / "options_page.py"))
    text = tool["PAGE"].read_text()
    assert "| `share_prefix` |" in text
    assert tool["filled"](text) == text


def test_versions_are_those_of_the_matrix():
    """`make matrix` changes rows alone, the same in all pages."""
    tool = runpy.run_path(str(ROOT / "tools" / "matrix.py"))
    texts = [page.read_text() for page in tool["PAGES"]]
    rows = re.search(r"<!-- matrix -->\n(.*?)<!-- end -->", texts[0], re.DOTALL)[1].splitlines()[len(tool["HEAD"]) :]
    assert [tuple(row.strip("| ").split(" | ")[:2]) for row in rows] == list(MATRIX)
    assert [tool["filled"](text, rows) for text in texts] == texts


def test_tests_that_are_named_exist():
    named = {test for page in PAGES for test in re.findall(r"`(test_\w+\.py)::(test_\w+)`", page.read_text())}
    assert len(named) > 20
    assert {tuple(algorithm.test.split("::")) for algorithm in ALGORITHMS} <= named
    for file, function in sorted(named):
        tree = ast.parse((TESTS / file).read_text())
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert function in functions, f"{file}::{function}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_files_that_are_named_exist(page):
    """A strict build of the site checks links and anchors, too; this needs no mkdocs."""
    text = page.read_text()
    links = [page.parent / target for target in LINK.findall(text)]
    folders = r"bench|docs|examples|kernels|tests|tools|csrc|python/flashpo"
    files = [ROOT / path for path in re.findall(rf"`((?:{folders})/[\w./]+\.\w+)`", text)]
    assert [str(file) for file in links + files if not file.exists()] == []


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_numbers_in_sentences_are_those_of_the_results():
    text = (ROOT / "README.md").read_text()
    tables = {
        title: {record["variant"]: record for record in records} for title, (_, records) in readme.newest().items()
    }
    step = tables["GRPO step, 1.7B model, prompt=2048, completions mean length 256 on gpu-h200"]
    more = step["flashpo run"]["peak_mb"] / step["stock TRL"]["peak_mb"] - 1
    assert f"**{100 * more:.0f} % more memory**" in text
    alone = tables["training pass, nothing shared, no padding"]["padded, FlashPO's head pass"]["times_flashpo"] - 1
    assert f"token trees bring {100 * alone:.0f} %" in text
    passes = {title: rows for title, rows in tables.items() if title.startswith("training pass, GRPO, prompt ")}
    on_cpu = {title: rows["FlashPO pass"]["off_by_nats"] for title, rows in passes.items() if "gpu" not in title}
    single, half = (max(x for title, x in on_cpu.items() if ("bfloat16" in title) == b) for b in (False, True))
    flat = " ".join(text.split())
    assert f"{single:.1e} nats".replace("e-0", "e-") in flat
    assert f"to {half:.2f} in bfloat16" in flat
