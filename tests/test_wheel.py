"""The wheel that `pip wheel` makes: what it links, what it holds, and that it works where nothing else is installed."""

import ctypes
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import venv
import zipfile

import pytest
import torch

import flashpo

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """In the build folder of the editable install: what has not changed since is not compiled again."""
    out = tmp_path_factory.mktemp("wheel")
    build = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(out)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *build, str(ROOT)], check=True)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def libraries(wheel, tmp_path_factory):
    """The C++ module, and the library of CUDA kernels where there is a CUDA compiler."""
    folder = tmp_path_factory.mktemp("libraries")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(folder, names)
    return {pathlib.PurePath(name).name.partition(".")[0]: folder / name for name in names}


def test_links_neither_torch_nor_cuda(libraries):
    for path in libraries.values():
        dynamic = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True)
        needed = [line.split("[")[1].rstrip("]") for line in dynamic.stdout.splitlines() if "(NEEDED)" in line]
        assert needed
        assert not [name for name in needed if any(banned in name for banned in ("torch", "c10", "cuda", "gomp"))]


def test_the_cuda_kernels_load_without_a_driver_and_keep_their_runtime_to_themselves(libraries):
    """Functions of the CUDA runtime that it shows would be taken from torch's, which may be of another version."""
    found = [path for name, path in libraries.items() if name.startswith("libflashpo_cuda")]
    if not found:
        pytest.skip("built without a CUDA compiler")
    (library,) = found
    load = ctypes.CDLL(library).flashpo_cuda_kernels
    load.restype = ctypes.POINTER(ctypes.c_char_p)  # what it points to begins with the version
    assert load()[0].decode() == flashpo.__version__
    show = ["nm", "--dynamic", "--defined-only", "--format=just-symbols", library]
    symbols = subprocess.run(show, capture_output=True, text=True, check=True).stdout.split()
    assert [name for name in symbols if not name.startswith("_Z")] == ["flashpo_cuda_kernels"]


def test_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    roots = {name.split("/")[0] for name in names}
    assert roots == {"flashpo", next(root for root in roots if root.endswith(".dist-info"))}
    assert {"flashpo/py.typed", "flashpo/kernels/linear_logprob.py", "flashpo/bench/run.py"} <= names
    assert "flashpo/kernels/__init__.py" not in names
    assert {pathlib.PurePath(name).suffix for name in names if "dist-info" not in name} == {".py", ".so", ".typed"}


@pytest.mark.skipif(platform.libc_ver()[1] != "2.36", reason="not the system that wheels are released from")
def test_older_systems_load_it(wheel):
    """That is what makes it a manylinux wheel. In the images of cibuildwheel the same sources ask for glibc 2.28."""
    pytest.importorskip("auditwheel")
    show = [sys.executable, "-m", "auditwheel", "show", wheel]
    verdict = subprocess.run(show, capture_output=True, text=True, check=True).stdout
    assert int(re.search(r"platform\s+tag:\s+\"manylinux_2_(\d+)_", verdict).group(1)) <= 34, verdict


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory):
    """A new environment with the wheel, and what runs a program of it, without any compiler. It borrows torch and the
    packages beside it from here."""
    home = tmp_path_factory.mktemp("clean")
    venv.create(home, with_pip=True)
    programs = home / "bin"
    subprocess.run([programs / "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    (libraries,) = home.glob("lib/python*/site-packages")
    (libraries / "borrowed.pth").write_text(f"{pathlib.Path(torch.__file__).parents[1]}\n")
    compilers = ("cc", "c++", "gcc", "g++", "clang", "nvcc", "ptxas", "ld", "cmake", "ninja")
    assert not [name for name in compilers if shutil.which(name, path=programs)]
    chosen = {"PATH": str(programs), "HF_HUB_OFFLINE": "1"}
    rest = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "CUDA_HOME", "CUDA_PATH")}

    def run(program, *arguments):
        command = [programs / program, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=home, env=rest | chosen)

    return run


def test_works_in_a_clean_environment(clean):
    code = """
import sys, torch, flashpo
out = flashpo.linear_logprob(torch.randn(3, 4), torch.randn(9, 4), torch.tensor([0, 1, 8]))
assert out.logprob.isfinite().all() and flashpo.stats()["linear_logprob_partial"] == {"native": 1}, flashpo.stats()
assert flashpo.__file__.startswith(sys.prefix)
"""
    run = clean("python", "-c", code)
    assert run.returncode == 0, run.stderr
    doctor = clean("flashpo", "doctor", "--check")
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    assert doctor.stdout.startswith("FlashPO runs here: cpu by C++ or CUDA kernels")
    assert doctor.stdout.endswith("all checks passed\n")


