"""What a release needs besides its kernels: reproducible sources, an installation without a compiler, and sources that
compile for ARM. Nothing here compiles a whole wheel.
"""

import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch

import flashpo

ROOT = pathlib.Path(__file__).parents[1]
ARM = "aarch64-linux-gnu-g++"


def pip(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "pip", *map(str, arguments)], text=True, **options)


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """For pip with --no-build-isolation: what builds a pure-Python FlashPO, installed once for all tests."""
    tools = tmp_path_factory.mktemp("tools")
    pip("install", "--quiet", "--target", tools, "scikit-build-core>=1.0", "build", check=True)
    return os.environ | {"FLASHPO_PURE": "1", "PYTHONPATH": str(tools)}


def build_wheel(source, out, environment):
    options = ["--no-build-isolation", "--no-deps", "--quiet", "--wheel-dir", out]
    pip("wheel", *options, source, env=environment, check=True)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def pure(tmp_path_factory, environment):
    return build_wheel(ROOT, tmp_path_factory.mktemp("pure"), environment)


def test_the_sdist_builds_the_same_wheel(pure, tmp_path, environment):
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--skip-dependency-check"]
    subprocess.run([*command, "--outdir", tmp_path, ROOT], check=True, stdout=subprocess.DEVNULL, env=environment)
    (sdist,) = tmp_path.iterdir()
    wheel = build_wheel(sdist, tmp_path, environment)
    assert wheel.name == pure.name
    assert contents(wheel) == contents(pure)


def test_without_the_cpp_kernels_operators_run_in_torch_and_doctor_says_why(pure, tmp_path):
    assert pure.name.endswith("-py3-none-any.whl")
    pip("install", "--no-deps", "--quiet", "--target", tmp_path, pure, check=True)
    code = f"""
import sys
sys.path[:0] = {[str(tmp_path), str(pathlib.Path(torch.__file__).parents[1])]!r}
import torch, flashpo, flashpo.doctor
assert flashpo.__file__.startswith({str(tmp_path)!r}), flashpo.__file__
flashpo.gae(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool))
assert set(flashpo.stats()["gae_fwd"]) == {{"torch"}}, flashpo.stats()
print(dict(flashpo.doctor.machine())["native"])
"""
    # -S: without site there is no finder of an editable install in front of this one
    run = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "installed without the C++ kernels (pip with FLASHPO_PURE=1)\n"


def test_without_a_compiler_the_build_says_how_to_do_without(tmp_path):
    build = ["wheel", "--no-deps", "--wheel-dir", tmp_path, f"--config-settings=build-dir={tmp_path}/build", ROOT]
    run = pip(*build, env=os.environ | {"CXX": str(tmp_path / "no-such-compiler")}, capture_output=True)
    assert run.returncode != 0
    said = " ".join((run.stdout + run.stderr).split())
    assert "No C++ compiler was found" in said
    assert "FLASHPO_PURE=1" in said


def test_an_editable_install_adds_one_folder_of_the_checkout_to_the_path(tmp_path, environment):
    """Not the checkout or a folder above it: whatever else lies there would be imported as a package."""
    options = ["--no-build-isolation", "--no-deps", "--quiet", "--target", tmp_path, "--editable"]
    pip("install", *options, ROOT, env=environment, check=True)
    lines = [line for path in tmp_path.glob("*.pth") for line in path.read_text().splitlines()]
    assert [line for line in lines if not line.startswith("import ")] == [str(ROOT / "python")]
    modules = {
        "bench.run": "bench/run",
        "kernels.linear_logprob": "kernels/linear_logprob",
        "run": "python/flashpo/run",
    }
    code = f"""
import importlib.util, site, sys
sys.path.append({str(pathlib.Path(torch.__file__).parents[1])!r})
site.addsitedir({str(tmp_path)!r})
for name in {list(modules)!r}:
    print(importlib.util.find_spec("flashpo." + name).origin)
"""
    run = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout.splitlines() == [f"{ROOT / path}.py" for path in modules.values()], run.stderr


def test_the_version_stands_in_one_place():
    """And the changelog has a section for it."""
    assert importlib.metadata.version("flashpo") == flashpo.__version__
    assert not re.search(r'^version = "', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert f"\n## {flashpo.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.skipif(shutil.which(ARM) is None, reason=f"needs {ARM} (Debian: apt-get install g++-aarch64-linux-gnu)")
@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), ids=lambda path: path.stem)
def test_kernels_compile_for_arm(source):
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    subprocess.run([ARM, *flags, source], check=True)
