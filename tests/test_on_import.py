"""A hook that waits for a module runs when it is imported, however often somebody has only looked for the module."""

import importlib
import importlib.util
import sys

from flashpo._on_import import when_imported


def test_looking_for_a_module_is_no_import(tmp_path, monkeypatch):
    (tmp_path / "flashpo_waited_for.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    for name in ("flashpo_waited_for", "flashpo_never_there"):
        when_imported(name, seen.append)
    assert importlib.util.find_spec("flashpo_never_there") is None
    assert importlib.util.find_spec("flashpo_waited_for") is not None
    assert seen == []
    try:
        assert importlib.import_module("flashpo_waited_for").VALUE == 1
        assert seen == ["flashpo_waited_for"]
        when_imported("flashpo_waited_for", seen.append)
        assert len(seen) == 2
    finally:
        del sys.modules["flashpo_waited_for"]
