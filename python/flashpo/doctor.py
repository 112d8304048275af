"""`flashpo doctor`: the backend of every operator on this machine, and why others cannot run; `--check` tests them."""

import argparse
import ctypes
import os
import platform
import sys

import torch

import flashpo
from flashpo import _huge_pages, _op
from flashpo._hosts import report
from flashpo._hosts.versions import installed, standing
from flashpo._probes import PROBES, check, run
from flashpo.ops import _fla


def check_all(devices: list[str]) -> bool:
    """Print a line for every probe, device, backend and dtype; return whether all of them passed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the first multi-threaded exp of a process is sometimes accurate to 3e-5 only
    torch.linspace(-5, 5, 4096).exp().logsumexp(0).log()
    torch.set_num_threads(threads)
    print(f"\n{'against float64':42s} {'device':6s} {'backend':8s} {'dtype':9s} {'error':>9s} {'torch':>9s}")
    failed = 0
    for name, probe in PROBES.items():
        for device in devices:
            for backend in _op.BACKENDS:
                if _op.why_unavailable(backend, device):
                    continue
                for dtype in probe.dtypes:
                    line = f"{name:42s} {device:6s} {backend:8s} {str(dtype).removeprefix('torch.'):9s}"
                    if (backend, device, dtype) == ("triton", "cpu", torch.bfloat16):
                        print(
                            f"{line} not checked: Triton's interpreter truncates to it and multiplies its bit patterns"
                        )
                        continue
                    try:
                        result = check(probe, backend, device, dtype)
                    except NotImplementedError:
                        print(f"{line} not implemented", flush=True)
                        continue
                    except Exception as error:  # a stale build or an old driver: this is what should be reported
                        failed += 1
                        print(f"{line} FAILED: {type(error).__name__}: {error}", flush=True)
                        continue
                    failed += not result.passed
                    verdict = "ok" if result.passed else "FAILED"
                    print(f"{line} {result.error:9.1e} {result.of_torch:9.1e} {verdict}", flush=True)
    print("all checks passed" if not failed else f"{failed} checks FAILED")
    return not failed


def machine() -> list[tuple[str, str]]:
    def tested(package: str) -> str:
        found = installed(package)
        return f"{found}, {standing(package, found)}" if found else "not installed"

    native = _op.native
    facts = [
        ("flashpo", flashpo.__version__),
        ("python", platform.python_version()),
        ("torch", tested("torch")),
        ("triton", installed("triton") or "not installed"),
        ("trl", tested("trl")),
        ("transformers", tested("transformers")),
        ("fla", _fla.why_not() or "its kernels compute the recurrences of hybrid models on GPUs"),
        ("native", _op.why_no_native or "C++ kernels for CPUs"),
        ("native, CUDA", _op.why_unavailable("native", "cuda") or "CUDA C++ kernels for GPUs"),
        ("cpu", f"{platform.machine()}, {native.isa if native else 'no'} kernels, {torch.get_num_threads()} threads"),
        ("large pages", _huge_pages.why_not() or "on request"),
    ]
    built = torch.version.cuda or torch.version.hip
    if built is None or not torch.cuda.is_available():
        return [*facts, ("cuda", f"no device (torch built for {built})" if built else "torch built without it")]
    facts.append(("cuda", built))
    if torch.version.cuda:
        driver = ctypes.c_int()
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(driver))
        facts.append(("driver", f"for CUDA up to {driver.value // 1000}.{driver.value % 1000 // 10}"))
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        facts.append((f"cuda:{i}", f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"))
    return facts


def chosen(device: str) -> tuple[dict[str, str], str | None]:
    """The backend that each of the probes' operators takes for fp32 tensors, and an error if there was one."""
    before = _op.CALLS.copy()
    problem = None
    for probe in PROBES.values():
        try:
            run(probe.ours, probe.make(), device, torch.float32, torch.float32)
        # A forced backend that cannot run, or a stale build: this is what should be reported
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
    used = {op: backend for (op, backend), n in _op.CALLS.items() if n > before[op, backend]}
    _op.CALLS.clear()
    _op.CALLS.update(before)
    return used, problem


def table(device: str) -> list[str]:
    """A table of operators and backends, and the reasons why some are missing."""
    used, problem = chosen(device)
    reasons: list[str] = []
    lines = [f"{'operator on ' + device:32s}" + "".join(f"{b:14s}" for b in _op.BACKENDS)]
    for name, op in _op.OPS.items():
        line = f"{name:32s}"
        for backend in _op.BACKENDS:
            reason = _op.why_unavailable(backend, device)
            if not reason and backend not in op.kernels:
                reason = "has no kernel there"
            tried = list(op.kernels)
            if not reason and name in used and tried.index(backend) < tried.index(used[name]):
                reason = f"is not the forced backend {_op.forced}" if _op.forced else "does not take such tensors"
            if not reason:
                line += f"{'used' if used.get(name) == backend else 'available':14s}"
                continue
            reason = f"{backend}: {reason}"
            if reason not in reasons:
                reasons.append(reason)
            line += f"{f'no [{reasons.index(reason) + 1}]':14s}"
        lines.append(line.rstrip())
    lines += [f"  [{i}] {reason}" for i, reason in enumerate(reasons, 1)]
    return lines if problem is None else [*lines, f"  ERROR: {problem}"]


def verdict(devices: list[str], of_trl: list[str], problems: list[str]) -> str:
    """One line that says whether FlashPO runs here, and on what."""
    best = {device: next(b for b in _op.BACKENDS if not _op.why_unavailable(b, device)) for device in devices}
    names = {"native": "C++ or CUDA kernels", "triton": "Triton", "torch": "plain torch"}
    said = [f"{device} by {names[backend]}" for device, backend in best.items()]
    slow = [f"{device} has no kernels" for device, backend in best.items() if backend == "torch"]
    missing = [f"{len(lacks)} uses of TRL are missing"] if (lacks := [x for x in of_trl if ": not used" in x]) else []
    said.append(of_trl[0].partition(":")[0] if of_trl else "TRL is not installed")
    if wrong := problems + slow + missing:
        return f"FlashPO runs here in part: {'; '.join(wrong)} ({', '.join(said)})"
    return f"FlashPO runs here: {', '.join(said)}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="flashpo doctor", description="What of FlashPO runs on this machine")
    parser.add_argument("--check", action="store_true", help="compare every backend with float64, forward and backward")
    parser.add_argument("--model", metavar="PATH", help="what would run for this model; its weights are not loaded")
    args = parser.parse_args(argv)
    if args.model is not None:
        from flashpo._doctor_model import lines

        try:
            print("\n".join(lines(args.model)))
        except ValueError as error:
            print(f"flashpo doctor: {error}", file=sys.stderr)
            return 2
        return 0
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    of_trl, tables = report.of_trl(), [table(device) for device in devices]
    problems = [line.strip() for lines in tables for line in lines if line.startswith("  ERROR")]
    print(verdict(devices, of_trl, problems) + "\n")
    for name, fact in machine():
        print(f"{name:14s}{fact}")
    for variable in ("FLASHPO_BACKEND", "FLASHPO_ISA", "FLASHPO_OPTIONS", "TRITON_INTERPRET"):
        if variable in os.environ:
            print(f"{variable}={os.environ[variable]}")
    for block in [of_trl, *tables]:
        if block:
            print("\n" + "\n".join(block))
    return 0 if not args.check or check_all(devices) else 1
