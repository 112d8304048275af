"""A trainer's processor runs once for each distinct prompt with images, and its results are those for all prompts."""

import io
import types

import pytest
import torch
from image_processors import images_data, picture, qwen_processor
from PIL import Image
from test_images import FAMILIES
from transformers import BatchFeature
from trl_models import load, make_trainer, train

import flashpo.trl
from flashpo.bench.tiny_images import TOKEN, image_model, pictures, type_ids
from flashpo.trl import processing
from flashpo.trl.processing import DistinctPrompts, distinct, repeated
from flashpo.trl.rollout import TrainerRollouts

IMAGES = [[picture(10)], [picture(10)], [picture(80, width=32), picture(10)], [picture(80, width=32), picture(10)]]


def seen_by(processor, monkeypatch) -> list[int]:
    """How many images each later run of the image processor has."""
    counts: list[int] = []
    kind = type(processor.image_processor)
    original = kind.preprocess

    def preprocess(self, images, *args, **options):
        counts.append(sum(len(own) if isinstance(own, list) else 1 for own in images))
        return original(self, images, *args, **options)

    monkeypatch.setattr(kind, "preprocess", preprocess)
    return counts


def of_rows(processor, padding_side="left"):
    texts = [" ".join(["<|image_pad|>"] * len(own) + ["fox"] * (i // 2 + 1)) for i, own in enumerate(IMAGES)]
    return processor(images=IMAGES, text=texts, padding=True, padding_side=padding_side, return_tensors="pt")


def of_conversations(processor):
    said = [
        [{"role": "user", "content": [{"type": "image", "image": x} for x in own] + [{"type": "text", "text": "fox"}]}]
        for own in IMAGES
    ]
    return processor.apply_chat_template(said, tokenize=True, return_dict=True, add_generation_prompt=True)


def trainer_of(processor):
    return types.SimpleNamespace(processing_class=processor, model=load("qwen3_vl"))


CALLS = {
    "left": of_rows,
    "right": lambda processor: of_rows(processor, "right"),
    "conversations": of_conversations,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_results_are_those_for_all_rows(call, monkeypatch, no_fallback):
    processor = qwen_processor()
    trainer, prompts = trainer_of(processor), DistinctPrompts()
    expected = call(processor)
    counts = seen_by(processor, monkeypatch)
    for _ in range(2):
        with prompts.processed_once(trainer):
            assert isinstance(trainer.processing_class, type(processor))
            found = call(trainer.processing_class)
        assert processing._same(found, expected)
    assert counts == [3, 6, 3], "the first call is compared with a run on all rows"
    assert trainer.processing_class is processor
    call(processor)
    assert counts[-1] == 6, "outside of the block nothing is replaced"


def test_only_equal_rows_are_one():
    other, palette, turned = picture(10), picture(10).convert("P"), picture(10)
    other.putpixel((5, 5), (1, 2, 3))
    swapped = palette.copy()
    swapped.putpalette([255 - x for x in palette.getpalette()])
    turned.info["exif"] = b"Exif\x00\x00MM"
    images = [[x] for x in (picture(10), other, palette, swapped, turned, picture(10))]
    assert distinct(["a"] * 6, images) == ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 0])
    assert distinct(["a", "b", "a"], [[picture(1)]] * 3) == ([0, 1], [0, 1, 0])
    assert distinct(["a", "a"], [[picture(1)], [picture(1)] * 2]) == ([0, 1], [0, 1])
    arrays = [[torch.ones(3, 2, 2)], [torch.ones(3, 2, 2)], [torch.ones(3, 2, 2).double()], ["a.png"], ["a.png"]]
    assert distinct(["a"] * 5, arrays)[1] == [0, 0, 1, 2, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_of_each_layout_are_repeated(family):
    model = image_model(family)
    shown, which = [[0], [1, 2], [3]], [1, 0, 0, 2, 1]
    if family in ("smolvlm", "idefics3"):
        shown = [[0, 4], [1, 2], [3, 5]]  # others are filled up with empty images
    fields, tokens = pictures(model, shown)
    ids = [[5, *[TOKEN] * tokens * len(own), 6] for own in shown]
    beside = type_ids(model, torch.tensor(ids)) if len({*map(len, ids)}) == 1 else {}
    found = repeated(model, BatchFeature({"input_ids": ids, **fields, **beside}), shown, which)
    expected = pictures(model, [shown[i] for i in which])[0]
    assert found["input_ids"] == [ids[i] for i in which]
    assert found.keys() == {"input_ids", *expected, *beside}
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=0, atol=0)


def test_lists_stay_lists():
    """LLaVA's processor gives a list of arrays where no tensors are asked for."""
    model = image_model("llava")
    fields, tokens = pictures(model, [[0], [1]])
    arrays = [*fields["pixel_values"].numpy()]
    ids = [[5, *[TOKEN] * tokens, 6]] * 2
    found = repeated(model, BatchFeature({"input_ids": ids, "pixel_values": arrays}), [[0], [1]], [1, 0, 1])
    assert processing._equal(found["pixel_values"], [arrays[i] for i in (1, 0, 1)])


def test_tiles_are_those_of_their_images():
    """InternVL cuts a large image into tiles, which its processor does not count for the caller."""
    model = image_model("internvl")
    fields, tokens = pictures(model, [[0, 1], [2]])  # an image of two tiles, and one of a single tile
    images = [[picture(1, width=32)], [picture(2)]]
    prompts = [[5, *[TOKEN] * 2 * tokens, 6], [5, *[TOKEN] * tokens, 6]]
    shown = TrainerRollouts(types.SimpleNamespace(model=model))._check_turn(prompts, images, fields)
    assert shown.of_rows == [range(0, 2), range(2, 3)]
    found = repeated(model, BatchFeature({"input_ids": prompts, **fields}), images, [1, 0, 1])
    assert torch.equal(found["pixel_values"], fields["pixel_values"][[2, 0, 1, 2]])


def numbers_of_a_batch(result, count):
    result["pixel_values"] = result["pixel_values"] + count


def unknown_field(result, count):
    result["image_angles"] = torch.zeros(count)


FAULTS = {
    numbers_of_a_batch: "its results for a prompt depend on the prompts beside it, or are random",
    unknown_field: "what belongs to which prompt is not known of image_angles",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_processor_of_another_kind_keeps_its_way(fault, monkeypatch):
    processor = qwen_processor()
    kind = type(processor.image_processor)
    original = kind.preprocess

    def preprocess(self, images, *args, **options):
        result = original(self, images, *args, **options)
        fault(result, len(images))
        return result

    monkeypatch.setattr(kind, "preprocess", preprocess)
    expected, trainer, prompts = of_rows(processor), trainer_of(processor), DistinctPrompts()

    def process_twice():
        for _ in range(2):
            with prompts.processed_once(trainer):
                assert processing._same(of_rows(trainer.processing_class), expected)

    with pytest.warns(UserWarning, match="leaves the processor to TRL") as said:
        process_twice()
    assert [FAULTS[fault] in str(w.message) for w in said] == [True]


def test_errors_are_those_of_the_processor():
    processor = qwen_processor()
    trainer, prompts = trainer_of(processor), DistinctPrompts()
    with prompts.processed_once(trainer), pytest.raises(ValueError, match=r"Found total 4 .* tokens and 2 images"):
        trainer.processing_class(images=[[picture(1)]] * 2, text=["<|image_pad|> <|image_pad|>"] * 2)
    broken = Image.open(cut_file())
    with prompts.processed_once(trainer), pytest.raises(OSError, match="truncated"):
        trainer.processing_class(images=[[broken], [picture(1)]], text=["<|image_pad|>"] * 2)
    assert not prompts._refuse.first


def cut_file():
    """A PNG file of which the end is missing."""
    whole = io.BytesIO()
    picture(1, width=200).save(whole, "png")
    return io.BytesIO(whole.getvalue()[:-40])


def test_a_trainer_has_the_images_of_a_prompt_processed_once(monkeypatch, no_fallback):
    processor = qwen_processor()
    counts = seen_by(processor, monkeypatch)
    data = images_data("GRPO", [[picture(10)], [picture(80)]])
    train(make_trainer("GRPO", flashpo.trl, "qwen3_vl", train_dataset=data, processing_class=processor, max_steps=2))
    assert counts == [1, 4, 1, 4, 1, 1], "of four completions, to generate and to score them; both are compared first"
