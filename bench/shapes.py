"""Models with random weights, named by their number of parameters: Qwen3's classes, and Qwen3.5's where the name says
"hybrid". Nothing is downloaded.
"""

from typing import Any

import torch

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        head_dim=64, vocab_size=4096,
    ),
    "42M": dict(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        head_dim=64, vocab_size=32768,
    ),
    "120M": dict(
        hidden_size=768, intermediate_size=2560, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=6,
        head_dim=64, vocab_size=32768,
    ),
    "0.6B": dict(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, vocab_size=151936,
    ),
    "1.7B": dict(
        hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, vocab_size=151936,
    ),
    "4B": dict(
        hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=151936,
    ),
    "35M hybrid": dict(
        model_type="qwen3_5_text", hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, vocab_size=16384, linear_num_key_heads=4, linear_num_value_heads=8,
        linear_key_head_dim=64, linear_value_head_dim=64,
        layer_types=[*["linear_attention"] * 3, "full_attention"] * 2,
    ),
}  # fmt: skip
USUAL = {"cpu": "42M", "cuda": "1.7B"}  # for a benchmark that does not name another one


def causal_lm(shape: dict[str, Any], device: str, **options: Any) -> Any:
    """A model of one of `SHAPES`. `options` are configuration options besides those of the shape."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{"model_type": "qwen3"} | shape | {"tie_word_embeddings": True} | options)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config)


def random_model(shape: str, dtype: torch.dtype, device: str, **options: Any) -> Any:
    """A model for inference."""
    return causal_lm(SHAPES[shape], device, **options).to(dtype).eval()
