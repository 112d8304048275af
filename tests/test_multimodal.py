"""Multimodal models on text alone: trees and rollouts use their text model, and leave images to transformers."""

import types

import pytest
import torch
import transformers
from packing_models import backward, batch, packed, padded
from test_packing_models import TEMPERATURE, assert_equal, assert_same_gradients

from flashpo._causal_lm import CausalLM
from flashpo._twin import small_config, small_model, small_twin
from flashpo.bench.tiny_models import tiny_config, tiny_multimodal
from flashpo.packing import packable
from flashpo.packing.scoring import accept_trees
from flashpo.rollout import RolloutEngine, SamplingParams

FAMILIES = (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "gemma3", "gemma4", "mistral3", "smolvlm", "idefics3",
    "llava_next", "llava_onevision", "internvl", "glm4v", "paddleocr_vl", "aya_vision", "cohere2_vision",
)  # fmt: skip


def text_trained(model):
    """In fp64; the towers have no gradients from text."""
    model = model.double()
    model.set_experts_implementation("eager")  # which knows fp64
    lm = CausalLM.of(model)
    model.requires_grad_(False)
    for part in (lm.text, lm.head):
        part.requires_grad_(True)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_trees_give_what_padded_rows_give(family):
    assert_trees_are_padded_rows(text_trained(tiny_multimodal(family)))


def test_ministral():
    """Its text model scales queries by their positions."""
    text = tiny_config("ministral3")
    config = small_config(transformers.Mistral3Config(text_config=text), text_config=text)
    assert_trees_are_padded_rows(text_trained(small_model(config, transformers.Mistral3ForConditionalGeneration)))


def assert_trees_are_padded_rows(model) -> None:
    b = batch()
    assert packable(model) == (True, "")
    accept_trees(model)
    expected = padded(model, b, TEMPERATURE)
    d_expected = backward(model, b, expected)
    ours = packed(model, b, TEMPERATURE)
    assert_equal(ours[:2], expected[:2], 1e-7)
    assert_same_gradients(backward(model, b, ours), d_expected)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "idefics3"])
def test_rollouts_of_text(family):
    """The engine compares itself with plain forwards before it answers."""
    engine = RolloutEngine(tiny_multimodal(family), fallback="error")
    rollouts = engine.generate([[5, 6, 7], list(range(40))], SamplingParams(n=2, max_new_tokens=5))
    assert [len(completion) for completion in rollouts.completion_ids] == [5] * 4


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_a_comparison_comes_before_the_first_tree(family):
    model = tiny_multimodal(family)
    assert packable(model, check=True) == (True, "")
    text = CausalLM.of(model).text
    original = type(text).forward

    def forgetful(self, *args, position_ids=None, **keywords):
        return original(self, *args, **keywords)

    text.forward = types.MethodType(forgetful, text)
    assert "of a token tree differ from those of padded rows" in packable(model, check=True).reason


def test_towers_keep_their_attention_and_their_norms():
    model = tiny_multimodal("qwen2_5_vl")
    tower, lm = model.model.visual, CausalLM.of(model)
    before = tower.config._attn_implementation
    accept_trees(model)
    assert tower.config._attn_implementation == before
    assert lm.text.config._attn_implementation == f"tree:{before}"
    assert "forward" in vars(lm.text.norm)
    assert not any("forward" in vars(module) for module in tower.modules())


def test_a_twin_has_towers_and_fewer_layers():
    text = {"num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    config = transformers.Mistral3Config(text_config=text | {"model_type": "mistral", "vocab_size": 300})
    with torch.device("meta"):
        model = transformers.Mistral3ForConditionalGeneration._from_config(config)
    twin = small_model(small_config(model.config), type(model))
    assert CausalLM.of(twin).text.config.num_hidden_layers == twin.config.vision_config.num_hidden_layers == 4
    assert twin.config.vision_config.hidden_size == CausalLM.of(twin).text.config.hidden_size == 32


def test_axes_of_rotation_keep_their_shares():
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    config = small_config(transformers.Qwen2_5_VLTextConfig(hidden_size=2048, rope_parameters=rope))
    assert config.rope_parameters["mrope_section"] == [1, 1, 2]
    assert config.rope_parameters["rope_theta"] == 1e6


def test_a_family_without_a_small_form_has_the_twin_of_its_text(monkeypatch):
    model = tiny_multimodal("internvl")
    monkeypatch.setattr(type(model), "_from_config", None)
    assert type(small_twin(model)) is transformers.Qwen2ForCausalLM
    assert type(small_twin(model.model)) is transformers.InternVLModel


@pytest.mark.parametrize("family", ["qwen3_5", "lfm2_vl"])
def test_hybrids(family):
    model = tiny_multimodal(family)
    assert packable(model, check=True) == (True, "")
    prompts = [[5, 6, 7], list(range(40))]
    rollouts = RolloutEngine(model, fallback="error").generate(prompts, SamplingParams(n=2, max_new_tokens=5))
    assert rollouts.stats.prefill_tokens == 43
