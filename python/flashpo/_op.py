"""`@op` turns a reference function into one `torch.library` operator that chooses among an ordered list of backends.

The reference's signature is the operator's schema, and its body is the specification. Backends are tried in the order
in which their file lists them. A backend that cannot take the arguments returns NotImplemented. The reference ("torch")
is last. The choice is made inside of the operator, so `torch.compile` sees one opaque node, whatever the backend is.
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
except ImportError as error:  # reported by `why_unavailable`, and so by doctor and by the error of a forced backend
    if os.environ.get("FLASHPO_ISA"):  # a user who asks for one set of C++ kernels must not get torch
        raise
    native, why_no_native = None, f"flashpo._C does not load: {error}"
    if importlib.util.find_spec("flashpo._C") is None:
        why_no_native = "installed without the C++ kernels (pip with FLASHPO_PURE=1)"

BACKENDS = ("native", "triton", "torch")
LIB = torch.library.Library("flashpo", "DEF")
OPS: dict[str, "Op"] = {}  # for tests, benchmarks and `flashpo doctor`; operators do not read it
CALLS: Counter[tuple[str, str]] = Counter()
log = logging.getLogger("flashpo")
forced: str | None = None  # a plain global, because CUDA backward runs in torch's own threads


@functools.cache
def why_unavailable(backend: str, device: str) -> str:
    """Why `backend` cannot run on `device`; empty if it can."""
    if backend == "native":
        if native is None:
            return why_no_native
        if device == "cuda":
            return _cuda_library.why_not(native)
        return "" if device == "cpu" else f"no native kernels for {device}"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return "" if device == "cuda" or interpreted else f"Triton does not compile for {device}"
    return ""


class Op:
    """The reference function as `torch.ops.flashpo.<name>`. Decorators add the fake and the backends."""

    def __init__(self, reference: Callable, mutates: tuple[str, ...]):
        self.name, self.reference = reference.__name__, reference
        self.names = tuple(inspect.signature(reference).parameters)
        self.kernels: dict[str, Callable] = {"torch": reference}  # in the order in which they are tried
        self.around: Callable | None = None  # if set, it calls the kernel with its arguments, in order to time it
        LIB.define(self.name + torch.library.infer_schema(reference, mutates_args=mutates))
        LIB.impl(self.name, self._run, "CompositeExplicitAutograd")  # below autograd, and for every device
        self.overload = getattr(torch.ops.flashpo, self.name).default
        OPS[self.name] = self

    def fake(self, fn: Callable) -> Callable:
        torch.library.register_fake(f"flashpo::{self.name}", fn, lib=LIB)
        return fn

    def backend(self, name: str) -> Callable[[Callable], Callable]:
        def add(fn: Callable) -> Callable:
            self.kernels = self.kernels | {name: fn}
            self.kernels["torch"] = self.kernels.pop("torch")  # the reference stays last
            return fn

        return add

    def _run(self, *args):
        device = args[0].device.type
        if torch.is_autocast_enabled(device):  # an operator computes in the dtypes that it is given
            with torch.autocast(device, enabled=False):
                return self._run(*args)
        for name, kernel in self.kernels.items():
            if forced not in (None, name) or why_unavailable(name, device):
                continue
            out = kernel(*args) if self.around is None else self.around(kernel, *args)
            if out is not NotImplemented:
                CALLS[self.name, name] += 1
                if CALLS[self.name, name] == 1:
                    log.info("%s runs on %s for %s tensors", self.name, name, device)
                return out
        _check_backend("FLASHPO_BACKEND", forced)
        reason = why_unavailable(forced, device) if forced else ""
        raise NotImplementedError(
            f"flashpo::{self.name}: backend {forced!r} cannot run on {args[0].dtype} {device} tensors"
            + (f": {reason}" if reason else "")
        )

    def __call__(self, *args):
        if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or forward_ad._current_level >= 0):
            self._refuse_derivatives(args)
        return self.overload(*args)

    def _refuse_derivatives(self, args: tuple) -> None:
        """Raise if a derivative is asked for. An operator is a constant to autograd, which would silently give none."""
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
    """`@op`, or `@op(mutates=("x",))` for an operator that writes over its argument x."""
    return Op(reference, mutates) if reference else lambda fn: Op(fn, mutates)


def force(backend: str | None) -> None:
    """Make every operator run on `backend` only, and raise if it cannot. None restores the choice."""
    global forced
    _check_backend("backend", backend)
    forced = backend


def _check_backend(name: str, backend: str | None) -> None:
    if backend not in (None, *BACKENDS):
        raise ValueError(f"{name} must be one of {BACKENDS} or None, got {backend!r}")


def check_environment() -> None:
    """Raise a ValueError if the variable FLASHPO_BACKEND names no backend. Importing flashpo does not raise it, so that
    the command line can report it in one line. An operator that runs with such a value raises it, too."""
    _check_backend("FLASHPO_BACKEND", os.environ.get("FLASHPO_BACKEND") or None)


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """`with flashpo.backend("triton"):` forces one backend for all threads. Operators that cannot run on it raise."""
    before = forced
    force(name)
    try:
        yield
    finally:
        force(before)


def stats(reset: bool = False) -> dict[str, dict[str, int]]:
    """The number of calls of each operator on each backend: `{"linear_logprob_fwd": {"native": 12}}`.

    With `reset`, counting starts again from zero.
    """
    counts: dict[str, dict[str, int]] = {}
    for (name, used), n in sorted(CALLS.items()):
        counts.setdefault(name, {})[used] = n
    if reset:
        CALLS.clear()
    return counts


forced = os.environ.get("FLASHPO_BACKEND") or None
