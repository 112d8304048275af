"""DPOTrainer: TRL's DPO on token trees, which compute the prompt of a pair once."""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import trl
from trl.trainer import dpo_trainer  # not trl's names: `flashpo run` replaces them

from flashpo.trl.accelerated import PackedWithReference
from flashpo.trl.config import SharingOptions, documented
from flashpo.trl.sharing import Sharing


@documented
@dataclass
class DPOConfig(SharingOptions, trl.DPOConfig):
    """Takes all arguments of `trl.DPOConfig`, and those below."""


class DPOTrainer(PackedWithReference, dpo_trainer.DPOTrainer):
    """TRL's DPOTrainer on token trees: the prompt of a pair is computed once, and padding never.

    It takes the arguments of `trl.DPOTrainer`. `share_prefix` of `flashpo.trl.DPOConfig` says whether it uses trees.
    `padding_free=True`, which TRL 1.16 ignores with a warning, changes nothing here: token trees have no padding.
    """

    _trl_class = dpo_trainer.DPOTrainer

    def __init__(self, *args, **kwargs):
        given = inspect.signature(self._trl_class.__init__).bind_partial(self, *args, **kwargs).arguments
        with _without_padding_free(given.get("args")):
            super().__init__(*args, **kwargs)


@contextlib.contextmanager
def _without_padding_free(args) -> Iterator[None]:
    """Hide `padding_free` from TRL's constructor, which would warn that it pads: on token trees no row is padded."""
    wanted = getattr(args, "padding_free", False) and Sharing(args).mode is not False
    if wanted:
        args.padding_free = False
    try:
        yield
    finally:
        if wanted:
            args.padding_free = True
