"""Scoring on token trees for GRPO, RLOO and PPO: each distinct token of a micro-batch runs once, padding never."""

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flashpo._causal_lm import CausalLM, text_model
from flashpo._hosts import sharding
from flashpo._hosts.trl import TREES, why_not
from flashpo.packing import TokenTree, dense, split_by_tokens
from flashpo.packing.images import Images
from flashpo.packing.scoring import accept_trees
from flashpo.packing.support import packable, why_not_packable
from flashpo.trl._replaced import replaced
from flashpo.trl.images import TrainerImages, pack_rows
from flashpo.trl.sharing import Sharing, why_not_packed


def tokens_of(inputs) -> tuple[Tensor, Tensor]:
    """Ids and mask of a batch's prompts with their completions."""
    sides = [("prompt_ids", "completion_ids"), ("prompt_mask", "completion_mask")]
    ids, mask = (torch.cat([inputs[left], inputs[right]], dim=1) for left, right in sides)
    return ids, mask


class Batch(NamedTuple):
    """Rows that are scored as a token tree."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor
    images: Images | None = None
    tree: TokenTree | None = None  # the pruned tree of all rows, if it has been packed already

    def rows(self, index: Tensor) -> "Batch":
        return Batch(self.input_ids[index], self.attention_mask[index], self.images and self.images.rows(index))

    def pack(self, models: Sequence[Any], scored: Tensor, prune: bool) -> TokenTree:
        return pack_rows(models, self.input_ids, self.attention_mask, scored, prune, self.images)


class Scores(NamedTuple):
    """What a scoring of completions computes for each of their tokens."""

    logprob: Tensor  # (B, C), 0 at tokens that are not scored
    entropy: Tensor | None  # (B, C)
    aux_loss: Tensor | None
    state_values: Tensor | None = None  # (B, C), of a critic


class PackedScoring:
    """What a trainer's `_get_per_token_logps_and_entropies` does if it can run on token trees."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.sharing = Sharing(trainer.args)
        self._reason: str | None = None  # why the models cannot run on trees, empty if they can; None: not known yet
        self._critic: PreTrainedModel | None = None  # a critic's backbone that takes trees and is still to be compared
        self._images = TrainerImages()
        self._critic_reads_text = False

    def ready(self) -> bool:
        """Whether the models and options allow token trees; a batch may still have something that does not."""
        return self.sharing.allowed(self.prepare())

    def takes(self, other_inputs: dict[str, Any], input_ids: Tensor, attention_mask: Tensor) -> Batch | None:
        """The batch in the form that `score` takes; None if it cannot run on a tree.

        other_inputs: those that TRL passes in addition to the tokens.
        """
        if not self.ready():
            return None
        try:
            with self.trainer.accelerator.autocast():
                images = self._images.of(self._models(), other_inputs, input_ids, attention_mask)
            if images is not None and self._critic_reads_text:
                raise ValueError("the batch has images: a critic with a backbone of its own reads text")
        except (TypeError, ValueError) as error:
            self.sharing.allowed(str(error))
            return None
        return Batch(input_ids, attention_mask, images)

    def prepare(self, critic: PreTrainedModel | None = None) -> str:
        """Let the trainer's models, and the backbone of a critic, take token trees.

        Returns:
            Why one of them cannot; empty if they all can.
        """
        self._critic_reads_text |= critic is not None
        if self.sharing.mode is False or self.sharing.against:
            return ""
        if reason := why_not(self.trainer._trl_class, TREES):
            return reason
        with self.trainer.accelerator.autocast():
            if self._reason is None:
                self._reason = self._try(self._models(), head=True)
            critics = [c for c in (critic, self._critic) if c is not None]
            self._critic = None
            if not self._reason:
                self._reason = self._try(critics, head=False)
        return self._reason

    def accept(self, critic: PreTrainedModel | None) -> None:
        """Let models that `packable` allows take trees, without running them: their weights are not placed yet. They
        are compared before the first scoring."""
        self._critic_reads_text |= critic is not None
        if self.sharing.mode is False or self.sharing.against:
            return
        self._critic, models = critic, self._models()
        if all(packable(m).ok for m in models) and not (critic is not None and why_not_packable(critic)):
            for model in models:
                accept_trees(model)
            if critic is not None:
                accept_trees(critic, head=False)

    def _models(self) -> list[Any]:
        return [m for m in (self.trainer.model, getattr(self.trainer, "ref_model", None)) if m is not None]

    def _try(self, models: list[Any], head: bool) -> str:
        for model in models:
            if reason := why_not_packed(model, head):
                return reason
        for model in models:
            accept_trees(model, head)
            self.sharing.compile(CausalLM.of(model).backbone if head else model, self.trainer._phases)
        return ""

    def agreed(self, batch: Batch | None, scored: Tensor) -> Batch | None:
        """The batch if `score` shall run it, otherwise None. All ranks have to ask.

        batch: what `takes` has returned.
        """
        if not self.ready():
            return None
        models, on_tree = self._models(), batch is not None
        backbones = [CausalLM.of(model).backbone for model in models]
        as_mask = [backbone for backbone in backbones if dense.installed(text_model(backbone))]
        if batch is not None and as_mask:
            tree = batch.pack(models, scored, prune=True)
            batch, on_tree = batch._replace(tree=tree), self.sharing.pays(as_mask[0], tree)
        shows = batch is not None and batch.images is not None
        return batch if self.sharing.agreed(on_tree, models, shows) else None

    def score(
        self,
        model,
        batch: Batch,
        scored: Tensor,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
    ) -> Scores:
        """Log-probs of a batch; entropies, the auxiliary loss and a critic's values if they are wanted.

        Args:
            scored: (B, C), which of the last C tokens of each row are scored.
            batch_size: how many padded rows TRL would run at once. Here a part has at most as many tokens as these
                rows, and groups are kept whole if they fit. So ranks may have different numbers of parts. If forwards
                have collectives, ranks with fewer parts run additional forwards, each on a single row.
        """
        options = {
            "temperature": self.trainer.temperature,
            "outputs": ("entropy",) if compute_entropy else (),
            "fp32_head": getattr(self.trainer.args, "cast_lm_head_to_fp32", False),  # RLOOConfig has no such option
            "aux_loss": compute_aux_loss,
        }
        models = self._models()
        (input_ids, attention_mask, images, packed), prune = batch, not compute_aux_loss
        if batch_size is None or batch_size >= len(input_ids):
            parts = [torch.arange(len(input_ids), device=input_ids.device)]
            trees = [packed if packed is not None and prune else batch.pack(models, scored, prune)]
        else:
            most = batch_size * input_ids.shape[1]
            parts = split_by_tokens(input_ids, attention_mask, scored, most, prune=prune, images=images)
            trees = [batch.rows(rows).pack(models, scored[rows], prune) for rows in parts]
        self.trainer._phases.ran(sum(len(tree.tokens) for tree in trees), input_ids.numel())
        if batch_size is not None and any(map(sharding.meets, models)):
            trees += [_least(batch, models, scored, prune)] * (self._most_of_ranks(len(trees)) - len(trees))
        chunks = []
        for tree in trees:
            with self.trainer.accelerator.autocast():
                chunks.append(model(flashpo_tree=tree, **options))
        order = torch.cat(parts).argsort()  # drops results of the additional forwards, which still get a gradient of 0
        logprob = torch.cat([chunk.stats.logprob for chunk in chunks])[order]
        entropy = torch.cat([chunk.stats.entropy for chunk in chunks])[order] if compute_entropy else None
        aux_loss = values = None
        if compute_aux_loss:
            aux_loss = torch.stack([chunk.aux_loss for chunk in chunks[: len(parts)]]).mean()
        if all(hasattr(chunk, "state_values") for chunk in chunks):
            values = torch.cat([chunk.state_values for chunk in chunks])[order]
        return Scores(logprob, entropy, aux_loss, values)

    def _most_of_ranks(self, count: int) -> int:
        accelerator = self.trainer.accelerator
        return int(accelerator.gather(torch.tensor([count], device=accelerator.device)).max())


