"""What a trainer says where TRL's own code does something in the place of FlashPO's: each reason once, or an error."""

import warnings

from flashpo import _fallbacks


class Fallback:
    """`says`: what TRL does here, a sentence with a {reason}; `error`: the message where the user has ruled TRL out."""

    def __init__(self, says: str, error: str | None = None):
        self.says, self.error = says, error
        self._said: dict[str, None] = {}  # reasons, in their order

    @property
    def first(self) -> str:
        """The first reason, empty where there was none."""
        return next(iter(self._said), "")

    def __call__(self, reason: str) -> None:
        """Warn of a reason that is new.

        Raises:
            ValueError: `error` is set.
        """
        if self.error is not None:
            raise ValueError(self.error.format(reason=reason)) from None
        if reason not in self._said:
            self._said[reason] = None
            sentence = self.says.format(reason=reason)
            _fallbacks.note(sentence)
            warnings.warn(sentence, stacklevel=3)

    def allows(self, reason: str) -> bool:
        """Whether there is no reason, "", for TRL's code; warns of one that is new."""
        if reason:
            self(reason)
        return not reason
