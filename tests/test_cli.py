"""The command line: help, errors, and `doctor` with its check."""

import os
import re
import subprocess
import sys

import pytest
import torch

import flashpo
from flashpo import _op, _probes, cli, doctor


def python_m(*args, **env):
    command = [sys.executable, "-m", "flashpo", *args]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env, timeout=60)


def test_help_names_every_command():
    result = python_m("--help")
    assert result.returncode == 0
    assert all(word in result.stdout for word in ("run script.py", "doctor", "bench"))


def test_no_command_is_help(capsys):
    assert cli.main([]) == 0
    assert "usage: flashpo" in capsys.readouterr().out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == flashpo.__version__


def test_unknown_command(capsys):
    assert cli.main(["accelerate"]) == 2
    assert "'accelerate'" in capsys.readouterr().err


UNKNOWN_BACKEND = "FLASHPO_BACKEND must be one of ('native', 'triton', 'torch') or None, got 'cuda'"


@pytest.mark.parametrize("command", ["doctor", "run", "bench"])
def test_unknown_backend_says_which_there_are(command):
    result = python_m(command, FLASHPO_BACKEND="cuda")
    assert result.returncode == 2
    assert result.stderr == f"flashpo: {UNKNOWN_BACKEND}\n"


def test_an_operator_says_it_too(monkeypatch):
    """Of a script that imports flashpo, which does not raise."""
    monkeypatch.setattr(_op, "forced", "cuda")
    with pytest.raises(ValueError, match=re.escape(UNKNOWN_BACKEND)):
        flashpo.linear_logprob(torch.ones(1, 2), torch.ones(3, 2), torch.zeros(1, dtype=torch.long))


def test_run_without_a_script(capsys):
    assert cli.main(["run"]) == 2
    assert "flashpo run" in capsys.readouterr().err


def test_run_passes_arguments(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys; print(sys.argv[1:])")
    assert "['--lr', '1']" in python_m("run", str(script), "--lr", "1").stdout


def test_doctor_shows_every_operator_and_reason(capsys):
    before = flashpo.stats()
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in _op.OPS)
    assert all(name in out for name in ("torch", "triton", "threads", "native"))
    for backend in _op.BACKENDS:
        reason = _op.why_unavailable(backend, "cpu")
        assert not reason or f"{backend}: {reason}" in out
    assert flashpo.stats() == before


def test_doctor_probes_every_operator():
    used, problem = doctor.chosen("cpu")
    assert problem is None
    assert set(used) == set(_op.OPS), "an operator without a probe in flashpo._probes"
    for name, backend in used.items():
        best = next(b for b in _op.OPS[name].kernels if not _op.why_unavailable(b, "cpu"))
        assert backend == best


def test_doctor_reports_a_forced_backend_that_cannot_run(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(_op, "why_unavailable", lambda backend, device: "too old" if backend == "triton" else "")
    with flashpo.backend("triton"):
        assert cli.main(["doctor"]) == 0
    assert "ERROR: NotImplementedError: flashpo::" in capsys.readouterr().out


def test_doctor_begins_with_a_verdict(monkeypatch, capsys):
    assert cli.main(["doctor"]) == 0
    assert re.fullmatch(r"FlashPO runs here: cpu by .*", capsys.readouterr().out.splitlines()[0])
    lacking = ["TRL 1.16.0: supported; all as in TRL", "  GRPOTrainer, loss: not used, TRL computes it: it is another"]
    monkeypatch.setattr(doctor.report, "of_trl", lambda: lacking)
    monkeypatch.setattr(_op, "why_unavailable", lambda backend, device: "" if backend == "torch" else "too old")
    said = doctor.verdict(["cpu"], lacking, ["ERROR: it is broken"])
    reasons = "ERROR: it is broken; cpu has no kernels; 1 uses of TRL are missing"
    assert said == f"FlashPO runs here in part: {reasons} (cpu by plain torch, TRL 1.16.0)"


FAMILIES = {  # parts that run
    "qwen3": ("yes", "yes", "yes"),
    "gemma2": ("yes", "no, it is made of Gemma2DecoderLayer; the fused form is for Llama", "yes"),
    "gpt2": ("yes", "no, it is made of GPT2Model; the fused form is for Llama", "yes"),
    "qwen3_5_text": ("yes", "no, it is made of Qwen3_5DecoderLayer; the fused form", "yes"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_doctor_tells_what_would_run_for_a_model(family, tmp_path, capsys):
    pytest.importorskip("trl")
    from trl_models import CONFIGS

    CONFIGS[family]().save_pretrained(tmp_path)
    assert cli.main(["doctor", "--model", str(tmp_path)]) == 0
    first, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{tmp_path}: ")
    for row, part, said in zip(rows, ("rollout engine", "fused decode", "token trees"), FAMILIES[family]):
        assert row.startswith(f"  {f'{part}:':16s}{said}")
    assert rows[3].startswith("  KV cache of a sequence, in float32: ")
    if family == "qwen3":  # 2 layers of a key and a value of 16 numbers
        assert f"{2 * 2 * 16 * 4 * 1024 / 2**20:.1f} MiB for 1,024 tokens" in rows[3]


def test_doctor_of_what_is_no_model(tmp_path, capsys):
    assert cli.main(["doctor", "--model", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"flashpo doctor: no causal language model at {tmp_path}: ")
    assert len(said.splitlines()) == 1


def test_check_passes(capsys):
    assert cli.main(["doctor", "--check"]) == 0
    out = capsys.readouterr().out
    assert "all checks passed" in out
    assert "FAILED" not in out
    for name in doctor.PROBES:
        for backend in _op.BACKENDS:
            if not _op.why_unavailable(backend, "cpu"):
                written = any(backend in op.kernels for n, op in _op.OPS.items() if n.startswith(name.split(",")[0]))
                verdict = "ok" if written else "not implemented"
                assert any(name in line and backend in line and verdict in line for line in out.splitlines())


@pytest.mark.parametrize("broken", ["wrong by 1 %", "NaN", "raises"])
def test_check_fails(monkeypatch, capsys, broken):
    probe = doctor.PROBES["linear_logprob"]

    def ours(*inputs):
        if broken == "raises":
            raise RuntimeError("undefined symbol")
        factor = 1.01 if broken == "wrong by 1 %" else torch.nan
        return tuple(x * factor for x in probe.ours(*inputs))

    monkeypatch.setattr(doctor, "PROBES", {"linear_logprob": _probes.Probe(probe.make, ours, probe.plain)})
    assert cli.main(["doctor", "--check"]) == 1
    out = capsys.readouterr().out
    assert "checks FAILED" in out
    assert broken != "raises" or "RuntimeError: undefined symbol" in out
