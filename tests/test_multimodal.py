"""Multimodal classes with text alone: trees and rollouts ask their text model, and leave images to transformers."""

import pytest
from packing_models import backward, batch, packed, padded
from test_packing_models import TEMPERATURE, assert_equal, assert_same_gradients

from flashpo._causal_lm import CausalLM
from flashpo.bench.tiny_models import tiny_multimodal
from flashpo.packing import packable
from flashpo.packing.scoring import accept_trees

FAMILIES = (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "gemma3", "gemma4", "mistral3", "smolvlm", "idefics3",
    "llava_next", "llava_onevision", "internvl", "glm4v", "paddleocr_vl",
)  # fmt: skip


def text_trained(family: str):
    """In fp64; the towers have no gradients from text."""
    model = tiny_multimodal(family).double()
    model.set_experts_implementation("eager")  # which knows fp64
    lm = CausalLM.of(model)
    model.requires_grad_(False)
    for part in (lm.text, lm.head):
        part.requires_grad_(True)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_trees_give_what_padded_rows_give(family):
    model, b = text_trained(family), batch()
    assert packable(model) == (True, "")
    accept_trees(model)
    expected = padded(model, b, TEMPERATURE)
    d_expected = backward(model, b, expected)
    ours = packed(model, b, TEMPERATURE)
    assert_equal(ours[:2], expected[:2], 1e-7)
    assert_same_gradients(backward(model, b, ours), d_expected)
