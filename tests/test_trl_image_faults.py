"""Image datasets with something wrong in them: FlashPO's trainers raise what TRL's raise, or train as TRL's do."""

import io
import re
import warnings

import pytest
import trl
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from image_processors import images_data, picture, qwen_processor, says
from PIL import Image
from trl_models import assert_ran, assert_same, assert_same_training, make_trainer, tokenizer, train

import flashpo.trl

PLACEHOLDER = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "the fox"}]}]


def file_of(kind: str, *frames: Image.Image) -> bytes:
    out = io.BytesIO()
    frames[0].save(out, kind, **({"save_all": True, "append_images": frames[1:]} if len(frames) > 1 else {}))
    return out.getvalue()


def of_files(files: list[bytes]) -> Dataset:
    """A row for each file, which is decoded when the row is read."""
    rows = [{"prompt": says("user", "the fox"), "images": [{"bytes": file, "path": None}]} for file in files]
    message = {"role": Value("string"), "content": Value("string")}
    return Dataset.from_list(rows, features=Features({"prompt": List(message), "images": List(ImageFeature())}))


def rows(prompt, images) -> Dataset:
    return Dataset.from_list([{"prompt": prompt, "images": images}] * 2)


CUT = file_of("png", picture(1, width=200))[:-40]
FAULTS = {
    "an image is missing": lambda: dict(train_dataset=rows([*PLACEHOLDER, *PLACEHOLDER], [picture(1)])),
    "an image too many": lambda: dict(train_dataset=rows(PLACEHOLDER, [picture(1), picture(2)])),
    "no text in a conversation": lambda: dict(train_dataset=rows("the fox", [picture(1)])),
    "a file is cut": lambda: dict(train_dataset=of_files([CUT] * 2)),
    "a file is no image": lambda: dict(train_dataset=of_files([b"no image"] * 2)),
    "images in some rows only": lambda: dict(
        train_dataset=images_data("GRPO", [[picture(1)], []]), per_device_train_batch_size=8
    ),
    "a model of text": lambda: dict(
        train_dataset=images_data("GRPO", [[picture(1)]] * 2), model="qwen3", processing_class=tokenizer()
    ),
    "no processor": lambda: dict(train_dataset=images_data("GRPO", [[picture(1)]] * 2), processing_class=object()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_error_is_that_of_trl(fault):
    errors = []
    for package in (trl, flashpo.trl):
        with pytest.raises(Exception) as found:  # noqa: PT011  # of whatever kind TRL raises
            train(
                make_trainer(
                    "GRPO", package, **{"model": "qwen3_vl", "processing_class": qwen_processor()} | FAULTS[fault]()
                )
            )
        errors.append(found.value)
    theirs, ours = errors
    assert type(ours) is type(theirs)
    assert re.sub("0x[0-9a-f]+", "", str(ours)) == re.sub("0x[0-9a-f]+", "", str(theirs))


def test_animated_files_train_as_in_trl():
    """The processor takes the first picture."""
    animated = file_of("gif", picture(10), picture(80))
    options = dict(train_dataset=of_files([animated, file_of("gif", picture(10))]), processing_class=qwen_processor())
    stock = train(make_trainer("GRPO", trl, "qwen3_vl", **options, max_steps=2))
    ours = train(make_trainer("GRPO", flashpo.trl, "qwen3_vl", **options, max_steps=2, rollout="generate"))
    assert_ran("tree_attention_fwd")
    assert_same(stock, ours)


def test_types_that_are_padded_on_the_other_side_are_left_to_trl():
    """trl#5785: TRL pads prompts on the left, and its processor may pad the types of their tokens on the right."""
    processor = qwen_processor()
    processor.tokenizer.padding_side = "right"
    options = dict(train_dataset=images_data("GRPO", [[picture(1)], [picture(1)] * 2]), processing_class=processor)
    options |= dict(model="qwen3_vl", per_device_train_batch_size=8)
    with pytest.warns(UserWarning, match="FlashPO") as said:
        assert_same_training("GRPO", packed=False, **options)
    reasons = [str(w.message) for w in said if "FlashPO" in str(w.message)]
    assert ["mm_token_type_ids: row 0 marks other tokens than those of its images" in x for x in reasons] == [True]


def test_an_image_token_in_a_completion_is_left_to_trl(monkeypatch):
    """trl#3847: sampled, or written by a rollout function. TRL's model refuses it, and so does ours after a warning."""
    token = qwen_processor().image_token_id

    def generate(self, prompt_ids, *args, **kwargs):
        ids = [[7, 8, token, 9]] * len(prompt_ids)
        return ids, None

    errors = []
    for package in (trl, flashpo.trl):
        trainer = make_trainer(
            "GRPO",
            package,
            "qwen3_vl",
            train_dataset=images_data("GRPO", [[picture(1)]] * 2),
            processing_class=qwen_processor(),
        )
        monkeypatch.setattr(type(trainer), "_generate_single_turn", generate)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with pytest.raises(Exception) as found:  # noqa: PT011  # TRL's own
                trainer.train()
        errors.append(str(found.value))
    assert errors[0] == errors[1]
    assert any("row 0 marks other tokens than those of its images" in str(warning.message) for warning in said)
