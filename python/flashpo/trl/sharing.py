"""`share_prefix` of a trainer's arguments: whether it runs on token trees, and what it says where it cannot."""

from flashpo.trl._fallback import Fallback


class Sharing:
    """ "auto": packed where model and batch can be, else padded after a warning that names the reason; True: an error
    instead; False: always padded."""

    def __init__(self, args):
        self.mode = getattr(args, "share_prefix", "auto")  # TRL's own configurations have no such field
        noise = getattr(args, "neftune_noise_alpha", None)
        self._against = "neftune_noise_alpha: its noise depends on the length of a padded row" if noise else ""
        strict = "share_prefix=True, but {reason}" if self.mode is True else None
        self.refuse = Fallback("FlashPO scores padded rows here, prompts are not shared: {reason}.", strict)

    def allowed(self, reason: str) -> bool:
        """Whether to run packed; `reason`: what is against it, empty where nothing is."""
        reason = reason or self._against
        if self.mode is not False and reason:
            self.refuse(reason)
        return self.mode is not False and not reason
