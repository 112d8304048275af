"""KTOTrainer: TRL's KTO on token trees."""

from dataclasses import dataclass

import trl
from trl.trainer import kto_trainer  # not trl's names: `flashpo run` replaces them

from flashpo.trl.accelerated import PackedWithReference
from flashpo.trl.config import SharingOptions, documented


@documented
@dataclass
class KTOConfig(SharingOptions, trl.KTOConfig):
    """All arguments of `trl.KTOConfig`, and those below."""


class KTOTrainer(PackedWithReference, kto_trainer.KTOTrainer):
    """TRL's KTOTrainer, every distinct token of a batch once; `flashpo.trl.KTOConfig` has the option."""

    _trl_class = kto_trainer.KTOTrainer
