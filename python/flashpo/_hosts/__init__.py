"""The packages that FlashPO works inside of: what it relies on in each, and whether the installed one has it.

A file each. Nobody else imports a private name of them, nor counts on a signature, the order of a tuple or the text of
a method. What may be missing is a `Seam`: found by what the package has and reads, never by its version alone.
"""

from typing import NamedTuple


class Seam(NamedTuple):
    """A place where FlashPO goes into another package's code."""

    name: str
    gives: str  # what FlashPO does there
    without: str  # what happens where the package does not have it
    reason: str  # why it does not, empty where it has

    def __str__(self) -> str:
        if not self.reason:
            return f"{self.name}: used, {self.gives}"
        return f"{self.name}: not used, {self.without}: {self.reason}"
