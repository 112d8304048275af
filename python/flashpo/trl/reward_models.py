"""Runs reward models on token trees: the model of TRL's RewardTrainer, and the reward models of GRPO and RLOO."""

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
    """Let the backbone of a model of transformers run padded batches on token trees, if it can.

    The model may be wrapped, and its head must read hidden states. All ranks have to call this before the model first
    runs.

    Args:
        allowed: called with what prevents token trees, or with "" if nothing does; returns whether they may be used. It
            is called once here, and for every batch under `patched()`.
        sharing: the setting `share_prefix`, which also decides whether a tree is worth it.
        ran: as for `flashpo.packing.rows.take_rows`.
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
    """Those of a trainer's `reward_funcs` that are models."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._sharing = Sharing(trainer.args)
        self._tried = self._sharing.mode is False

    def share_prompts(self) -> None:
        """From now on the models score the completions of a prompt on one token tree. A second call does nothing."""
        if self._tried:
            return
        self._tried = True
        for model, name in zip(self.trainer.reward_funcs, self.trainer.reward_func_names):
            if isinstance(model, nn.Module):
                refuse = Fallback(f"FlashPO runs the reward model {name} on padded rows: {{reason}}.")
                run_on_trees(self.trainer.accelerator, model, refuse.allows, self._sharing)
