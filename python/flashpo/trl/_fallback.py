"""What a trainer says where TRL's own code does something in the place of FlashPO's: each reason once, or an error."""

import warnings


class Fallback:
    """`says`: what TRL does here, a sentence with a {reason}; `error`: the message where the user has ruled TRL out."""

    def __init__(self, says: str, error: str | None = None):
        self.says, self.error = says, error
        self._said: set[str] = set()

    def __call__(self, reason: str) -> None:
        """Warn of a reason that is new.

        Raises:
            ValueError: `error` is set.
        """
        if self.error is not None:
            raise ValueError(self.error.format(reason=reason)) from None
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(self.says.format(reason=reason), stacklevel=3)

    def allows(self, reason: str) -> bool:
        """Whether there is no reason, "", for TRL's code; warns of one that is new."""
        if reason:
            self(reason)
        return not reason
