"""The hosts, which are the packages that FlashPO works inside of: what it relies on in them, and whether it is there.

There is a file for each host. No other part of FlashPO imports a private name of a host, or depends on a signature, the
order of a tuple or the code of a method there. Each thing that may be missing is a `Seam`. Whether a host has it is
decided by the names that the host's code defines and reads, never by the version alone.
"""

from typing import NamedTuple


class Seam(NamedTuple):
    """A place where FlashPO goes into a host's code. Its text says whether FlashPO uses it, and if not, why."""

    name: str
    gives: str  # what FlashPO does there
    without: str  # what happens if the host does not have it
    reason: str  # what the host lacks; empty if it has the seam

    def __str__(self) -> str:
        if not self.reason:
            return f"{self.name}: used, {self.gives}"
        return f"{self.name}: not used, {self.without}: {self.reason}"
