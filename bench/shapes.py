"""Qwen3-like models with random weights, named by their number of parameters. Nothing is downloaded."""

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
}  # fmt: skip
USUAL = {"cpu": "42M", "cuda": "1.7B"}  # for a benchmark that does not name another one


def random_model(shape: str, dtype: torch.dtype, device: str, **options: Any) -> Any:
    """A model for inference. `options` are configuration options besides those of the shape."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.device(device):
        model = Qwen3ForCausalLM(Qwen3Config(**SHAPES[shape], tie_word_embeddings=True, **options))
    return model.to(dtype).eval()
