"""What a machine with a GPU is to run."""

import importlib
import json
import os
import pathlib
import signal
import subprocess

import pytest

pytest.importorskip("transformers")
from flashpo.bench import decode_step, grpo_step, packing, rollout, run, tree
from flashpo.bench.cases import SUITES

ON_CPUS = {"packed_linear"}  # alone
ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_a_dry_run_lists_every_suite(tmp_path):
    environment = os.environ | {"FLASHPO_DRY_RUN": "1", "FLASHPO_STEPS": "none of those that need no GPU"}
    subprocess.run(["bash", ROOT / "bench" / "gpu.sh", tmp_path], check=True, env=environment, timeout=60)
    lines = [line.split(": needs a GPU: ") for line in (tmp_path / "summary.txt").read_text().splitlines()]
    assert {name for name, _ in lines} == {*SUITES, "sanitizer"} - ON_CPUS
    assert all(f"flashpo bench {name} --device cuda" in command for name, command in lines if name != "sanitizer")


def test_every_suite_is_there():
    for place in SUITES.values():
        module, function = place.split(".")
        assert callable(getattr(importlib.import_module(f"flashpo.bench.{module}"), function))


@pytest.mark.parametrize(("end", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_what_was_measured_before_the_end_is_kept(end, raised, tmp_path, monkeypatch, capsys):
    def tables(*_):
        yield "not asked for", lambda: signal.raise_signal(signal.SIGKILL)
        yield "the first", lambda: iter([{"variant": "FlashPO", "ms": 1.5}])
        signal.raise_signal(end)

    monkeypatch.setattr(run.cases, "run", tables)
    usual = signal.signal(end, signal.SIG_IGN)  # as a shell has it for a job in the background
    try:
        with pytest.raises(raised):
            run.main(["--device", "cpu", "--only", "first", "--out", str(tmp_path / "bench.jsonl")])
        assert signal.getsignal(end) == signal.SIG_IGN
    finally:
        signal.signal(end, usual)
    (line,) = (tmp_path / "bench.jsonl").read_text().splitlines()
    assert json.loads(line)["tables"] == {"the first": [{"variant": "FlashPO", "ms": 1.5}]}
    assert capsys.readouterr().out.splitlines()[-1] == line


def test_titles_are_distinct():
    for suite in (decode_step, grpo_step, rollout):
        for device, cases in suite.CASES.items():
            assert len({case.title for case in cases}) == len(cases), (suite.__name__, device)


def test_the_goals_for_a_gpu_are_among_the_cases():
    shapes = {(case.model, case.prompts * case.group, case.prompt) for case in rollout.CASES["cuda"]}
    steps = {(case.model, case.prompts * case.group, case.prompt) for case in decode_step.CASES["cuda"]}
    for model in ("0.6B", "1.7B", "4B"):
        for batch, prompt in ((64, 512), (64, 2048), (256, 512)):
            assert (model, batch, prompt) in shapes & steps
    assert any((w.size, w.prompt, w.completion) == (8, 2048, 512) for w in packing.WORKLOADS["cuda"])
    assert any((c.model, c.prompt, c.new) == ("1.7B", 2048, 512) for c in grpo_step.CASES["cuda"])
    assert any(shape.prompt == 2048 for shape in tree.SHAPES["cuda"])