def _least(batch: Batch, models: Sequence[Any], scored: Tensor, prune: bool) -> TokenTree:
    """The tree of an additional forward: one row with nothing to score, cut to one token. If the batch has images, it
    is a whole row with images, because the forward of the image tower has collectives, too."""
    shown = [] if batch.images is None else [row for row, own in enumerate(batch.images.of_rows) if own]
    one = batch.rows(torch.tensor(shown[:1] or [0], device=batch.input_ids.device))
    nothing = torch.zeros_like(scored[:1])
    if shown:
        return one.pack(models, nothing, prune=False)
    live = torch.zeros_like(one.attention_mask)
    live[:, -1] = 1
    return one._replace(attention_mask=live, images=None).pack(models, nothing, prune)


@contextlib.contextmanager
def groups_stay_together(trainer_class: type, groups_of: int) -> Iterator[None]:
    """Within the block, TRL's shuffling of a generation batch (in the module of that class) moves whole groups: the
    completions of a prompt stay next to each other.

    groups_of: the number of completions of each prompt.
    """

    def shuffle_groups(batch: dict[str, Any]) -> dict[str, Any]:
        prompts = batch["prompt_ids"]
        first = torch.ones(len(prompts), dtype=torch.bool)
        first[1:] = (prompts[1:] != prompts[:-1]).any(1).cpu()
        first[::groups_of] = True
        group = first.cumsum(0) - 1
        order = torch.randperm(int(group[-1]) + 1)[group].argsort(stable=True)

        def permuted(value):
            if value is None or (isinstance(value, Tensor) and value.dim() == 0):
                return value
            return value[order.to(value.device)] if isinstance(value, Tensor) else [value[i] for i in order]

        return {name: permuted(value) for name, value in batch.items()}

    module = importlib.import_module(trainer_class.__module__)
    with replaced(module, "shuffle_sequence_dict", lambda original: shuffle_groups):
        yield
