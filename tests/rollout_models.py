"""Small random models of several families, and the results of their plain forward and of `generate`."""

import functools

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.qwen3 import modeling_qwen3

from flashpo.ops.sample import uniform
from flashpo.rollout import SamplingParams, parity
from flashpo.rollout.runner import stream

VOCAB = 120
# weights large enough for peaked distributions: with almost equal logits every mistake would look small
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "initializer_range": 0.2,
    "max_position_embeddings": 1024,
}
WINDOW = {"head_dim": 16, "sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=16, **SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(sliding_window=20, **SIZES)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            attn_logit_softcapping=2.0, final_logit_softcapping=3.0, query_pre_attn_scalar=16, **WINDOW, **SIZES
        )
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(query_pre_attn_scalar=16, **WINDOW, **SIZES | {"initializer_range": 0.05})
    ),
}


@functools.cache
def model(family: str):
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.randint(0, VOCAB, (n,), generator=generator, device="cpu").tolist() for n in lengths]


@torch.no_grad()
def forward_logprobs(model, prompt: list[int], completion: list[int], temperature: float = 1.0) -> torch.Tensor:
    """What a trainer computes for the completion's tokens."""
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


@torch.no_grad()
def greedy(model, prompt: list[int], max_new_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **settings)
    return out[0, len(prompt) :].tolist()


def with_ligers_layers(net: Qwen3ForCausalLM, monkeypatch) -> Qwen3ForCausalLM:
    """As TRL's use_liger_kernel makes it; Liger replaces names of the family's module, too, which come back."""
    liger = pytest.importorskip("liger_kernel.transformers", reason="Liger is not installed")
    for name in ("Qwen3RMSNorm", "Qwen3MLP", "apply_rotary_pos_emb"):
        monkeypatch.setattr(modeling_qwen3, name, getattr(modeling_qwen3, name))
    liger._apply_liger_kernel_to_instance(net, fused_linear_cross_entropy=False)
    assert "forward" in net.base_model.norm.__dict__
    return net


@torch.no_grad()
def assert_same_draws(model, ours, theirs, params) -> None:
    """Two rollouts of the same random streams: all that may differ is rounding, by the measure of the self-check.

    A row's tokens are compared up to the first that differs. There the random number must lie so near to the border of
    both tokens that rounding decides; what comes after it follows another text.
    """
    assert (ours.prompt_ids, ours.prompt_index) == (theirs.prompt_ids, theirs.prompt_index)
    params = [params] * (1 + max(ours.prompt_index)) if isinstance(params, SamplingParams) else params
    indices: dict[int, int] = {}
    for row, of in enumerate(ours.prompt_index):
        index = indices[of] = indices.get(of, -1) + 1
        prompt, first, second = ours.prompt_ids[row], ours.completion_ids[row], theirs.completion_ids[row]
        same = next((i for i, pair in enumerate(zip(first, second)) if pair[0] != pair[1]), None)
        if same is None:
            assert len(first) == len(second), row
        else:
            _assert_a_tie(model, prompt + first[:same], {first[same], second[same]}, params[of], of, index)
        for rollouts in (ours, theirs):
            ids = rollouts.completion_ids[row][:same]
            if ids:
                logprobs = torch.tensor([rollouts.logprobs[row][:same]], dtype=torch.float64)
                found = parity.judged(model, logprobs, [prompt + ids], temperature=params[of].temperature or 1.0)
                assert found.distance <= found.allowed, (row, found)


def _assert_a_tie(model, text, tokens, params, prompt_index, index) -> None:
    assert not params.truncated, "the border would be that of the filtered distribution"
    low, high = sorted(tokens)
    rounding = 4 * parity.judged(model, torch.zeros(1, 1), [[*text, low]]).allowed
    logits = model(torch.tensor([text])).logits[0, -1].double()
    if params.greedy:
        assert (logits[low] - logits[high]).abs() < rounding
        return
    share = (logits / params.temperature).softmax(-1)
    u = uniform(*(torch.tensor([x]) for x in (stream(params.seed, prompt_index, index), len(text))))
    assert share[low + 1 : high].sum() < rounding, "tokens between the two would have been drawn"
    assert (u - share[: low + 1].sum()).abs() < rounding
