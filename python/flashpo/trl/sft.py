"""SFTTrainer: TRL's SFT on token trees."""

from dataclasses import dataclass

import trl
from trl.trainer import sft_trainer  # not trl's names: `flashpo run` replaces them

from flashpo.trl.accelerated import Packed
from flashpo.trl.config import SharingOptions, documented


@documented
@dataclass
class SFTConfig(SharingOptions, trl.SFTConfig):
    """All arguments of `trl.SFTConfig`, and those below."""


class SFTTrainer(Packed, sft_trainer.SFTTrainer):
    """TRL's SFTTrainer, every distinct token of a batch once; `flashpo.trl.SFTConfig` has the option."""

    _trl_class = sft_trainer.SFTTrainer
