"""TRL's trainers on multimodal models: batches of text run on token trees. Batches with images of Gemma 3, whose image
tokens see each other in both directions, run by TRL's own code.
"""

import types

import peft
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import Gemma3ImageProcessorPil, Gemma3Processor
from trl_models import (
    IMAGE,
    assert_ran,
    assert_same_training,
    load,
    make_trainer,
    text,
    tokenizer,
    train,
)

import flashpo
import flashpo.trl
from flashpo.trl._text_only import beside_text, zeros_change_nothing
from flashpo.trl.rollout import CannotGenerate, TrainerRollouts

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' }}{% for part in m['content'] %}"
    "{{ ' <boi> ' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
LORA = dict(r=4, target_modules="all-linear", init_lora_weights=False)


pytestmark = pytest.mark.usefixtures("no_fallback")


def processor() -> Gemma3Processor:
    """Images of 16 x 16 are 4 tokens."""
    words = tokenizer()
    words.add_tokens(["<boi>", "<eoi>", "<img>"], special_tokens=True)
    for name, token in {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<img>"}.items():
        setattr(words, name, token)
        setattr(words, f"{name}_id", words.convert_tokens_to_ids(token))
    assert words.image_token_id == IMAGE
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    return Gemma3Processor(images, words, chat_template=TEMPLATE, image_seq_length=4)


def says(role: str, words: str) -> list[dict]:
    return [{"role": role, "content": words}]


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (shade, 2 * shade, 255 - shade))


@pytest.mark.parametrize(
    ("name", "model"),
    [(name, "qwen3_5") for name in ("SFT", "DPO", "GRPO")]
    + [(name, "gemma3") for name in ("SFT", "DPO", "KTO", "GRPO")]
    + [("RLOO", "qwen3_vl")],
)
def test_text_trains_on_trees(name, model):
    assert_same_training(name, model=model)


def test_ppo_trains_on_trees():
    train(make_trainer("PPO", flashpo.trl, "qwen3_vl", critic_model=load("qwen3_vl").model))
    assert_ran("tree_attention_fwd", "tree_attention_bwd", "gae_fwd")


@pytest.mark.parametrize("name", ["SFT", "DPO", "GRPO"])
@pytest.mark.parametrize("model", ["qwen3_vl", "gemma3"])
def test_verify_with_adapters_and_checkpointing(name, model):
    adapters = peft.LoraConfig(task_type="CAUSAL_LM", **LORA)
    trainer = make_trainer(name, flashpo.trl, model, peft_config=adapters, gradient_checkpointing=True)
    report = flashpo.trl.verify(trainer, steps=1)
    assert "tree_attention_fwd" in report.ops
    assert not report.disagreements


def mixed(kind: str) -> Dataset:
    """Rows with an image and rows without, one after the other."""
    rows = []
    for i in range(2 if kind == "GRPO" else 4):
        row = {"prompt": says("user", text(6, i)), "images": [picture(40 * i)] if i % 2 else []}
        answers = [says("assistant", text(4 + i, 10 * n + i)) for n in (1, 2)]
        rows.append(row | dict(zip({"SFT": ["completion"], "DPO": ["chosen", "rejected"], "GRPO": []}[kind], answers)))
    return Dataset.from_list(rows)


ONE_BY_ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_length": None}
BOTH_WAYS = "the batch has images: tokens of an image see each other in both directions."
MIXED = {"SFT": ONE_BY_ONE, "DPO": ONE_BY_ONE, "GRPO": {"max_steps": 2}}  # each GRPO step has the group of one prompt


@pytest.mark.parametrize("name", MIXED)
def test_batches_without_an_image_run_on_trees(name):
    options = {"train_dataset": mixed(name), "processing_class": processor()} | MIXED[name]
    with pytest.warns(UserWarning, match="FlashPO") as said:
        assert_same_training(name, model="gemma3", **options)
    assert [str(w.message).split(": ", 1)[1] for w in said if "FlashPO" in str(w.message)] == [BOTH_WAYS]


def test_prompts_with_images_are_left_to_generate():
    options = {"train_dataset": mixed("GRPO"), "processing_class": processor()} | MIXED["GRPO"]
    with pytest.warns(UserWarning, match="FlashPO") as said:
        train(make_trainer("GRPO", flashpo.trl, "gemma3", **options))
    reasons = [str(w.message).split(": ", 1)[1] for w in said if "FlashPO" in str(w.message)]
    turn = "the prompts have images: tokens of an image see each other in both directions. TRL does."
    assert sorted(reasons) == [BOTH_WAYS, turn]
    assert_ran("decode_attention_fwd", "tree_attention_fwd")


def test_prompts_of_text_from_a_processor_are_rolled_out():
    """It types their tokens; that is no image."""
    rows = [{"prompt": says("user", text(6, i))} for i in range(4)]
    trainer = make_trainer(
        "GRPO", flashpo.trl, "gemma3", train_dataset=Dataset.from_list(rows), processing_class=processor()
    )
    train(trainer)
    assert_ran("decode_attention_fwd", "tree_attention_fwd")


@pytest.mark.parametrize(
    ("model", "name", "neutral"),
    [
        ("qwen3_vl", "mm_token_type_ids", True),
        ("gemma3", "token_type_ids", True),
        ("paligemma", "token_type_ids", False),  # tokens of the type 0 attend both ways
        ("gpt2", "token_type_ids", False),  # a type has an embedding
        ("qwen3", "token_type_ids", True),  # never reads them
    ],
)
def test_types_of_text_are_left_out_where_they_change_nothing(model, name, neutral):
    net, types = load(model), torch.zeros(2, 3, dtype=torch.int64)
    assert zeros_change_nothing(net, name) == neutral
    for x in (types, types.tolist()):
        assert (name not in beside_text(net, {name: x})) == neutral
    types[1, 2] = 1
    for x in (types, types.tolist()):
        assert name in beside_text(net, {name: x})


def test_what_belongs_to_images_is_left_out_where_it_is_empty():
    net = load("qwen3_vl")
    ids = torch.ones(2, 3, dtype=torch.int64)
    empty = {"pixel_values": torch.ones(0, 8), "image_grid_thw": torch.ones(0, 3), "num_images": [0, 0], "labels": None}
    assert beside_text(net, empty | {"input_ids": ids}) == {"input_ids": ids}
    images = {"pixel_values": torch.ones(4, 8), "image_grid_thw": torch.ones(1, 3), "num_images": [1, 0]}
    assert beside_text(net, images).keys() == images.keys()


@pytest.mark.parametrize(
    ("images", "fields", "reason"),
    [
        (None, {}, None),
        (
            [None, []],
            {"mm_token_type_ids": [[0, 0], [0]]},
            None,
        ),  # a turn of prompts of text in a batch that has images
        ([None, ["an image"]], {"mm_token_type_ids": [[0, 0], [0]]}, "the prompts have images"),
        (
            None,
            {"mm_token_type_ids": [[0, 1], [0]], "pixel_values": torch.ones(4, 8)},
            "the prompts have images: ",
        ),
    ],
)
def test_what_a_turn_of_generation_may_bring(images, fields, reason):
    rollouts = TrainerRollouts(types.SimpleNamespace(model=load("qwen3_vl")))
    if reason is None:
        assert rollouts._check_turn([[5, 6], [7]], images, fields) is None
    else:
        with pytest.raises(CannotGenerate, match=reason):
            rollouts._check_turn([[5, 6], [7]], images, fields)
