"""The images of a trainer's batches, for models that can read them on token trees."""

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from flashpo._causal_lm import CausalLM
from flashpo._hosts import sharding
from flashpo.packing import TokenTree, pack
from flashpo.packing.images import COUNTS, FIELDS, SCORED, TYPES, ImageRows, Images, image_token, shared
from flashpo.packing.parity import image_parity
from flashpo.packing.support import why_no_images
from flashpo.trl._text_only import beside_text

KNOWN = {*FIELDS, *COUNTS, TYPES}
SCORING_INPUTS = (  # what batches of TRL may have beside their tokens
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


def counted(fields: Mapping[str, Any], images: Sequence[Sequence[Any] | None]) -> dict[str, list[int]]:
    """`num_images` for `Images.of`, if the fields have an entry for each image. Otherwise entries are tiles or rows, of
    which the placeholders tell how many there are.

    images: those of each row.
    """
    counts = [len(own or ()) for own in images]
    entries = fields.get("image_grid_thw", fields.get("pixel_values"))
    return {"num_images": counts} if entries is not None and len(entries) == sum(counts) else {}


class TrainerImages:
    """Finds the images of batches. Each model is first compared on a few rows of its first batch that has images."""

    def __init__(self) -> None:
        self._answers: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()

    def of(
        self, models: Sequence[Any], batch: Mapping[str, Any], input_ids: Tensor, attention_mask: Tensor
    ) -> Images | None:
        """The images of these rows; None if they have none.

        Args:
            models: the models that will run the rows.
            batch: what TRL passes to the models in addition to token ids and mask.

        Raises:
            ValueError: these rows have to be scored as padded rows; the message is the reason.
        """
        beside = {name: x for model in models for name, x in beside_text(model, batch).items()}
        if not beside:
            return None
        if "pixel_values" in beside:
            for model in models:
                if reason := sharding.why_no_tower(model):
                    raise ValueError(f"the batch has images: {reason}")
                if reason := why_no_images(CausalLM.of(model).backbone):
                    raise ValueError(f"the batch has images: {reason}")
            if len({image_token(model) for model in models}) > 1:
                raise ValueError("the batch has images, which have another token in each of the models")
        if unknown := [name for name in beside if name not in KNOWN or "pixel_values" not in beside]:
            raise ValueError(f"the batch has {', '.join(unknown)}")
        images = Images.of(models[0], input_ids, attention_mask, beside)
        for model in models:
            if model not in self._answers:
                rows = ImageRows.of(images, input_ids, attention_mask)
                if rows is None:  # there are images, but no token that stands for one
                    continue
                self._answers[model] = image_parity(model, rows)
            if reason := self._answers[model]:
                raise ValueError(f"the batch has images: {reason}")
        shared[SCORED] += 1
        return images


def pack_rows(
    models: Sequence[Any],
    input_ids: Tensor,
    attention_mask: Tensor,
    scored: Tensor,
    prune: bool,
    images: Images | None,
) -> TokenTree:
    """`pack` for a batch that `models` will run.

    If no row with an image is scored, the tree has an image all the same: in training, so that the parameters of the
    tower get a gradient of 0, as from padded rows; and if forwards have collectives, because other ranks run the tower.
    """
    tree = pack(input_ids, attention_mask, scored, prune=prune, images=images)
    if images is None or tree.images is not None:
        return tree
    if torch.is_grad_enabled() or any(map(sharding.meets, models)):
        return _pack_with_an_image(input_ids, attention_mask, scored, images)
    return tree


def _pack_with_an_image(input_ids: Tensor, attention_mask: Tensor, scored: Tensor, images: Images) -> TokenTree:
    """A tree with a row up to its first image. One token behind it is scored, but no place of the batch gets the
    result."""
    shown = images.code.to(input_ids.device) >= 0
    behind = (shown.cumsum(1) - shown.long() > 0) & ~shown & attention_mask.bool()
    places = behind[:, -scored.shape[1] :].nonzero()
    if len(places) == 0:
        return pack(input_ids, attention_mask, scored, prune=False, images=images)
    more = scored.clone()
    more[tuple(places[0])] = 1
    tree = pack(input_ids, attention_mask, more, images=images)
    return tree._replace(pair=tree.pair.masked_fill((more != scored).to(tree.pair.device), len(tree.source)))
