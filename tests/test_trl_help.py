"""`help(flashpo.trl.GRPOConfig)` shows every field that a configuration of ours adds to TRL's."""

import dataclasses
import inspect

import pytest

pytest.importorskip("trl")
import trl

import flashpo.trl

NAMES = [name for name in flashpo.trl.__all__ if name.endswith("Config")]


@pytest.mark.parametrize("name", NAMES)
def test_every_added_field_is_explained(name):
    ours, theirs = getattr(flashpo.trl, name), getattr(trl, name, trl.GRPOConfig)
    added = [f for f in dataclasses.fields(ours) if f.name not in {g.name for g in dataclasses.fields(theirs)}]
    text = " ".join(inspect.getdoc(ours).split())
    assert added
    for field in added:
        assert f"{field.name} ({field.default!r}): {' '.join(field.metadata['help'].split())}" in text
    assert len(NAMES) == 8
    assert "learning_rate" not in text
