"""Dispatch of operators: forcing a backend, visible fallbacks, and counts of calls."""

import logging
import subprocess
import sys

import pytest
import torch

import flashpo
from flashpo import _op, selective_log_softmax


@pytest.fixture
def call():
    return torch.randn(3, 8), torch.zeros(3, dtype=torch.long)


def test_a_forced_backend_that_cannot_run_raises(call, monkeypatch):
    with pytest.raises(ValueError, match="backend must be one of"), flashpo.backend("cuda"):
        pass
    with flashpo.backend("native"), pytest.raises(NotImplementedError, match=r"'native'.*float64"):
        selective_log_softmax(call[0].double(), call[1])
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    _op.why_unavailable.cache_clear()
    with flashpo.backend("triton"), pytest.raises(NotImplementedError, match="Triton"):
        selective_log_softmax(*call)
    monkeypatch.undo()
    _op.why_unavailable.cache_clear()
    assert _op.forced is None


def test_the_environment_forces_a_backend():
    code = "import flashpo, torch; flashpo.selective_log_softmax(torch.randn(2, 4), torch.tensor([0, 1]));"
    code += "print(flashpo.stats())"
    run = [sys.executable, "-c", code]
    out = subprocess.run(run, env={"FLASHPO_BACKEND": "torch"}, capture_output=True, text=True, check=True).stdout
    assert "{'torch': 1}" in out
    bad = subprocess.run(run, env={"FLASHPO_BACKEND": "fast"}, capture_output=True, text=True)
    assert "FLASHPO_BACKEND must be one of" in bad.stderr


def test_calls_are_counted_and_told_once(call, caplog):
    flashpo.stats(reset=True)
    with caplog.at_level(logging.INFO, logger="flashpo"):
        for _ in range(3):
            selective_log_softmax(*call)
    chosen = "native" if _op.native else "torch"
    assert flashpo.stats()["selective_log_softmax_fwd"] == {chosen: 3}
    assert [r.getMessage() for r in caplog.records] == [f"selective_log_softmax_fwd runs on {chosen} for cpu tensors"]


def test_import_needs_neither_triton_nor_the_extension():
    """Nor anything but torch; the ops run on their reference then."""
    code = """
import sys
for name in ("triton", "transformers", "trl", "numpy", "pybind11", "flashpo._C"):
    sys.modules[name] = None
import torch, flashpo
assert flashpo._op.native is None
out = flashpo.linear_logprob(torch.randn(2, 4), torch.randn(9, 4), torch.tensor([0, 1]))
assert out.logprob.isfinite().all() and flashpo.stats()["linear_logprob_partial"] == {"torch": 1}
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_top_level_kernels_folder_is_not_a_package():
    """It would shadow the `kernels` package that transformers imports."""
    import pathlib

    assert not (pathlib.Path(__file__).parents[1] / "kernels" / "__init__.py").exists()
