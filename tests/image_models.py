"""Tiny multimodal models, and images as their processors would give them: random pixels of a few tokens each."""

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from flashpo._causal_lm import CausalLM
from flashpo.bench.tiny_models import OVERRIDES
from flashpo.packing.images import Images
from flashpo.rollout.twin import VOCABULARY, small_config, small_model

GRIDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "paddleocr_vl")
FAMILIES = (*GRIDS, "smolvlm", "idefics3", "llava_next", "llava_onevision", "mistral3", "internvl", "lfm2_vl", "llava")
TOKEN = VOCABULARY - 1
SIZE = 28  # pixels


def image_model(family: str, **vision):
    """In fp64, eval mode. Its images are small where the family's configuration fixes their size."""
    config = CONFIG_MAPPING[family]()
    text = config.get_text_config()
    name = next(name for name in config.sub_configs if getattr(config, name) is text)
    tower = config.vision_config
    for option in ("image_size", "patch_size"):
        if family not in GRIDS and hasattr(tower, option):
            value = getattr(tower, option)
            small = SIZE if option == "image_size" else SIZE // 4
            setattr(tower, option, [small, small] if isinstance(value, list | tuple) else small)
    for option, value in vision.items():
        setattr(tower, option, value)
    for option in ("image_grid_pinpoints",):
        if hasattr(config, option):
            setattr(config, option, [[SIZE, 2 * SIZE], [2 * SIZE, SIZE], [2 * SIZE, 2 * SIZE]])
    overrides = {name: small_config(text, **OVERRIDES.get(text.model_type, {}))}
    if family == "qwen3_vl":
        overrides["vision_config"] = small_config(tower, deepstack_visual_indexes=[0, 1])
    kind = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[family])
    small = small_config(config, image_token_id=TOKEN, **overrides)
    return small_model(small, kind).double()


def pictures(model, rows: list[list[int]]) -> tuple[dict[str, Tensor], int]:
    """Fields of the images of each row, which are named by their seeds; and how many tokens each image has."""
    family, config = model.config.model_type, model.config
    vision, seeds = config.vision_config, [seed for row in rows for seed in row]

    def draw(*shape: int) -> Tensor:
        """In fp32, as processors give them."""
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])

    if family in GRIDS:
        merge = vision.spatial_merge_size
        weight = next(p for name, p in model.named_parameters() if "patch_embed" in name)
        pixels = draw(4 * merge**2, weight[0].numel()).flatten(0, 1)
        grid = torch.tensor([[1, 2 * merge, 2 * merge]] * len(seeds))
        if family == "paddleocr_vl":
            pixels = pixels.unflatten(1, weight.shape[1:])
        return {"pixel_values": pixels, "image_grid_thw": grid}, 4
    if family in ("smolvlm", "idefics3"):  # rows are padded with images of zeros
        own = iter(draw(3, SIZE, SIZE))
        pixels = torch.zeros(len(rows), max(map(len, rows)), 3, SIZE, SIZE)
        for i, row in enumerate(rows):
            for j in range(len(row)):
                pixels[i, j] = next(own)
        return {"pixel_values": pixels, "pixel_attention_mask": torch.ones_like(pixels[:, :, 0]).long()}, 4
    if family == "lfm2_vl":  # tiles of patches, padded
        factor, patch = config.downsample_factor, vision.patch_size
        shapes = torch.tensor([[factor, 2 * factor]] * len(seeds))
        mask = (torch.arange(4 * factor**2) < 2 * factor**2).long().expand(len(seeds), -1)
        pixels = draw(4 * factor**2, 3 * patch**2) * mask[:, :, None]
        return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}, 2
    if family in ("llava_next", "llava_onevision"):  # the whole and two tiles
        sizes = torch.tensor([[SIZE, 2 * SIZE]] * len(seeds))
        side = vision.image_size // vision.patch_size
        return {"pixel_values": draw(3, 3, SIZE, SIZE), "image_sizes": sizes}, side**2 + side * (2 * side + 1)
    if family == "mistral3":
        sizes = torch.tensor([[SIZE, SIZE]] * len(seeds))
        return {"pixel_values": draw(3, SIZE, SIZE), "image_sizes": sizes}, 4
    side = SIZE // (SIZE // 4)
    return {"pixel_values": draw(3, SIZE, SIZE)}, 4 if family == "internvl" else side**2


def type_ids(model, input_ids: Tensor) -> dict[str, Tensor]:
    asked = hasattr(CausalLM.of(model).backbone, "get_rope_index")
    return {"mm_token_type_ids": (input_ids == TOKEN).int()} if asked else {}


def images_of(model, input_ids, attention_mask, fields) -> Images:
    return Images.of(model, input_ids, attention_mask, fields | type_ids(model, input_ids))
