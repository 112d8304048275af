"""The public API is written down in public_api.txt, so that no change of it goes unnoticed.

`python tests/test_public_api.py` writes that file. A removed or changed line also needs an entry in CHANGELOG.md.
"""

import dataclasses
import importlib
import inspect
from pathlib import Path

import pytest

PINNED = Path(__file__).with_name("public_api.txt")
MODULES = ("flashpo.ops", "flashpo.packing", "flashpo.rollout", "flashpo.trl", "flashpo.verl")


def public() -> list[str]:
    modules = {name: importlib.import_module(name) for name in MODULES}
    lines = [
        line
        for name, module in modules.items()
        for n in sorted(module.__all__)
        for line in of(name, n, getattr(module, n))
    ]
    top = importlib.import_module("flashpo")
    elsewhere = {n for module in modules.values() for n in module.__all__}
    lines += [f"flashpo.{n}" for n in sorted(top.__all__) if n in elsewhere]
    return lines + [
        line for n in sorted(top.__all__) if n not in elsewhere for line in of("flashpo", n, getattr(top, n))
    ]


def of(module: str, name: str, thing: object) -> list[str]:
    name = f"{module}.{name}"
    if inspect.isclass(thing):
        return of_class(name, thing)
    if callable(thing):
        return [name + parameters(thing)]
    return [f"{name}: {', '.join(map(str, thing))}"]


def of_class(name: str, kind: type) -> list[str]:
    """Only what FlashPO defines: what a class of TRL gives differs between the versions of TRL."""
    ours = [base for base in kind.__mro__ if base.__module__.startswith("flashpo")]
    lines = [
        name + parameters(kind.__init__) if "__init__" in vars(kind) and not dataclasses.is_dataclass(kind) else name
    ]
    if dataclasses.is_dataclass(kind):
        added = {field for base in ours for field in vars(base).get("__annotations__", {})}
        lines += [f"{name}.{f.name}{default(f)}" for f in dataclasses.fields(kind) if f.name in added]
    lines += [f"{name}.{field}" for field in getattr(kind, "_fields", ())]
    methods = {n: getattr(f, "__func__", f) for base in reversed(ours) for n, f in vars(base).items()}
    said = {n: parameters(f) for n, f in sorted(methods.items()) if inspect.isfunction(f) and not n.startswith("_")}
    return lines + [f"{name}.{n}{taken}" for n, taken in said.items() if "*args" not in taken]  # else it is TRL's


def default(field: dataclasses.Field) -> str:
    return "" if field.default is dataclasses.MISSING else f"={field.default!r}"


def parameters(function) -> str:
    """Names, kinds and defaults; annotations may change."""
    given = inspect.signature(function).parameters.values()
    return str(inspect.Signature([p.replace(annotation=p.empty) for p in given if p.name not in ("self", "cls")]))


def test_the_public_api_is_as_written_down():
    pytest.importorskip("trl")
    assert public() == PINNED.read_text().splitlines(), "see the first lines of this file"


if __name__ == "__main__":
    PINNED.write_text("\n".join(public()) + "\n")
