"""What our pages say: their tables are those of bench/results, and the tests that README names exist."""

import ast
import pathlib
import re

import pytest

from flashpo.bench import readme
from flashpo.bench.algorithms import ALGORITHMS

TESTS = pathlib.Path(__file__).parent
TEXT = (TESTS.parent / "README.md").read_text()


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_results(page):
    """`python -m flashpo.bench.readme` changes nothing."""
    text = page.read_text()
    assert "<!-- table: " in text
    assert readme.filled(text) == text


def test_tests_that_are_named_exist():
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", TEXT))
    assert len(named) > 20
    assert {tuple(algorithm.test.split("::")) for algorithm in ALGORITHMS} <= named
    for file, function in sorted(named):
        tree = ast.parse((TESTS / file).read_text())
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert function in functions, f"{file}::{function}"
