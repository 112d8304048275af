"""`@op` turns a reference function into one `torch.library` operator with an ordered list of backends inside it.

The reference's signature is the schema and its body the specification. Backends are tried in the order their file
lists them; one that cannot take its arguments returns NotImplemented; the reference ("torch") is last. The choice is
made inside the operator, so `torch.compile` sees one opaque node whatever the backend.
"""

import contextlib
import functools
import importlib.util
import inspect
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd import forward_ad

from flashpo import _cuda_library

try:
    from flashpo import _C as native  # type: ignore[attr-defined]

    why_no_native = ""
except ImportError as error:  # said by `why_unavailable`, so by doctor and by a forced backend's error
    if os.environ.get("FLASHPO_ISA"):  # who asks for one set of C++ kernels must not get torch
        raise
    native, why_no_native = None, f"flashpo._C does not load: {error}"
    if importlib.util.find_spec("flashpo._C") is None:
        why_no_native = "installed without the C++ kernels (pip with FLASHPO_PURE=1)"

BACKENDS = ("native", "triton", "torch")
LIB = torch.library.Library("flashpo", "DEF")
OPS: dict[str, "Op"] = {}  # read by tests, benchmarks and `flashpo doctor`; never by an op
CALLS: Counter[tuple[str, str]] = Counter()
log = logging.getLogger("flashpo")
forced: str | None = None  # a plain global: CUDA backward runs in torch's own threads


@functools.cache
def why_unavailable(backend: str, device: str) -> str | None:
    """None where `backend` can run on `device`, else the reason why not."""
    if backend == "native":
        if native is None:
            return why_no_native
        if device == "cuda":
            return _cuda_library.why_not(native) or None
        return None if device == "cpu" else f"no native kernels for {device}"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if device == "cuda" or interpreted else f"Triton does not compile for {device}"
    return None


class Op:
    """`reference` as `torch.ops.flashpo.<name>`; the fake and the backends are added by decorators."""

    def __init__(self, reference: Callable, mutates: tuple[str, ...]):
        self.name, self.reference = reference.__name__, reference
        self.names = tuple(inspect.signature(reference).parameters)
        self.kernels: dict[str, Callable] = {"torch": reference}  # in the order in which they are tried
        self.around: Callable | None = None  # calls the kernel with its arguments, for somebody who times it
        LIB.define(self.name + torch.library.infer_schema(reference, mutates_args=mutates))
        LIB.impl(self.name, self._run, "CompositeExplicitAutograd")  # below autograd, for every device
        self.overload = getattr(torch.ops.flashpo, self.name).default
        OPS[self.name] = self

    def fake(self, fn: Callable) -> Callable:
        torch.library.register_fake(f"flashpo::{self.name}", fn, lib=LIB)
        return fn

    def backend(self, name: str) -> Callable[[Callable], Callable]:
        def add(fn: Callable) -> Callable:
            self.kernels = self.kernels | {name: fn}
            self.kernels["torch"] = self.kernels.pop("torch")  # last
            return fn

        return add

    def _run(self, *args):
        device = args[0].device.type
        if torch.is_autocast_enabled(device):  # an op computes in the dtypes that it is given
            with torch.autocast(device, enabled=False):
                return self._run(*args)
        for name, kernel in self.kernels.items():
            if forced not in (None, name) or why_unavailable(name, device) is not None:
                continue
            out = kernel(*args) if self.around is None else self.around(kernel, *args)
            if out is not NotImplemented:
                CALLS[self.name, name] += 1
                if CALLS[self.name, name] == 1:
                    log.info("%s runs on %s for %s tensors", self.name, name, device)
                return out
        _check_backend("FLASHPO_BACKEND", forced)
        reason = why_unavailable(forced, device) if forced else None
        raise NotImplementedError(
            f"flashpo::{self.name}: backend {forced!r} cannot run on {args[0].dtype} {device} tensors"
            + (f": {reason}" if reason else "")
        )

    def __call__(self, *args):
        if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or forward_ad._current_level >= 0):
            self._refuse_derivatives(args)
        return self.overload(*args)

    def _refuse_derivatives(self, args: tuple) -> None:
        """An operator is a constant to autograd: what asks for a derivative here would get none, without an error."""
        for name, x in zip(self.names, args):
            if not isinstance(x, torch.Tensor):
                continue
            if x.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"{name} requires grad, but {self.name} has no gradient: call it under torch.no_grad()"
                )
            if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
                raise NotImplementedError(f"{name} has a tangent, but {self.name} has no forward-mode derivative")


def op(reference: Callable | None = None, *, mutates: tuple[str, ...] = ()) -> Any:
    """`@op`, or `@op(mutates=("x",))` for one that writes over its argument x."""
    return Op(reference, mutates) if reference else lambda fn: Op(fn, mutates)


def force(backend: str | None) -> None:
    """Let every op run on `backend` alone, and raise where it cannot; None: choose again."""
    global forced
    _check_backend("backend", backend)
    forced = backend


def _check_backend(name: str, backend: str | None) -> None:
    if backend not in (None, *BACKENDS):
        raise ValueError(f"{name} must be one of {BACKENDS} or None, got {backend!r}")


def check_environment() -> None:
    """Raise a ValueError where the variable FLASHPO_BACKEND names no backend. Importing flashpo does not raise it, so
    that the command line can say it in one line; an op that runs with such a value does."""
    _check_backend("FLASHPO_BACKEND", os.environ.get("FLASHPO_BACKEND") or None)


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """`with flashpo.backend("triton"):` forces one backend for all threads; an op that cannot run on it raises."""
    before = forced
    force(name)
    try:
        yield
    finally:
        force(before)


def stats(reset: bool = False) -> dict[str, dict[str, int]]:
    """How often each op ran on each backend: `{"linear_logprob_fwd": {"native": 12}}`."""
    counts: dict[str, dict[str, int]] = {}
    for (name, used), n in sorted(CALLS.items()):
        counts.setdefault(name, {})[used] = n
    if reset:
        CALLS.clear()
    return counts


forced = os.environ.get("FLASHPO_BACKEND") or None
