"""TRL's fused LM head on token trees, for SFT, DPO and KTO: each distinct token of a batch runs once, padding never.

These trainers run policy and reference by

    model(input_ids, attention_mask, labels, fused_lm_head=True) -> FusedCausalLMOutput

whatever is wrapped around the model. We replace the forward of the innermost model, which answers such calls with the
same output, so that losses, metrics and normalisation remain TRL's.
"""

import contextlib
import functools
import importlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flashpo._causal_lm import CausalLM
from flashpo._hosts.trl import TREES, fused_output, version, why_not
from flashpo.packing import TokenTree, forward_here, pack, packable
from flashpo.packing.rows import not_told
from flashpo.packing.scoring import accept_trees
from flashpo.trl._replaced import replaced
from flashpo.trl._text_only import COUNTS, IMAGES, TYPES, beside_text
from flashpo.trl.images import TrainerImages, pack_rows
from flashpo.trl.patch import DEVICES, FIELDS, active
from flashpo.trl.sharing import Sharing, why_not_packed

ROWS = {"input_ids", "labels", "attention_mask"}
FLATTENED = {"input_ids", "labels", "position_ids"}  # of a padding-free batch, which has its rows in a single row
# where the rows of a padding-free batch begin; its positions say the same
BOUNDARIES = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
OF_IMAGES = {*IMAGES, *COUNTS, *TYPES}
OPTIONS = {"use_cache", "output_router_logits"}


class TreeHeads:
    """The models of a trainer to which TRL gives a fused head. Those that pass the self-check run on token trees."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.untried: list[PreTrainedModel] = []
        self.packed: set[PreTrainedModel] = set()
        self.images = TrainerImages()

    @functools.cached_property
    def sharing(self) -> Sharing:
        return Sharing(self.trainer.args)  # TRL sets `args` before it adds a head

    def add(self, model: PreTrainedModel, temperature: float, fp32_head: bool, outputs: tuple[str, ...]) -> None:
        """Prepare a model to which TRL has just given a fused head. At this time all changes to the model are done, and
        it has not been wrapped or run yet."""
        self.untried.append(model)
        if packable(self._whole(model)).ok:
            takes, whole = (lambda: model in self.packed), (lambda: self._whole(model))
            options = temperature, fp32_head, outputs
            take_trees(model, self.sharing, *options, takes, whole, self.images, self._ran)
        _time(model, self.trainer)

    def _ran(self, tokens: int, of: int, on_tree: bool) -> None:
        self.trainer._phases.ran(tokens, of, on_tree)

    def try_out(self) -> None:
        """Run the self-check of token trees on the models. All ranks do this together, outside of a forward, before the
        models first train."""
        untried, self.untried = self.untried, []
        for model in untried if self.sharing.mode is not False else []:
            with self.trainer.accelerator.autocast():
                reason = self.sharing.against or why_not_packed(self._whole(model))
            if self.sharing.allowed(reason):
                accept_trees(model.base_model, head=False)
                self.sharing.compile(model.base_model, self.trainer._phases)
                self.packed.add(model)

    def _whole(self, model: PreTrainedModel) -> Any:
        """The trainer's model that contains `model`: with adapters and sharding."""
        wholes = [m for m in (self.trainer.model, getattr(self.trainer, "ref_model", None)) if m is not None]
        return next((m for m in wholes if any(x is model for x in m.modules())), model)


@contextlib.contextmanager
def heads_take_trees(trainer: Any, trl_class: type) -> Iterator[TreeHeads]:
    """Within the block, each model to which TRL (in the module of that class) gives a fused head is added to the
    TreeHeads that this yields."""
    heads = TreeHeads(trainer)
    if why_not(trl_class, TREES):
        yield heads
        return

    def adding(add_fused_lm_head: Callable) -> Callable:
        def add(model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=("log_probs",), **others):
            add_fused_lm_head(model, temperature, cast_lm_head_to_fp32, outputs, **others)
            if unknown := [*others, *(set(outputs) - FIELDS.keys())]:
                heads.sharing.allowed(f"TRL {version()} asks its fused head for {', '.join(unknown)}")
            else:
                heads.add(model, temperature, cast_lm_head_to_fp32, outputs)

        return add

    with replaced(importlib.import_module(trl_class.__module__), "add_fused_lm_head", adding):
        yield heads


