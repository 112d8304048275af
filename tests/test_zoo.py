"""A short form of `make zoo`: two algorithms learn from one imitating checkpoint; its table and curves are there."""

import json

import pytest

pytest.importorskip("trl")
from flashpo.bench import zoo


def test_two_algorithms_learn(tmp_path, capsys):
    options = ["--start-steps", "200", "--steps", "16", "--margin", "0.02", "--out", str(tmp_path)]
    assert zoo.main(["sft", "gspo", *options]) == 0
    out = capsys.readouterr().out
    assert "gspo" in out
    (records,) = json.loads((tmp_path / "zoo.json").read_text())["tables"].values()
    assert [r["variant"] for r in records] == ["sft", "gspo"]
    assert all(r["tokens"] > 0 for r in records)
    assert (tmp_path / "zoo.png").stat().st_size > 10_000


def test_an_algorithm_that_does_not_learn_fails(tmp_path, capsys):
    options = ["--start-steps", "1", "--steps", "1", "--out", str(tmp_path)]
    assert zoo.main(["sft", *options]) == 1
    assert "gained less than 0.1: sft" in capsys.readouterr().err


def test_unknown_algorithms_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        zoo.main(["gpro", "--out", str(tmp_path)])
    assert "unknown algorithms ['gpro']" in capsys.readouterr().err
