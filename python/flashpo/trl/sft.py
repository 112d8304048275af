"""SFTTrainer: TRL's SFT on token trees."""

from dataclasses import dataclass

import trl
from trl.trainer import sft_trainer  # not trl's names: `flashpo run` replaces them

from flashpo.trl.accelerated import Packed
from flashpo.trl.config import SharingOptions, documented


@documented
@dataclass
class SFTConfig(SharingOptions, trl.SFTConfig):
    """Takes all arguments of `trl.SFTConfig`, and those below."""


class SFTTrainer(Packed, sft_trainer.SFTTrainer):
    """TRL's SFTTrainer on token trees: each distinct token of a batch is computed once, and padding never.

    It takes the arguments of `trl.SFTTrainer`. `share_prefix` of `flashpo.trl.SFTConfig` says whether it uses trees.
    """

    _trl_class = sft_trainer.SFTTrainer
