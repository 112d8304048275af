"""The versions of other packages that FlashPO is tested with: `make matrix`, CI, README and `flashpo doctor` read this.

What FlashPO does with a version is decided by the seams that it finds, not by these numbers.
"""

import importlib
import importlib.metadata
import importlib.util
from typing import NamedTuple


class Row(NamedTuple):
    """An environment of `make matrix`; the other packages are those of `constraints.txt`."""

    trl: str
    transformers: str


MATRIX = (  # oldest first; the last one is that of `make test`
    Row("1.11.0", "5.14.1"),
    Row("1.13.0", "5.17.0"),
    Row("1.15.0", "5.20.2"),
    Row("1.16.0", "5.24.0"),
)
FLOORS = {"torch": "2.10", "trl": "1.11", "transformers": "5.14"}


def installed(package: str) -> str | None:
    """Its version; None where it is not installed. A package that was copied or bundled may have no metadata: then its
    module says it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if importlib.util.find_spec(package) is None:
            return None
        return importlib.import_module(package).__version__


def standing(package: str, version: str) -> str:
    """What a version is to FlashPO, in words."""
    newest = getattr(MATRIX[-1], package, None)
    if older(version, FLOORS[package]):
        return f"older than the oldest that FlashPO is tested with, {FLOORS[package]}"
    if newest is not None and older(newest, version):
        return f"newer than the newest that FlashPO is tested with, {newest}"
    return "supported"


def older(version: str, other: str) -> bool:
    """Whether it belongs to an older minor release than the other."""
    return _minor(version) < _minor(other)


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(x) for x in version.split("+")[0].split(".")[:2] if x.isdigit())
