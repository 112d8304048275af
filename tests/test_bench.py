"""The benchmarks: which suites and cases there are, and what a machine with a GPU runs."""

import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")
from flashpo.bench import decode_step, grpo_step, packing, rollout, run, tree, vllm_peer
from flashpo.bench.cases import SUITES, load
from flashpo.bench.timing import Device

ON_CPUS = {"packed_linear"}  # alone
ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_a_dry_run_lists_every_suite(tmp_path):
    environment = os.environ | {"FLASHPO_DRY_RUN": "1", "FLASHPO_STEPS": "none of those that need no GPU"}
    subprocess.run(["bash", ROOT / "bench" / "gpu.sh", tmp_path], check=True, env=environment, timeout=60)
    lines = [line.split(": needs a GPU: ") for line in (tmp_path / "summary.txt").read_text().splitlines()]
    assert {name for name, _ in lines} == {*SUITES, "sanitizer"} - ON_CPUS
    assert all(f"flashpo bench {name} --device cuda" in command for name, command in lines if name != "sanitizer")


def test_a_run_of_a_few_minutes_measures_the_smallest_shapes_and_ends_in_time(tmp_path):
    """`python` here is a program that takes long: it is stopped, and the steps after it are not begun."""
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    environment = os.environ | {"PYTHON": str(slow), "FLASHPO_STEPS": "doctor tests gae", "FLASHPO_DRY_RUN": "1"}
    done = subprocess.run(
        ["bash", ROOT / "bench" / "gpu.sh", "--minutes", "0", tmp_path / "out"],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    lines = dict(line.split(": ", 1) for line in (tmp_path / "out" / "summary.txt").read_text().splitlines())
    assert done.returncode == 0, done.stderr
    assert lines["doctor"] == lines["tests"] == "not run, no time is left"
    assert "--peers --quick --out" in lines["gae"]


def test_vllm_and_flashpo_run_the_same_script_in_turn(monkeypatch, capsys):
    """Without a GPU and vLLM: what runs, and what is made of the times."""
    calls = []

    def one(command, script, model, out, *settings):
        calls.append((command[1:], script.name, model, settings))
        return grpo_step.Run([9.0, 3.0, 4.0, 5.0] if settings[-1] else [9.0, 2.0, 2.0, 2.0], 2**30)

    monkeypatch.setattr(grpo_step, "run", one)
    monkeypatch.setattr(vllm_peer.subprocess, "check_output", lambda *_, **__: "NVIDIA X\n")
    monkeypatch.setattr(sys, "argv", ["vllm_peer.py", "model", "--seeds", "2", "--new", "64"])
    assert vllm_peer.main() == 0
    assert calls[:2] == [
        ([], "step_script.py", "model", (1, 2048, 64, 6, 0, 1e-6, "--use-vllm")),
        (["-m", "flashpo.run"], "step_script.py", "model", (1, 2048, 64, 6, 0, 1e-6, "")),
    ]
    assert "4.00 s a step,  2.00 times FlashPO's, peak 1.0 GiB" in capsys.readouterr().out


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


def test_kernels_are_cases_of_pytest_benchmark(tmp_path):
    """One variant of a table; what shows its floor is measured with it, its peers are not."""
    chosen = ["-k", "gae and 1024 and whitened", "--benchmark-max-time=0.01", f"--benchmark-json={tmp_path}/out.json"]
    pytest_run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "bench", "--benchmark-only", *chosen]
    alone = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_XDIST")}  # or nothing is timed
    done = subprocess.run(pytest_run, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    (case,) = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert case["group"] == "gae B=64 T=1024"
    assert case["stats"]["rounds"] >= 5
    assert case["extra_info"]["ms"] == pytest.approx(case["stats"]["median"] * 1e3)
    assert case["extra_info"]["times_flashpo"] > 0


def test_the_cases_of_a_table_are_what_it_measures():
    class Asked(Exception):
        """By a clock that measures nothing."""

    def clock(variants):
        raise Asked(*variants)

    torch.manual_seed(0)
    for place in ("gae.tables", "advantages.tables", "losses.policy_loss_tables", "decoding.tables"):
        table = next(iter(load(place)(Device("cpu"), True)))
        with pytest.raises(Asked) as asked:
            list(table.measure(clock, False))
        assert set(asked.value.args) == set(table.variants), table.title


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
