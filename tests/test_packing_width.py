"""Rotary frequencies that depend on the width of a forward: a token tree uses those of the padded batch."""

import pytest
import torch
import transformers
from packing_models import Batch, backward, packed, statistics
from test_packing_models import TEMPERATURE, assert_equal, assert_same_gradients
from trl_models import CONFIGS, LIMIT, SMALL, assert_same_training

ROUNDING = 1e-5  # rotary angles are rounded to fp32, and the same token stands elsewhere in the tree
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


def model_with(rope: str):
    if rope == "longrope":
        config = CONFIGS["longrope"]()
    else:
        config = transformers.LlamaConfig(**SMALL | {"max_position_embeddings": LIMIT}, rope_parameters=DYNAMIC)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64)


def rows(longest: int, left: bool, scored: int, padding: int = 3) -> Batch:
    """Rows of different lengths that begin alike; `scored` of the longest one's last tokens count."""
    torch.manual_seed(1)
    long = torch.randint(2, SMALL["vocab_size"], (longest,)).tolist()
    short = torch.randint(2, SMALL["vocab_size"], (2,)).tolist()
    return Batch.of([long, long[: longest // 2] + short, short], [scored, 2, 1], left, padding)


def unpositioned(model, b: Batch):
    """As stock trainers run it: without positions, so that padding on the left counts."""
    out = model(input_ids=b.input_ids, attention_mask=b.attention_mask, use_cache=False)
    return statistics(out.logits, b, TEMPERATURE)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("width", [LIMIT - 1, LIMIT, LIMIT + 1, LIMIT + 9])
@pytest.mark.parametrize("rope", ["longrope", "dynamic"])
def test_frequencies_are_those_of_the_padded_batch(rope, width, left):
    """With a pruned tree, too, in which the longest row lacks a token or most of them."""
    model = model_with(rope)
    for scored in (width - 4, 1):
        b = rows(width - 3, left, scored)
        assert b.input_ids.shape[1] == width
        expected, ours = unpositioned(model, b), packed(model, b, TEMPERATURE)
        assert_equal(ours[:2], expected, ROUNDING)
        gradients = [backward(model, b, (*results[:2], None)) for results in (ours, expected)]
        assert_same_gradients(*gradients, ROUNDING)


@pytest.mark.parametrize("rope", ["longrope", "dynamic"])
def test_padding_alone_can_pass_the_limit(rope):
    """Which shows that the frequencies matter here."""
    model = model_with(rope)
    narrow, wide = (rows(LIMIT - 4, True, 3, padding) for padding in (0, 9))
    before, after = unpositioned(model, narrow)[0], unpositioned(model, wide)[0]
    assert (after[:, 9:] - before).abs().max() > 0.01
    assert_equal(packed(model, wide, TEMPERATURE)[:1], [after], ROUNDING)
    assert_equal(packed(model, narrow, TEMPERATURE)[:1], [before], ROUNDING)


@pytest.mark.parametrize("name", ["SFT", "GRPO"])
def test_training(name):
    """The widths of its batches are on both sides of the limit."""
    assert_same_training(name, model="longrope", max_steps=3)
