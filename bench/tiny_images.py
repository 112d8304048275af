"""Small multimodal models whose images are only a few tokens, and inputs like those from their processors: random
pixels.

How a family takes its images is found by trying the layouts below, which are those of transformers' processors.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from flashpo._causal_lm import CausalLM
from flashpo._twin import VOCABULARY, small_config, small_model
from flashpo.bench.tiny_models import OVERRIDES
from flashpo.packing.images import flattened

TOKEN = VOCABULARY - 1
SIZE, PATCH = 28, 7  # pixels
SHAPE = 3, SIZE, SIZE
PINPOINTS = [[SIZE, 2 * SIZE], [2 * SIZE, SIZE], [2 * SIZE, 2 * SIZE]]
Rows = list[list[int]]  # for each row, the seeds of its images


def image_model(family: str) -> PreTrainedModel:
    """The model in fp32 and eval mode. Its images are small if its configuration fixes their size."""
    config = CONFIG_MAPPING[family]()
    text, tower = config.get_text_config(), config.vision_config
    name = next(name for name in config.sub_configs if getattr(config, name) is text)
    for option, small in (("image_size", SIZE), ("patch_size", PATCH)):
        value = getattr(tower, option, None)
        if value and not hasattr(tower, "spatial_merge_size"):
            setattr(tower, option, [small, small] if isinstance(value, list | tuple) else small)
    if hasattr(config, "image_grid_pinpoints"):
        config.image_grid_pinpoints = PINPOINTS
    parts = {name: small_config(text, **OVERRIDES.get(text.model_type, {}))}
    if hasattr(tower, "deepstack_visual_indexes"):
        parts["vision_config"] = small_config(tower, deepstack_visual_indexes=[0, 1])
    kind = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[family])
    return small_model(small_config(config, image_token_id=TOKEN, **parts), kind)


def pictures(model: Any, rows: Rows) -> tuple[dict[str, Tensor], int]:
    """The input fields for the images of each row, and the number of tokens of each image.

    Raises:
        ValueError: the model does not take its images in any of the known ways.
    """
    layout, tokens = layout_of(model)
    return layout(model, rows), tokens


def layout_of(model: Any) -> tuple[Callable[[Any, Rows], dict[str, Tensor]], int]:
    """How the model takes its images, and the number of tokens of each."""
    backbone: Any = CausalLM.of(model).backbone
    reasons = []
    for layout in LAYOUTS:
        try:
            fields = {
                name: x.to(model.dtype) if x.is_floating_point() else x for name, x in layout(model, [[0]]).items()
            }
            with torch.no_grad():
                tokens = len(flattened(backbone.get_image_features(**fields, return_dict=True).pooler_output))
                ids = torch.tensor([[5, *[TOKEN] * tokens, 6]])
                model(input_ids=ids, use_cache=False, **fields, **type_ids(model, ids))
            return layout, tokens
        except Exception as error:  # of any kind, because it is the model's own code
            reasons.append(f"{layout.__name__}: {error}")
    raise ValueError(f"how {type(model).__name__} takes images is not known here: {'; '.join(reasons)}")


def type_ids(model: Any, input_ids: Tensor) -> dict[str, Tensor]:
    asked = hasattr(CausalLM.of(model).backbone, "get_rope_index")
    return {"mm_token_type_ids": (input_ids == TOKEN).int()} if asked else {}


def grids(model: Any, rows: Rows) -> dict[str, Tensor]:
    """Patches, and for each image their numbers in time, height and width."""
    merge = model.config.vision_config.spatial_merge_size
    weight = next(p for name, p in model.named_parameters() if "patch_embed" in name)
    pixels = torch.cat([*_drawn(rows, 4 * merge**2, weight[0].numel())])
    grid = torch.tensor([[1, 2 * merge, 2 * merge]] * len(pixels[:: 4 * merge**2]))
    return {"pixel_values": pixels, "image_grid_thw": grid}


def grids_of_squares(model: Any, rows: Rows) -> dict[str, Tensor]:
    fields = grids(model, rows)
    side = model.config.vision_config.patch_size
    return fields | {"pixel_values": fields["pixel_values"].unflatten(1, (3, side, side))}


def padded_rows(model: Any, rows: Rows) -> dict[str, Tensor]:
    """The same number of images for each row; missing ones are zeros."""
    own = _drawn(rows, *SHAPE)
    pixels = torch.zeros(len(rows), max(map(len, rows)), *SHAPE)
    for i, row in enumerate(rows):
        for j in range(len(row)):
            pixels[i, j] = next(own)
    return {"pixel_values": pixels, "pixel_attention_mask": torch.ones_like(pixels[:, :, 0]).long()}


def padded_patches(model: Any, rows: Rows) -> dict[str, Tensor]:
    """Padded tiles of patches, with their heights and widths."""
    factor, patch = model.config.downsample_factor, model.config.vision_config.patch_size
    pixels = torch.stack([*_drawn(rows, 4 * factor**2, 3 * patch**2)])
    mask = (torch.arange(4 * factor**2) < 2 * factor**2).long().expand(len(pixels), -1)
    shapes = torch.tensor([[factor, 2 * factor]] * len(pixels))
    return {"pixel_values": pixels * mask[:, :, None], "pixel_attention_mask": mask, "spatial_shapes": shapes}


def tiles_and_sizes(model: Any, rows: Rows) -> dict[str, Tensor]:
    """The whole image and two tiles of it."""
    pixels = torch.stack([*_drawn(rows, 3, *SHAPE)])
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[SIZE, 2 * SIZE]] * len(pixels))}


def sizes(model: Any, rows: Rows) -> dict[str, Tensor]:
    return squares(model, rows) | {"image_sizes": torch.tensor([[SIZE, SIZE]] * sum(map(len, rows)))}


def squares(model: Any, rows: Rows) -> dict[str, Tensor]:
    return {"pixel_values": torch.stack([*_drawn(rows, *SHAPE)])}


LAYOUTS = (grids, grids_of_squares, padded_patches, padded_rows, tiles_and_sizes, squares, sizes)


def _drawn(rows: Rows, *shape: int) -> Iterator[Tensor]:
    """Random numbers in fp32, as processors return them."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for row in rows for seed in row)