def test_the_grpo_of_the_demo_is_accelerated_in_a_clean_environment(clean, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import arithmetic

    model = arithmetic.save(tmp_path / "model", vocab_size=64, hidden_size=32, layers=1)
    options = ["--model", model, "--output-dir", tmp_path / "out", "--max-steps", "1", "--batch-size", "8"]
    run = clean("flashpo", "run", ROOT / "examples" / "grpo.py", *options)
    assert run.returncode == 0, run.stderr
    parts = "rollout engine, token trees, LM head, loss, advantages by FlashPO"
    assert f"GRPOTrainer (flashpo.trl.grpo): {parts}" in run.stderr


def test_builds_without_a_cuda_compiler(tmp_path):
    """And with CXX=gcc, which links no C++ library by itself."""
    quick = "cmake.define.CMAKE_CXX_FLAGS_RELEASE=-O0"
    settings = ("cmake.define.FLASHPO_CUDA=OFF", quick, f"build-dir={tmp_path}/build")
    options = [*(f"--config-settings={x}" for x in settings), "--no-deps", "--quiet"]
    target = ["--target", str(tmp_path / "site")]
    install = [sys.executable, "-m", "pip", "install", *options, *target, str(ROOT)]
    subprocess.run(install, check=True, env=os.environ | {"CXX": "gcc"})
    # -S: without site there is no finder of an editable install in front of this one
    code = f"import sys; sys.path[:0] = {[str(tmp_path / 'site'), *sys.path]!r}; from flashpo import _op"
    run = [sys.executable, "-S", "-c", f"{code}; print(_op.why_unavailable('native', 'cuda'))"]
    said = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert said.startswith("no libflashpo_cuda*.so next to flashpo._C")


def test_no_instruction_set_leaks_into_another(wheel):
    """Of a weak symbol, as of an inline function, the linker keeps one copy for all: it may be that for AVX-512. Those
    in the namespace of their instruction set have no other copy."""
    _, _, tag = wheel.stem.split("-", 2)
    objects = [x for x in (ROOT / "build" / tag).rglob("*.o") if "cpu_" in str(x) and "cpu_baseline" not in str(x)]
    assert objects
    for path in objects:
        symbols = subprocess.run(["nm", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        weak = [line.split()[-1] for line in symbols.splitlines() if line.split()[-2] in "WVu"]
        (isa,) = (part[4:-4] for part in path.parts if part.startswith("cpu_"))  # cpu_avx2.dir
        shared = {name for name in weak if f"7flashpo{len(isa)}{isa}" not in name}  # mangled: flashpo::avx2
        assert shared <= {"DW.ref.__gxx_personality_v0"}, path.name


def test_an_instruction_set_that_cannot_run_is_refused():
    for isa in ({"avx2", "avx512", "avx512bf16", "amx"} - set(flashpo._op.native.isas)) | {"avx3"}:
        run = subprocess.run(
            [sys.executable, "-c", "import flashpo"],
            capture_output=True,
            text=True,
            env=os.environ | {"FLASHPO_ISA": isa},
        )
        assert run.returncode != 0
        assert f"FLASHPO_ISA={isa} cannot run here" in run.stderr


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512bf16", "amx"])
def test_every_instruction_set_gives_the_same(isa):
    """To rounding: the sets differ in how many sums run side by side."""
    code = """
import sys, torch, flashpo
torch.manual_seed(0)
h, w, t = torch.randn(33, 24), torch.randn(517, 24), torch.randint(517, (33,))
h.requires_grad_(), w.requires_grad_()
out = flashpo.linear_logprob(h, w, t)
(out.logprob - out.entropy).sum().backward()
exact = flashpo.linear_logprob(h.double(), w.double(), t)
for x, y in zip((out.logprob, out.entropy), (exact.logprob, exact.entropy)):
    torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)
assert flashpo._op.native.isa == sys.argv[1]
"""
    supported = torch.backends.cpu.get_cpu_capability().lower()
    if (isa, supported) in (("avx2", "default"), ("avx512", "default"), ("avx512", "avx2")):
        pytest.skip(f"this CPU has {supported}")
    if isa in ("avx512bf16", "amx") and isa not in flashpo._op.native.isas:
        pytest.skip(f"this CPU, compiler or system has no {isa}")
    subprocess.run([sys.executable, "-c", code, isa], check=True, env=os.environ | {"FLASHPO_ISA": isa})
