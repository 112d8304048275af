"""Models with dropout in attention, as they were published: they train on padded rows, after one warning."""

import warnings

import pytest

pytest.importorskip("trl")
from trl_models import assert_ran, make_trainer

import flashpo.trl

REASON = "gpt2: GPT2Attention has a dropout of 0.1 in its attention"


@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO", "GRPO", "RLOO"])
def test_gpt2_trains_as_published(name):
    options = {} if name == "SFT" else {"disable_dropout": False}
    if name in ("GRPO", "RLOO"):
        options["beta"] = 0.04  # with a reference
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = make_trainer(name, flashpo.trl, model="gpt2", max_steps=2, **options)
        flashpo.stats(reset=True)
        trainer.train()
    told = [str(w.message) for w in said if "FlashPO scores padded rows" in str(w.message)]
    assert told == [f"FlashPO scores padded rows here, prompts are not shared: {REASON}."]
    assert trainer.state.global_step == 2
    assert name in ("GRPO", "RLOO") or "tree_attention_fwd" not in flashpo.stats()  # rollouts share prompts
    with pytest.raises(ValueError, match=f"share_prefix=True, but {REASON}"):
        make_trainer(name, flashpo.trl, model="gpt2", share_prefix=True, **options)


@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO"])
def test_without_its_dropout_it_runs_packed(name):
    flashpo.stats(reset=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="FlashPO scores padded")
        make_trainer(name, flashpo.trl, model="gpt2", disable_dropout=True).train()
    assert_ran("tree_attention_fwd")
