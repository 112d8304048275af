"""A small random model with the class and the options of a given one, which is cheap to check in fp32.

It shows mistakes that would be hidden by the rounding of a large bf16 model, or by a window of 4096 tokens.
"""

import contextlib
import warnings
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from flashpo._causal_lm import text_model
from flashpo._hosts.transformers import models_stay_whole

LAYERS = 4
VOCABULARY = 97
POSITIONS = 512
LARGEST = 5_000_000  # parameters; a model that stays larger has options for sizes that are not in SIZES

SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY, vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8, laurel_rank=8,
    hidden_size=32, d_model=32, n_embd=32, word_embed_proj_dim=32, embedding_size=32,
    intermediate_size=48, n_inner=48, ffn_dim=48, d_ff=48, decoder_ffn_dim=48, encoder_ffn_dim=48, dff=48,
    moe_intermediate_size=16, shared_expert_intermediate_size=16, shared_experts_intermediate_size=16,
    intermediate_size_mlp=48,
    expert_ffn_hidden_size=16, ffn_hidden_size=48, shared_intermediate_size=16,
    num_attention_heads=4, n_head=4, n_heads=4, num_heads=4, decoder_attention_heads=4, encoder_attention_heads=4,
    head_dim=8, global_head_dim=8, rotary_dim=8,
    q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, qk_head_dim=16,
    num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, num_experts_per_token=2,
    n_group=1, num_expert_group=1, topk_group=1, first_k_dense_replace=1,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
    linear_head_dim=8, linear_num_heads=4, index_head_dim=8, index_n_heads=32, index_topk=8, index_kpool=4,
    mamba_n_heads=8, mamba_d_head=8, mamba_headdim=8, mamba_expand=2, mamba_d_ssm=64, mamba_d_state=8,
    mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, mamba_n_groups=1, mamba_ngroups=1, n_groups=1,
    mamba_chunk_size=16, chunk_size=16,
    num_kv_shared_layers=2, lru_width=32, attention_window_size=9,
    sliding_window=9, attention_chunk_size=9, attn_logit_softcapping=2.0, final_logit_softcapping=4.0,
    # for the towers of multimodal models; most of these options repeat the text model's width
    depth=2, embed_dim=32, out_hidden_size=32, text_hidden_size=32, projection_dim=32, alignment_intermediate_size=32,
    image_token_id=VOCABULARY - 1, image_token_index=VOCABULARY - 1, video_token_id=VOCABULARY - 2,
)  # fmt: skip
POSITION_COUNTS = ("max_position_embeddings", "n_positions", "n_ctx")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads")
SHARED_HEADS = ("num_key_value_heads", "multi_query_kv_heads", "num_kv_heads")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers")


