"""Published models with dropout in attention train on token trees with their own attention."""

import functools
import tempfile
import warnings

import pytest
import torch

pytest.importorskip("trl")
from transformers import AutoModelForCausalLM
from trl_models import CONFIGS, assert_same_training, make_trainer

import flashpo.trl


@functools.cache
def hardly_any_dropout() -> str:
    """A folder with a model that goes the way of dropout, but hardly ever drops anything."""
    config = CONFIGS["gpt2"]()
    config.update({"attn_pdrop": 1e-9, "resid_pdrop": 0.0, "embd_pdrop": 0.0})
    torch.manual_seed(0)
    folder = tempfile.mkdtemp(prefix="flashpo-dropout-")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["SFT", "DPO", "GRPO"])
def test_but_for_what_is_dropped_it_is_stock_trl(name):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="FlashPO scores padded")
        options = {} if name == "SFT" else {"disable_dropout": False}
        # by our attention only in DPO's reference, which has no dropout
        assert_same_training(name, packed=name == "DPO", model=hardly_any_dropout(), **options)


@pytest.mark.parametrize("name", ["SFT", "GRPO"])
def test_gpt2_trains_as_published(name):
    trainer = make_trainer(name, flashpo.trl, model="gpt2", max_steps=2, share_prefix=True)
    shapes = []
    trainer.model.transformer.h[0].attn.register_forward_hook(
        lambda module, args, out: shapes.append(args[0].shape[0]) if module.training else None
    )
    flashpo.stats(reset=True)
    trainer.train()
    assert trainer.state.global_step == 2
    assert set(shapes) == {1}, "a tree is one row"
    assert name == "GRPO" or "tree_attention_fwd" not in flashpo.stats()  # the engine's prefill has no dropout
