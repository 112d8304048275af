"""docs/models.md: written by `python -m flashpo.bench.models`, which is too long for a test."""

import pathlib

import pytest

pytest.importorskip("transformers")
from flashpo.bench import models
from flashpo.bench.tiny_models import FAMILIES

TEXT = (pathlib.Path(__file__).parents[1] / "docs" / "models.md").read_text()
ROWS = [line.strip("| ").split(" | ") for line in TEXT.splitlines() if line.startswith("| ") and line.count("|") == 4]
UNTRIED = TEXT.rsplit("Not built small: ", 1)[1].strip(".\n").split(", ")


def test_every_family_is_there():
    assert sorted([*(row[0] for row in ROWS if row[0] != "family"), *UNTRIED]) == sorted(FAMILIES)


@pytest.mark.parametrize("family", ["mistral", "lfm2", "bloom", "modernbert-decoder"])
def test_rows_are_true(family):
    row = models.try_family(family)
    found = next(line for line in ROWS if line[0] == family)
    assert found[1:] == [models.cell(row.rollout), models.cell(row.packed)]
