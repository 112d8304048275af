"""RewardTrainer: TRL's reward modelling on token trees, which compute the prompt of a pair once."""

from dataclasses import dataclass

import trl
from trl.trainer import reward_trainer  # not trl's names: `flashpo run` replaces them

from flashpo._causal_lm import layers_of_wrapping
from flashpo.trl.accelerated import Accelerated
from flashpo.trl.config import SharingOptions, documented
from flashpo.trl.reward_models import run_on_trees
from flashpo.trl.sharing import Sharing


@documented
@dataclass
class RewardConfig(SharingOptions, trl.RewardConfig):
    """Takes all arguments of `trl.RewardConfig`, and those below."""


class RewardTrainer(Accelerated, reward_trainer.RewardTrainer):
    """TRL's RewardTrainer on token trees: the prompt of a pair is computed once, and padding never.

    It takes the arguments of `trl.RewardTrainer`. `share_prefix` of `flashpo.trl.RewardConfig` says whether it uses
    trees.
    """

    _trl_class = reward_trainer.RewardTrainer

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._sharing, self._tried = Sharing(self.args), False
        if self._has_whole_models:
            self._try_out()

    def _why_not_parts(self):
        return super()._why_not_parts() | self._sharing.parts

    def compute_loss(self, *args, **kwargs):
        self._try_out()
        return super().compute_loss(*args, **kwargs)

    def _try_out(self) -> None:
        if not self._tried and self._sharing.mode is not False:
            sharing = self._sharing
            run_on_trees(self.accelerator, self.model, sharing.allowed, sharing, lambda *ran: self._phases.ran(*ran))
            if not sharing.why_not:
                *_, base = layers_of_wrapping(self.model)
                sharing.compile(base.base_model, self._phases)
        self._tried = True
