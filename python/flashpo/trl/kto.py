"""KTOTrainer: TRL's KTO on token trees."""

from dataclasses import dataclass

import trl
from trl.trainer import kto_trainer  # not trl's names: `flashpo run` replaces them

from flashpo.trl.accelerated import PackedWithReference
from flashpo.trl.config import SharingOptions, documented


@documented
@dataclass
class KTOConfig(SharingOptions, trl.KTOConfig):
    """Takes all arguments of `trl.KTOConfig`, and those below."""


class KTOTrainer(PackedWithReference, kto_trainer.KTOTrainer):
    """TRL's KTOTrainer on token trees: each distinct token of a batch is computed once, and padding never.

    It takes the arguments of `trl.KTOTrainer`. `share_prefix` of `flashpo.trl.KTOConfig` says whether it uses trees.
    """

    _trl_class = kto_trainer.KTOTrainer
