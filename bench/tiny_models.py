"""Small random models of every causal language model family in transformers, and of every multimodal family that writes
text; for sweeps and tests."""

from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from flashpo._twin import small_config, small_model

FAMILIES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
MULTIMODAL = tuple(sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES))
MLA = dict(num_key_value_heads=4, num_experts_per_tok=2)
HEADS = dict(head_dim=8, num_key_value_heads=2)
HYBRID = ["linear_attention", "full_attention"] * 2
CONV = dict(layer_types=["conv", "full_attention"] * 2)
# Published with three axes, which the defaults of their configs omit.
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
MROPE = dict(rope_parameters=ROPE)
OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), MLA),
    **dict.fromkeys(("glm_moe_dsa", "longcat_flash", "youtu"), MLA),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral", "nemotron"), HEADS),
    "bamba": dict(attn_layer_indices=[1]),
    "granitemoehybrid": dict(layer_types=HYBRID),
    "dots1": HEADS | dict(num_experts_per_tok=2, n_routed_experts=4, n_shared_experts=1),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]], window_size=9),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "lfm2": CONV,
    "phimoe": dict(sliding_window=9),
    "lfm2_moe": CONV | dict(num_dense_layers=1),
    "mamba2": dict(num_heads=4, head_dim=16, n_groups=1),
    "reformer": dict(is_decoder=True),
    "zaya": dict(num_experts_per_tok=1),
    "zamba2": dict(layers_block_type=["mamba", "hybrid"] * 2),
    **dict.fromkeys(("glm4v_text", "glm_ocr_text", "paddleocr_vl_text", "qwen2_5_omni_text"), MROPE),
    **dict.fromkeys(("qwen2_5_vl_text", "qwen2_vl_text"), MROPE),
    "glm4v_moe_text": dict(rope_parameters=ROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}),
}


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """The family's text config with all sizes made small."""
    return small_config(CONFIG_MAPPING[family]().get_text_config(), **OVERRIDES.get(family, {}) | overrides)


def tiny_model(family: str, **overrides: Any) -> PreTrainedModel:
    return small_model(tiny_config(family, **overrides))


def tiny_multimodal(family: str, **overrides: Any) -> PreTrainedModel:
    """The family's whole model: a small text model with small towers. The overrides are for the text model."""
    config = CONFIG_MAPPING[family]()
    text = config.get_text_config()
    small = small_config(text, **OVERRIDES.get(text.model_type, {}) | overrides)
    if text is not config:
        name = next(name for name in config.sub_configs if getattr(config, name) is text)
        small = small_config(config, **{name: small})
    return small_model(small, getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[family]))
