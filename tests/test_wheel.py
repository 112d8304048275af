"""The wheel that `pip wheel` makes: what it links, what it holds, and that it works where nothing else is installed."""

import os
import pathlib
import platform
import re
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


def test_links_neither_torch_nor_cuda(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        (extension,) = (name for name in archive.namelist() if name.endswith(".so"))
        archive.extract(extension, tmp_path)
    dynamic = subprocess.run(["readelf", "-d", tmp_path / extension], capture_output=True, text=True, check=True)
    needed = [line.split("[")[1].rstrip("]") for line in dynamic.stdout.splitlines() if "(NEEDED)" in line]
    assert needed
    assert not [name for name in needed if any(banned in name for banned in ("torch", "c10", "cuda", "cudart", "gomp"))]


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


def test_works_in_a_clean_environment(wheel, tmp_path):
    """Torch, borrowed from here, is all that there is besides the wheel."""
    venv.create(tmp_path, with_pip=True)
    python = tmp_path / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (tmp_path / "lib" / version / "site-packages" / "torch.pth").write_text(
        f"{pathlib.Path(torch.__file__).parents[1]}\n"
    )
    code = """
import torch, flashpo
out = flashpo.linear_logprob(torch.randn(3, 4), torch.randn(9, 4), torch.tensor([0, 1, 8]))
assert out.logprob.isfinite().all() and flashpo.stats()["linear_logprob_partial"] == {"native": 1}, flashpo.stats()
assert flashpo.__file__.startswith(%r)
"""
    subprocess.run([python, "-c", code % str(tmp_path)], check=True, cwd=tmp_path)
    doctor = subprocess.run([tmp_path / "bin" / "flashpo", "doctor"], capture_output=True, text=True, cwd=tmp_path)
    assert doctor.returncode == 0, doctor.stderr
    assert "linear_logprob_partial" in doctor.stdout


def test_builds_without_a_cuda_compiler(tmp_path):
    """And with CXX=gcc, which links no C++ library by itself."""
    quick = "cmake.define.CMAKE_CXX_FLAGS_RELEASE=-O0"
    settings = ("cmake.define.FLASHPO_CUDA=OFF", quick, f"build-dir={tmp_path}/build")
    options = [*(f"--config-settings={x}" for x in settings), "--no-deps", "--quiet"]
    target = ["--target", str(tmp_path / "site")]
    install = [sys.executable, "-m", "pip", "install", *options, *target, str(ROOT)]
    subprocess.run(install, check=True, env=os.environ | {"CXX": "gcc"})
    # -S: without site there is no finder of an editable install in front of this one
    code = f"import sys; sys.path[:0] = {[str(tmp_path / 'site'), *sys.path]!r}; from flashpo import _C"
    run = [sys.executable, "-S", "-c", f"{code}; print(_C.built_with_cuda)"]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "False\n"


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
    for isa in ({"avx2", "avx512", "amx"} - set(flashpo._op.native.isas)) | {"avx3"}:
        run = subprocess.run(
            [sys.executable, "-c", "import flashpo"],
            capture_output=True,
            text=True,
            env=os.environ | {"FLASHPO_ISA": isa},
        )
        assert run.returncode != 0
        assert f"FLASHPO_ISA={isa} cannot run here" in run.stderr


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "amx"])
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
    if isa == "amx" and flashpo._op.native.isa != "amx":
        pytest.skip("this CPU, compiler or system has no AMX")
    subprocess.run([sys.executable, "-c", code, isa], check=True, env=os.environ | {"FLASHPO_ISA": isa})
