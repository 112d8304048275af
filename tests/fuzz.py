"""What the fuzz tests draw (architectures, adapters, trees, sampling), and how they judge models.

Every result is compared with transformers' own forward of the same model in float64. The bound is a multiple of the
error of the model's own float32 forward, because the effect of rounding on a model depends on its weights.
"""

import copy
import dataclasses
from typing import Any

import torch
import transformers
from hypothesis import strategies as st
from packing_models import Batch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

VOCAB = 61
# How much more than the model's own forward ours may err. Single draws of few tokens scatter, and a run may make
# thousands of them; the negative controls show that a mistake is far beyond this.
NOISE = 8.0
FLOOR = 2e-6  # of the largest value: rounding of float32 that the model's own forward may lack by luck

Windows = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {}),
    "llama biases": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama linear rope": (
        transformers.LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0}},
    ),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen2 window": (transformers.Qwen2Config, {"use_sliding_window": True, "layer_types": Windows}),
    "qwen3": (transformers.Qwen3Config, {}),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "mistral": (transformers.MistralConfig, {}),
    "gemma2": (
        transformers.Gemma2Config,
        {"layer_types": Windows, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    ),
    "gemma3": (transformers.Gemma3TextConfig, {"layer_types": Windows}),
    "gpt_oss": (transformers.GptOssConfig, {"layer_types": Windows, "num_local_experts": 4}),
    "phi3": (transformers.Phi3Config, {}),
    "olmo2": (transformers.Olmo2Config, {}),
    "cohere": (transformers.CohereConfig, {"logit_scale": 0.25}),
    "granite": (transformers.GraniteConfig, {"logits_scaling": 4.0, "residual_multiplier": 0.6}),
    "stablelm": (transformers.StableLmConfig, {}),
}
OWN_HEAD_DIM = ("phi3", "olmo2", "cohere", "granite", "stablelm", "mistral")  # theirs follows from the other sizes
ADAPTERS = {
    "none": None,
    "lora": lambda: LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    "dora": lambda: LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, use_dora=True),
    "rslora": lambda: LoraConfig(r=3, target_modules=["q_proj", "o_proj"], init_lora_weights=False, use_rslora=True),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[], init_ia3_weights=False),
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    family: str
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    tied: bool
    window: int
    adapter: str
    seed: int

    def model(self) -> torch.nn.Module:
        """In float32 and eval mode, with weights that spread logits over some nats."""
        kind, options = FAMILIES[self.family]
        sizes: dict[str, Any] = dict(
            vocab_size=VOCAB, hidden_size=self.heads * self.head_dim, intermediate_size=40,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim, max_position_embeddings=256, initializer_range=0.25, sliding_window=self.window,
            tie_word_embeddings=self.tied, pad_token_id=0, bos_token_id=1, eos_token_id=1,
        )  # fmt: skip
        if self.family in OWN_HEAD_DIM:
            del sizes["head_dim"]
        if "layer_types" in options:
            options = options | {"layer_types": [Windows[i % 2] for i in range(self.layers)]}
        torch.manual_seed(self.seed)
        model = AutoModelForCausalLM.from_config(kind(**sizes | options), experts_implementation="eager")
        for name, parameter in model.named_parameters():
            if "sinks" in name or name.endswith("bias"):
                torch.nn.init.normal_(parameter)
            elif "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        if (adapter := ADAPTERS[self.adapter]) is not None:
            model = get_peft_model(model, adapter())
        return model.eval()


@st.composite
def architectures(draw) -> Architecture:
    kv_heads = draw(st.integers(1, 3))
    return Architecture(
        family=draw(st.sampled_from(sorted(FAMILIES))),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([4, 8, 16])),
        layers=draw(st.integers(1, 3)),
        tied=draw(st.booleans()),
        window=draw(st.integers(2, 20)),
        adapter=draw(st.sampled_from(sorted(ADAPTERS))),
        seed=draw(st.integers(0, 2**31)),
    )


@st.composite
def rows(draw) -> list[list[int]]:
    """Token ids that begin alike here and there: each row continues a part of an earlier one, or begins anew."""
    token = st.integers(2, VOCAB - 1)
    found: list[list[int]] = []
    for _ in range(draw(st.integers(1, 6))):
        begin: list[int] = []
        if found and draw(st.booleans()):
            earlier = draw(st.sampled_from(found))
            begin = earlier[: draw(st.integers(0, len(earlier)))]
        more = draw(st.lists(token, min_size=0 if begin else 1, max_size=14))
        found.append((begin + more)[:40])
    return found


@st.composite
def batches(draw) -> Batch:
    """Rows padded left or right, any of whose tokens but the first may be scored."""
    found = [row if len(row) > 1 else [*row, 2] for row in draw(rows())]
    scored = [draw(st.integers(1, len(row) - 1)) for row in found]
    torch.manual_seed(draw(st.integers(0, 2**31)))
    return Batch.of(found, scored, draw(st.booleans()))


def wide(model: torch.nn.Module) -> torch.nn.Module:
    """A copy in float64."""
    return copy.deepcopy(model).double()


def error(x: Tensor, exact: Tensor) -> float:
    """In root mean square."""
    return (x.double() - exact.double()).square().mean().sqrt().item()


def assert_within_noise(ours: Tensor, exact: Tensor, plain: Tensor, what: str) -> None:
    """`plain`: the model's own float32 result."""
    if exact.numel() == 0:
        return
    assert ours.isfinite().all(), f"{what} is not finite"
    mine, noise = error(ours, exact), error(plain, exact)
    allowed = NOISE * noise + FLOOR * exact.abs().max().item()
    assert mine <= allowed, f"{what}: error {mine:.1e}, the model's own {noise:.1e}, allowed {allowed:.1e}"