def take_trees(
    model: PreTrainedModel,
    sharing: Sharing,
    temperature: float,
    fp32_head: bool,
    outputs: tuple[str, ...],
    takes: Callable[[], bool] = lambda: True,
    whole: Callable[[], Any] | None = None,
    images: TrainerImages | None = None,
    ran: Callable[[int, int, bool], None] = not_told,
) -> None:
    """Let a model that has a fused head run on token trees.

    Args:
        sharing: the setting `share_prefix` of its trainer.
        temperature, fp32_head, outputs: as they were passed to the fused head.
        takes: asked in each call whether trees may be used.
        whole: returns the model with its adapters; None: it is `model`.
        images: what knows the images of the batches.
        ran: as for `flashpo.packing.rows.take_rows`.
    """
    output = fused_output()
    padded: Any = model.forward.__func__  # type: ignore[attr-defined]  # bound by add_fused_lm_head
    wanted = tuple(FIELDS[name] for name in outputs)
    config: Any = model.config.get_text_config()
    shown = images or TrainerImages()

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(self, *args, fused_lm_head=False, **batch):
        if not fused_lm_head:
            return padded(self, *args, **batch)
        # the load-balancing loss of routers can be asked for by the call or by the configuration
        routers = batch.get("output_router_logits", getattr(config, "output_router_logits", False))
        tree = None
        if active() and takes():
            tree = _tree_of(whole or (lambda: self), sharing, shown, args, batch, not routers, ran)
        if tree is None:
            return padded(self, *args, fused_lm_head=True, **batch)
        options = {"temperature": temperature, "outputs": wanted, "fp32_head": fp32_head, "aux_loss": routers}
        stats, aux_loss = forward_here(self, tree, **options)
        label_mask = (batch["labels"][:, 1:] != -100).to(stats.logprob.device)
        per_token = {name: x[:, 1:] for name, x in zip(FIELDS, stats) if x is not None}
        loss = -per_token["log_probs"].sum() / label_mask.sum().clamp(min=1)
        if aux_loss is not None:
            loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss
        return output(loss=loss, label_mask=label_mask, aux_loss=aux_loss, **per_token)

    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]


@torch.compiler.disable  # it reads the batch on the host
def _tree_of(
    whole: Callable[[], Any],
    sharing: Sharing,
    images: TrainerImages,
    args: tuple,
    batch: dict[str, Any],
    prune: bool,
    ran: Callable,
) -> TokenTree | None:
    """The token tree of a batch; None if its rows have to run padded. `whole`: returns the model with its adapters."""
    model = whole()
    given = beside_text(model, batch)  # this also drops inputs that are None, which PEFT adds
    given |= {f"argument {i}": x for i, x in enumerate(args)}
    for option in OPTIONS & given.keys():
        del given[option]
    tree = None
    try:
        tree = _pack(model, images, given, prune)
        if not sharing.pays(CausalLM.of(model).backbone, tree):
            tree = None
    except (TypeError, ValueError) as error:
        sharing.refuse(str(error))
    if not sharing.agreed(tree is not None, [model], tree is not None and tree.images is not None):
        tree = None
    padded = batch["labels"].numel()
    ran(padded if tree is None else len(tree.tokens), padded, tree is not None)
    return tree


def _time(model: PreTrainedModel, trainer: Any) -> None:
    """Let the trainer's `_phases` distinguish forwards of the policy from those of the reference."""
    inner: Any = model.forward.__func__  # type: ignore[attr-defined]

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(self, *args, fused_lm_head=False, **batch):
        if not fused_lm_head:
            return inner(self, *args, **batch)
        before = _begins(trainer)
        out = inner(self, *args, fused_lm_head=True, **batch)
        _ends(trainer, before)
        return out

    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]


@torch.compiler.disable  # a compiled graph has no clock
def _begins(trainer: Any) -> str | None:
    return trainer._phases.reference_begins()


@torch.compiler.disable
def _ends(trainer: Any, before: str | None) -> None:
    trainer._phases.reference_ends(before)


def _pack(model: Any, images: TrainerImages, batch: dict[str, Any], prune: bool) -> TokenTree:
    flattened = "position_ids" in batch and "attention_mask" not in batch
    needed, redundant = (FLATTENED, BOUNDARIES) if flattened else (ROWS, set())
    others = {name: x for name, x in batch.items() if name not in needed | redundant}
    for name in sorted(others if flattened else others.keys() - OF_IMAGES):
        raise ValueError(f"the batch has {name}")
    for name in sorted(needed - batch.keys()):
        raise ValueError(f"the batch has no {name}")
    if (device := batch["input_ids"].device.type) not in DEVICES:
        raise ValueError(f"the batch is on {device}")
    scored = batch["labels"] != -100
    scored[:, 0] = False  # no token predicts the first one, and the loss does not read it
    if flattened:
        return _pack_flattened(batch["input_ids"], scored, batch["position_ids"], prune)
    rows = batch["input_ids"], batch["attention_mask"]
    return pack_rows([model], *rows, scored, prune, images.of([model], others, *rows))


def _pack_flattened(input_ids: Tensor, scored: Tensor, position_ids: Tensor, prune: bool) -> TokenTree:
    """`pack` for rows that follow each other in a single row: all inputs are (1, T), and so are results."""
    if len(input_ids) != 1 or not input_ids.shape == scored.shape == position_ids.shape:
        shapes = tuple(tuple(x.shape) for x in (input_ids, scored, position_ids))
        raise ValueError(f"input_ids, labels and position_ids must be one row, got {shapes}")
    position = position_ids[0].cpu()
    begins = position == 0
    if not begins[0] or not (begins[1:] | (position.diff() == 1)).all():
        raise ValueError("position_ids must count each row's tokens from 0")
    place = begins.cumsum(0) - 1, position

    def rows(x: Tensor) -> Tensor:
        grid = x.new_zeros(int(place[0][-1]) + 1, int(position.max()) + 1)
        return grid.index_put_(place, x)

    tree = pack(rows(input_ids[0]), rows(torch.ones_like(scored[0])), rows(scored[0]), prune=prune)
    return tree._replace(flat=tree.flat[place][None], pair=tree.pair[place][None])
