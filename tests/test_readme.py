"""What our pages say: their tables are those of bench/results and of the configurations, and what they name exists."""

import ast
import re
import runpy

import pytest
from pages import PAGES, ROOT, TESTS, name_of

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
