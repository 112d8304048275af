"""Warns when TRL's own code runs instead of FlashPO's, once for each reason; or raises an error."""

import warnings

from flashpo import _fallbacks


class Fallback:
    """One fallback of a trainer; call it with the reason.

    Args:
        says: the sentence of the warning, with a {reason} in it.
        error: the message of an error to raise instead, with a {reason}, if the user does not allow the fallback.
    """

    def __init__(self, says: str, error: str | None = None):
        self.says, self.error = says, error
        self._said: dict[str, None] = {}  # reasons, in their order

    @property
    def first(self) -> str:
        """The first reason; empty if there was none."""
        return next(iter(self._said), "")

    def __call__(self, reason: str) -> None:
        """Warn, if this reason is new.

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
        """Whether `reason` is empty, so that FlashPO's code may run. Otherwise warns or raises, as a call does."""
        if reason:
            self(reason)
        return not reason
