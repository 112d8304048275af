"""Models that judge whole rows, on token trees: that of TRL's RewardTrainer, and reward models of GRPO and RLOO."""

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from torch import nn

from flashpo._causal_lm import layers_of_wrapping
from flashpo._hosts.peft import why_not_trained_by_layers
from flashpo.packing.rows import not_told, take_rows
from flashpo.trl._fallback import Fallback
from flashpo.trl.patch import active
from flashpo.trl.sharing import Sharing, why_not_packed


def run_on_trees(
    accelerator: Accelerator,
    model: Any,
    allowed: Callable[[str], bool],
    sharing: Sharing,
    ran: Callable[[int, int, bool], None] = not_told,
) -> None:
    """Let a model of transformers with a head on its hidden states run its batches on trees where it can.

    Every rank has to ask, before the model first runs.

    Args:
        allowed: told what is against it, "" where nothing is; and asked for every batch that runs under `patched()`.
        sharing: whether token trees are wanted where they pay.
        ran: see `take_rows`.
    """
    *_, base = layers_of_wrapping(model)
    backbone: Any = base.base_model
    with accelerator.autocast():
        reason = why_not_trained_by_layers(model) or ("it has no backbone" if backbone is base else "")
        reason = reason or why_not_packed(backbone, head=False)
    if allowed(reason):
        pays = lambda tree: sharing.agreed(tree is not None and sharing.pays(backbone, tree), [model])  # noqa: E731
        take_rows(backbone, lambda reason: active() and allowed(reason), pays, ran)


class RewardModels:
    """The models among a trainer's `reward_funcs`."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._sharing = Sharing(trainer.args)
        self._tried = self._sharing.mode is False

    def share_prompts(self) -> None:
        """From now on they judge the completions of a prompt on one tree. Later calls do nothing."""
        if self._tried:
            return
        self._tried = True
        for model, name in zip(self.trainer.reward_funcs, self.trainer.reward_func_names):
            if isinstance(model, nn.Module):
                refuse = Fallback(f"FlashPO runs the reward model {name} on padded rows: {{reason}}.")
                run_on_trees(self.trainer.accelerator, model, refuse.allows, self._sharing)
