"""TRL's trainers on data sets with images: each image and each prefix over it once, losses and gradients as TRL's."""

import warnings

import pytest
from image_processors import images_data, picture, qwen_processor
from trl_models import assert_same_training

import flashpo
import flashpo.trl


@pytest.fixture(autouse=True)
def no_fallback():
    """No warning of FlashPO, but in a block of `pytest.warns`."""
    flashpo.stats(reset=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="FlashPO")
        yield


@pytest.mark.parametrize("model", ["qwen3_vl", "qwen3_5"])
def test_grpo(model):
    data = images_data("GRPO", [[picture(10)], [picture(80)]])
    assert_same_training("GRPO", model=model, train_dataset=data, processing_class=qwen_processor())


@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO"])
def test_offline_trainers(name):
    """Rows with one image, with two, with the same one as another row, and without."""
    images = [[picture(10)], [picture(10), picture(60)], [], [picture(90, width=32)]]
    assert_same_training(
        name,
        model="qwen3_vl",
        train_dataset=images_data(name, images),
        processing_class=qwen_processor(),
        max_length=None,
    )
