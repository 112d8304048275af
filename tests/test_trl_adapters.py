"""A training step with adapters that do more than replace linear layers is TRL's: on trees, or after a warning."""

import warnings

import peft
import pytest
import trl
from datasets import Dataset
from test_trl_steps import RL
from trl_models import DATA, SAMPLED_BY_TRL, assert_same, make_trainer, tokenizer, train

import flashpo.trl

MATRICES = {"task_type": "CAUSAL_LM", "r": 4, "init_lora_weights": False}  # not the identity
INVOCATION = tokenizer()("the").input_ids  # begins every prompt
NORMS = ["input_layernorm", "q_norm", "norm"]
ADAPTERS = {
    "activated": lambda: peft.LoraConfig(target_modules="all-linear", alora_invocation_tokens=INVOCATION, **MATRICES),
    "embeddings": lambda: peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], **MATRICES),
    "tokens": lambda: peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 6, 7, 8], **MATRICES),
    "norms": lambda: peft.LNTuningConfig(target_modules=NORMS),
    "experts": lambda: peft.LoraConfig(target_parameters=["mlp.experts.down_proj"], **MATRICES),
    "mixing": lambda: peft.LilyConfig(target_modules=["q_proj"], r=4, init_weights=False),
}
REFUSED = {
    "activated": "acts outside of the model's layers: it puts hooks on Linear",
    "mixing": "mix the tokens of a batch",
}


def options_of(name: str, kind: str) -> dict:
    rows = [row | {"prompt": "the " + row["prompt"]} for row in DATA[name]]
    options = {"model": "qwen3_moe" if kind == "experts" else "qwen3", "peft_config": ADAPTERS[kind]()}
    return options | {"train_dataset": Dataset.from_list(rows)} | (RL if name in ("GRPO", "RLOO") else {})


TRAINERS = ("SFT", "DPO", "KTO", "GRPO", "RLOO")
# SFT, DPO and KTO take their head from one place; GRPO and RLOO score in one place
STEPS = [(name, kind) for kind in ADAPTERS for name in (TRAINERS if kind == "activated" else ("DPO", "GRPO"))]


@pytest.mark.parametrize(("name", "kind"), STEPS)
def test_a_step_is_that_of_trl(name, kind):
    # under which PEFT's hooks for an activated adapter stay until backward; it raises at KTO's second forward
    checkpointing = {"gradient_checkpointing": kind == "activated" and name != "KTO"}
    stock = train(make_trainer(name, trl, **options_of(name, kind), **checkpointing))
    flashpo.stats(reset=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sampled = SAMPLED_BY_TRL.get(name, {})
        ours = train(make_trainer(name, flashpo.trl, **options_of(name, kind), **checkpointing, **sampled))
    assert_same(stock, ours)
    said = [str(x.message) for x in said if "FlashPO" in str(x.message)]
    assert [REFUSED[kind] in text for text in said] == ([True] if kind in REFUSED else [])
    assert bool(flashpo.stats().get("tree_attention_fwd")) == (kind not in REFUSED)


@pytest.mark.parametrize("kind", ["activated", "embeddings", "experts"])
def test_rollouts(kind):
    """By the engine, or by TRL after a warning; their log-probs are the trainer's."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        step = train(make_trainer("GRPO", flashpo.trl, **options_of("GRPO", kind)))[0]
    said = [str(x.message) for x in said if "rollout engine does not" in str(x.message)]
    assert [REFUSED[kind] in text for text in said] == ([True] if kind in REFUSED else [])
    assert any(gradient.abs().max() > 0 for gradient in step.gradients.values())
    if kind not in REFUSED:
        assert step.metrics["rollout/mismatch/max"] < 1e-4
