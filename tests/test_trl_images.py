"""TRL's trainers on data with images: each image and shared prefix is computed once; loss and gradients are TRL's."""

import peft
import pytest
import torch
import trl
from datasets import Dataset
from image_processors import images_data, picture, qwen_processor, says
from trl_models import assert_ran, assert_same, assert_same_training, load, make_trainer, train

import flashpo
import flashpo.trl
from flashpo.packing.images import SCORED, shared

pytestmark = pytest.mark.usefixtures("no_fallback")
SHOWN = [[picture(10)], [picture(80)], []]


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("qwen3_vl", {"beta": 0.1, "num_iterations": 2, "gradient_accumulation_steps": 2, "max_steps": 2}),
        ("qwen3_5", {}),
    ],
    ids=["old and reference log-probs", "hybrid"],
)
def test_grpo(model, options):
    data = images_data("GRPO", [[picture(10)], [picture(80)]])
    assert_same_training("GRPO", model=model, train_dataset=data, processing_class=qwen_processor(), **options)


def test_ppo():
    """TRL's scoring in the place of ours gives the same losses and gradients."""
    trainer = make_trainer(
        "PPO",
        flashpo.trl,
        "qwen3_vl",
        train_dataset=images_data("GRPO", [[picture(10)], [picture(80), picture(10)]]),
        processing_class=qwen_processor(),
    )
    shared.clear()
    report = flashpo.trl.verify(trainer, steps=2)
    assert shared[SCORED]
    assert not report.disagreements
    assert any("visual" in line.name and line.stock > 0 for line in report.lines)


def test_equal_rewards_give_the_tower_a_gradient_of_zero():
    """An optimizer with momentum or weight decay moves such parameters, but not those without a gradient."""
    options = dict(
        train_dataset=images_data("GRPO", [[picture(10)]] * 2),
        processing_class=qwen_processor(),
        reward_funcs=lambda completions, **kwargs: [1.0] * len(completions),
    )
    (stock,), (ours,) = (
        train(make_trainer("GRPO", package, "qwen3_vl", **options, **sampled))
        for package, sampled in ((trl, {}), (flashpo.trl, {"rollout": "generate"}))
    )
    assert_ran("tree_attention_fwd")
    assert ours.gradients.keys() == stock.gradients.keys()
    assert not any(gradient.any() for gradient in ours.gradients.values())


def test_in_16_bits_with_checkpointing():
    """Under bf16 autocast, with the tower's activations computed again in the backward."""
    trainer = make_trainer(
        "GRPO",
        flashpo.trl,
        "qwen3_vl",
        bf16=True,
        gradient_checkpointing=True,
        train_dataset=images_data("GRPO", [[picture(10)]] * 2),
        processing_class=qwen_processor(),
    )
    report = flashpo.trl.verify(trainer, steps=1)
    assert report.dtype == torch.bfloat16
    assert "tree_attention_fwd" in report.ops
    assert not report.disagreements


@pytest.mark.parametrize("frozen", [False, True], ids=["adapters in the tower, too", "tower frozen"])
def test_adapters_with_checkpointing(frozen):
    """`verify` compares every gradient with TRL's own."""
    modules = r".*language_model.*\.(q|v|up|down)_proj" if frozen else "all-linear"
    trainer = make_trainer(
        "GRPO",
        flashpo.trl,
        "qwen3_vl",
        peft_config=peft.LoraConfig(r=4, target_modules=modules, init_lora_weights=False, task_type="CAUSAL_LM"),
        gradient_checkpointing=True,
        train_dataset=images_data("GRPO", [[picture(10)]] * 2),
        processing_class=qwen_processor(),
    )
    report = flashpo.trl.verify(trainer, steps=1)
    assert "tree_attention_fwd" in report.ops
    assert not report.disagreements


def test_a_tower_alone_is_trained():
    modules = r".*visual.*\.(qkv|proj|linear_fc1|linear_fc2)"
    trainer = make_trainer(
        "DPO",
        flashpo.trl,
        "qwen3_vl",
        peft_config=peft.LoraConfig(r=4, target_modules=modules, init_lora_weights=False, task_type="CAUSAL_LM"),
        train_dataset=images_data("DPO", [[picture(10)]] * 4),
        processing_class=qwen_processor(),
        max_length=None,
    )
    assert all("visual" in name for name, p in trainer.model.named_parameters() if p.requires_grad)
    report = flashpo.trl.verify(trainer, steps=1)
    assert "tree_attention_fwd" in report.ops
    assert not report.disagreements


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


def another(kind, seed):
    model = load(kind)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


def assert_same_distillation(kind="qwen3_vl", **options):
    """Steps on rows with one image and with two are those of stock TRL."""
    data = images_data("GRPO", [[picture(10)], [picture(80), picture(20, width=32)]] * 4)
    options |= dict(train_dataset=data, processing_class=qwen_processor(), max_completion_length=6)
    flashpo.stats(reset=True)
    stock = train(make_trainer("Distillation", trl, kind, teacher_model=another(kind, 3), **options))
    assert not flashpo.stats()
    ours = make_trainer(
        "Distillation", flashpo.trl, kind, teacher_model=another(kind, 3), rollout="generate", **options
    )
    assert_same(stock, train(ours))


def test_distillation():
    shared.clear()
    assert_same_distillation(gradient_accumulation_steps=2, max_steps=2)
    assert_ran("tree_attention_fwd", "tree_attention_bwd", "linear_divergence_bwd")
    assert shared[SCORED] == 4, "every micro-batch runs on a tree with its images"


def test_rows_that_trees_do_not_take_are_distilled_padded(monkeypatch):
    monkeypatch.setattr("flashpo.trl.images.image_parity", lambda model, rows: "it is wrong")
    with pytest.warns(UserWarning, match="the batch has images: it is wrong") as said:
        assert_same_distillation()
    assert sum("padded rows" in str(warning.message) for warning in said) == 1


def test_rollouts_by_the_engine():
    """Two prompts of the same words with other images, one without."""
    data = Dataset.from_list([row | {"prompt": says("user", "the fox")} for row in images_data("GRPO", SHOWN)])
    trainer = make_trainer(
        "GRPO", flashpo.trl, "qwen3_5", train_dataset=data, processing_class=qwen_processor(), max_steps=2
    )
    train(trainer)
    assert_ran("decode_attention_fwd", "tree_attention_fwd")
    for log in trainer.state.log_history[:2]:
        assert log["rollout/mismatch/max"] < 1e-4
