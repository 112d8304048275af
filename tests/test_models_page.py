"""docs/models.md, which `python -m flashpo.bench.models` writes. Writing it takes too long for a test."""

import pathlib

import pytest

pytest.importorskip("transformers")
from flashpo.bench import models
from flashpo.bench.tiny_models import FAMILIES, MULTIMODAL, tiny_model, tiny_multimodal

TEXT = (pathlib.Path(__file__).parents[1] / "docs" / "models.md").read_text()
TABLES = {"Families": (FAMILIES, tiny_model), "Multimodal classes": (MULTIMODAL, tiny_multimodal)}


def section(heading: str) -> tuple[list[list[str]], list[str]]:
    """The rows of its table, and the families that were not tried."""
    text = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    _, _, *rows = (line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|"))
    return rows, text.rsplit("Not built small", 1)[1].split(": ", 1)[1].strip(".\n").split(", ")


@pytest.mark.parametrize("heading", TABLES)
def test_every_family_is_there(heading):
    rows, untried = section(heading)
    assert sorted([*(row[0] for row in rows), *untried]) == sorted(TABLES[heading][0])


@pytest.mark.parametrize(
    ("heading", "family"),
    [
        *(("Families", family) for family in ("mistral", "lfm2", "bloom", "modernbert-decoder")),
        *(("Multimodal classes", family) for family in ("qwen2_5_vl", "paligemma", "got_ocr2")),
    ],
)
def test_rows_are_true(heading, family):
    row = models.try_family(family, TABLES[heading][1])
    found = next(line for line in section(heading)[0] if line[0] == family)
    images = models.try_images(row) if heading == "Multimodal classes" else ()
    assert found[1:] == [*map(models.cell, (row.rollout, row.packed, *images))]
