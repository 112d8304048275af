"""The CUDA kernels are a separate library. Where it is missing or does not fit, the reason is given and nothing else
changes. These tests need no GPU.
"""

import shutil
import subprocess
import types

import pytest
import torch

import flashpo
from flashpo import _cuda_library, _op, doctor

pytestmark = pytest.mark.skipif(_op.native is None, reason="installed without the C++ kernels")
OTHER_VERSION = """
static struct { const char* version; int architecture; } kernels = {"0.0.1", 80};
void* flashpo_cuda_kernels() { return &kernels; }
"""


@pytest.fixture
def native(tmp_path, monkeypatch):
    """A `flashpo._C` in an empty folder, beside a torch for CUDA 13."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    load = getattr(_op.native, "load_cuda_library", None)
    return types.SimpleNamespace(__file__=str(tmp_path / "_C.so"), load_cuda_library=load)


def test_none(native):
    assert _cuda_library.why_not(native) == "no libflashpo_cuda*.so next to flashpo._C (built without a CUDA compiler)"


def test_a_broken_file(native, tmp_path):
    (tmp_path / "libflashpo_cuda13.so").write_bytes(b"no library" * 100)
    reason = _cuda_library.why_not(native)
    assert reason.startswith("libflashpo_cuda13.so does not load: ")
    assert "invalid ELF header" in reason


def test_a_library_of_something_else(native, tmp_path):
    (tmp_path / "libflashpo_cuda13.so").symlink_to(_op.native.__file__)
    reason = _cuda_library.why_not(native)
    assert reason.startswith("libflashpo_cuda13.so does not load: ")
    assert "undefined symbol: flashpo_cuda_kernels" in reason


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_another_version(native, tmp_path):
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", tmp_path / "libflashpo_cuda13.so"]
    subprocess.run(command, input=OTHER_VERSION, text=True, check=True)
    reason = f"libflashpo_cuda13.so does not load: it is of FlashPO 0.0.1, flashpo._C of {flashpo.__version__}"
    assert _cuda_library.why_not(native) == reason


@pytest.mark.parametrize(
    ("cuda", "names", "chosen"),
    [
        ("13.2", ["12", "13"], "libflashpo_cuda13.so"),
        ("12.8", ["12", "13"], "libflashpo_cuda12.so"),
        ("13.0", ["12"], "libflashpo_cuda12.so"),
        ("12.8", ["13"], "libflashpo_cuda13.so is for a newer CUDA than torch's 12.8"),
        (None, ["13"], "torch is built without CUDA, so libflashpo_cuda13.so is not loaded"),
    ],
)
def test_it_fits_torch(native, tmp_path, monkeypatch, cuda, names, chosen):
    loaded = []
    native.load_cuda_library = lambda path: loaded.append(path) or 80
    monkeypatch.setattr(torch.version, "cuda", cuda)
    for major in names:
        (tmp_path / f"libflashpo_cuda{major}.so").touch()
    reason = _cuda_library.why_not(native)
    assert (reason, *loaded) == (("", str(tmp_path / chosen)) if chosen.endswith(".so") else (chosen,))


def test_it_fits_the_gpus(native, tmp_path, monkeypatch):
    native.load_cuda_library = lambda path: 80
    (tmp_path / "libflashpo_cuda13.so").touch()
    monkeypatch.setattr(_cuda_library, "_capabilities", lambda: [(9, 0), (7, 5)])
    assert _cuda_library.why_not(native) == "libflashpo_cuda13.so has kernels from sm_80 on, this GPU is sm_75"
    monkeypatch.setattr(_cuda_library, "_capabilities", lambda: [(8, 0), (12, 0)])
    assert _cuda_library.why_not(native) == ""


def test_without_it_the_cpu_keeps_its_kernels_and_doctor_says_why(monkeypatch):
    monkeypatch.setattr(_cuda_library, "why_not", lambda native: "it is broken")
    _op.why_unavailable.cache_clear()
    assert dict(doctor.machine())["native, CUDA"] == "it is broken"
    assert _op.why_unavailable("native", "cuda") == "it is broken"
    flashpo.stats(reset=True)
    flashpo.gae(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool))
    assert set(flashpo.stats()["gae_fwd"]) == {"native"}
    monkeypatch.undo()
    _op.why_unavailable.cache_clear()
