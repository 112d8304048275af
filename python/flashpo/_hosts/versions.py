"""The versions of hosts that FlashPO is tested with. `make matrix`, CI, README and `flashpo doctor` read them here.

They do not decide what FlashPO does with a version: the seams that it finds in the host do.
"""

import importlib
import importlib.metadata
import importlib.util
from typing import NamedTuple


class Row(NamedTuple):
    """An environment of `make matrix`. All other packages have the versions of `constraints.txt`."""

    trl: str
    transformers: str


MATRIX = (  # oldest first; `make test` uses the last one
    Row("1.11.0", "5.14.1"),
    Row("1.13.0", "5.17.0"),
    Row("1.15.0", "5.20.2"),
    Row("1.16.0", "5.24.0"),
)
FLOORS = {"torch": "2.10", "trl": "1.11", "transformers": "5.14"}


def installed(package: str) -> str | None:
    """The version of a package; None if it is not installed.

    A package that was copied or bundled may have no metadata. Then the version is that of its module.
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if importlib.util.find_spec(package) is None:
            return None
        return importlib.import_module(package).__version__


def standing(package: str, version: str) -> str:
    """How a version relates to those that FlashPO is tested with, in words."""
    newest = getattr(MATRIX[-1], package, None)
    if older(version, FLOORS[package]):
        return f"older than the oldest that FlashPO is tested with, {FLOORS[package]}"
    if newest is not None and older(newest, version):
        return f"newer than the newest that FlashPO is tested with, {newest}"
    return "supported"


def older(version: str, other: str) -> bool:
    """Whether `version` belongs to an older minor release than `other`."""
    return _minor(version) < _minor(other)


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(x) for x in version.split("+")[0].split(".")[:2] if x.isdigit())
