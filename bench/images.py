"""A whole GRPO step on prompts with an image: the same TRL script under `python` and under `flashpo run`.

The runs alternate as in grpo_step.py. The model is a text model of its shapes with a small vision tower. The images are
noise, all different, and each prompt has eight completions. The first step, which is not counted, contains the
comparison with plain forwards.
"""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from flashpo.bench.grpo_step import VARIANTS, Run, compared, run
from flashpo.bench.image_processor import ADDED, PATCH
from flashpo.bench.shapes import SHAPES
from flashpo.bench.timing import Device, Tables

SCRIPT = Path(__file__).with_name("image_script.py")
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [12, 10, 10]}  # for heads of 64 features
TOWER = dict(depth=2, num_heads=4, patch_size=PATCH, deepstack_visual_indexes=[0])


class Case(NamedTuple):
    image: int  # tokens
    model: str = "42M"  # a name in SHAPES
    prompt: int = 32  # tokens besides the image
    new: int = 128
    prompts: int = 1  # per step; each has 8 completions
    steps: int = 3

    @property
    def title(self) -> str:
        return f"GRPO step with images, {self.model} model, image={self.image}, all of {self.new} new tokens"


CASES = {
    "cpu": [Case(1024), Case(256), Case(64)],
    "cuda": [Case(1024, model="0.6B", new=256), Case(4096, model="0.6B", new=256)],
}


def save_model(case: Case, device: str, folder: str) -> None:
    """Save a model with random weights, and a tokenizer for which every id is a word."""
    torch.manual_seed(0)
    shape = SHAPES[case.model]
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    vocabulary = [*special.values(), *(f"w{i}" for i in range(3, shape["vocab_size"] - len(ADDED)))]
    rope = ROPE if shape["head_dim"] == 64 else ROPE | {"mrope_section": [24, 20, 20]}
    config = Qwen3VLConfig(
        text_config=shape | {"rope_parameters": rope, "pad_token_id": 0, "eos_token_id": 1},
        vision_config=TOWER | {"hidden_size": 128, "intermediate_size": 256, "out_hidden_size": shape["hidden_size"]},
        image_token_id=len(vocabulary),
        video_token_id=len(vocabulary) + 1,
        tie_word_embeddings=True,
    )
    with torch.device(device):
        model = Qwen3VLForConditionalGeneration(config)
    model.to(torch.bfloat16 if device == "cuda" else torch.float32).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


def records(device: Device, case: Case) -> Iterator[dict]:
    runs: dict[str, list[Run]] = {}
    with tempfile.TemporaryDirectory() as model, tempfile.TemporaryDirectory() as out:
        save_model(case, device.name, model)
        for name, command in VARIANTS.items():
            settings = case.prompts, case.image, case.prompt, case.new, case.steps, 0
            runs[name] = [run(command, SCRIPT, model, out, *settings)]
    yield from compared(runs)


def tables(device: Device, with_peers: bool, quick: bool) -> Tables:
    for case in CASES[device.name][: 1 if quick else None]:
        yield case.title, partial(records, device, case._replace(steps=2) if quick else case)