def small_config(config: PreTrainedConfig, positions: int = POSITIONS, **overrides: Any) -> PreTrainedConfig:
    """`config` with all sizes made small and fewer layers, among which each kind of layer is kept.

    positions: how many positions are left, if `config` has more.
    """
    values = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    values |= {name: small_config(part, positions) for name, part in _parts(config).items()}
    for name, size in (SIZES | dict.fromkeys(POSITION_COUNTS, positions)).items():
        value = _value(config, name) if name in values or name in config.attribute_map else None
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            values[name] = min(value, size)
    heads = _value(config, "num_attention_heads")
    if isinstance(heads, int):
        few = max(n for n in (1, 2, 4) if n <= max(heads, 1))  # each of these divides all small widths
        values |= {name: few for name in HEADS if name in values}
        for name in SHARED_HEADS:  # keep the kind of attention: all heads share keys, or some do, or none
            shared = _value(config, name)
            if isinstance(shared, int) and not isinstance(shared, bool):
                values[name] = few if shared == heads else max(min(shared, few // 2), 1)
    count = _value(config, "num_hidden_layers")
    if isinstance(count, int):
        kept = _kept_layers(values.get("layer_types") or [""] * count)
        for name, value in values.items():
            if isinstance(value, list) and len(value) == count:
                values[name] = [value[i] for i in kept]
        values |= {name: len(kept) for name in LAYER_COUNTS if name in values}
        values["num_hidden_layers"] = len(kept)
    _fit_rotation(values)
    values |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=1, initializer_range=0.2, per_layer_config=None)
    if isinstance(values.get("intermediate_size"), list):
        values["intermediate_size"] = [SIZES["intermediate_size"]] * len(values["intermediate_size"])
    values |= overrides
    return type(config)(**{name: value for name, value in values.items() if value is not None})


def small_twin(base: Any, tokens: int = 0) -> PreTrainedModel:
    """A small model like `base`, on its device, with positions for rows of so many tokens if `base` has them.

    For a multimodal model that cannot be made small, it is a small copy of the text model alone.

    Raises:
        ValueError: No small model can be made, or it does not run.
    """
    text = base.config.get_text_config()
    kinds: list[tuple[PreTrainedConfig, type | None]] = [(base.config, type(base))]
    if text is not base.config:
        kinds.append((text, type(text_model(base)) if base.get_output_embeddings() is None else None))
    for config, kind in kinds:
        try:
            twin: Any = small_model(small_config(config, max(POSITIONS, tokens)), kind).to(base.device)
            twin(input_ids=torch.arange(2, device=base.device)[None], use_cache=False)
            return twin
        except Exception as error:  # of any kind: it is the code of the model, given sizes that it may not expect
            reason = f"no small {type(base).__name__}: {error}"
    raise ValueError(reason)


def _parts(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    """The sub-configs of a multimodal model: those of its text model and its towers."""
    found = {name: _value(config, name) for name in config.sub_configs}
    return {name: part for name, part in found.items() if isinstance(part, PreTrainedConfig)}


def _fit_rotation(values: dict[str, Any]) -> None:
    """Scales the sections of M-RoPE to the small head. Each axis keeps its share of a head's rotations."""
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope and isinstance(values.get("num_attention_heads"), int):
        sections = rope["mrope_section"]
        head = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
        count = int(head * rope.get("partial_rotary_factor", 1.0)) // 2
        ends = [round(count * sum(sections[: i + 1]) / sum(sections)) for i in range(len(sections))]
        values["rope_parameters"] = rope | {"mrope_section": [end - begin for begin, end in pairwise([0, *ends])]}


def _value(config: PreTrainedConfig, name: str) -> Any:
    with contextlib.suppress(Exception):  # some configs raise for a value that differs from layer to layer
        return getattr(config, name)


def _kept_layers(kinds: list[str]) -> list[int]:
    """The indices of the first and the last layer of each kind, and of at least LAYERS layers if there are so many."""
    first = {kind: i for i, kind in reversed(list(enumerate(kinds)))}
    last = {kind: i for i, kind in enumerate(kinds)}  # in Gemma 3n these use the keys and values of earlier layers
    kept = {*first.values(), *last.values()}
    for i in range(len(kinds)):
        if len(kept) < LAYERS:
            kept.add(i)
    return sorted(kept)


def small_model(config: PreTrainedConfig, kind: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    """A random model of a small config in eval mode, in fp32 on the CPU. Its logits spread over a few nats.

    Args:
        kind: The class of the model. By default AutoModelForCausalLM chooses it.

    Raises:
        ValueError: The model is not small, or cannot be made here.
    """
    make = AutoModelForCausalLM.from_config if kind is None else kind._from_config
    with (
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        models_stay_whole(),
    ):
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            count = sum(p.numel() for p in make(config, dtype=torch.float32).parameters())
        if count > LARGEST:
            raise ValueError(f"{count / 1e6:.0f}M parameters: not small")
        torch.manual_seed(0)
        model = make(config, dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                nn.init.normal_(parameter)
    return model
