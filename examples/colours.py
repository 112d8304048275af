"""Pictures in six colours, each with the question for its colour: a data set with images, and a tiny model for it.

python examples/colours.py out/colours                           # model, data, and grpo.yaml, which names both
flashpo run trl grpo --config out/colours/grpo.yaml --seed 0     # TRL's own script, in the folder above this one
"""

import argparse
from pathlib import Path

import numpy
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

COLOURS = {
    "red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 60, 220),
    "yellow": (230, 220, 40), "black": (10, 10, 10), "white": (245, 245, 245),
}  # fmt: skip
QUESTIONS = ["what colour is this picture ?", "which is the colour of this picture ?"]
WORDS = [*COLOURS, *sorted({word for question in QUESTIONS for word in question.split()}), "it", "looks", "a", "."]
SPECIAL = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>", "<image>"]
SIZE, PATCH = 32, 8  # pixels; a picture is 16 tokens
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' }}{% for part in m['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
OPTIONS = """\
model_name_or_path: {folder}/model
dataset_name: {folder}/data
reward_funcs: [examples.colours.named]
output_dir: {folder}/grpo
max_steps: 100
per_device_train_batch_size: 32
num_generations: 8
max_completion_length: 4
learning_rate: 1.0e-3
lr_scheduler_type: constant
logging_steps: 1
save_strategy: "no"
report_to: none
use_cpu: true
bf16: false
gradient_checkpointing: false
"""


def named(completions, colour, **kwargs) -> list[float]:
    """The share of a completion's words that name the colour of its picture."""
    words = [completion[-1]["content"].split() for completion in completions]
    return [own.count(right) / max(len(own), 1) for own, right in zip(words, colour)]


def picture(colour: str, generator: numpy.random.Generator) -> Image.Image:
    """The colour with noise."""
    pixels = numpy.array(COLOURS[colour]) + generator.integers(-10, 11, (SIZE, SIZE, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(numpy.uint8))


def data(count: int, seed: int) -> Dataset:
    generator = numpy.random.default_rng(seed)
    rows = []
    for _ in range(count):
        colour = generator.choice([*COLOURS])
        said = [{"role": "user", "content": str(generator.choice(QUESTIONS))}]
        rows.append({"prompt": said, "images": [picture(colour, generator)], "colour": str(colour)})
    message = {"role": Value("string"), "content": Value("string")}
    columns = {"prompt": List(message), "images": List(ImageFeature()), "colour": Value("string")}
    return Dataset.from_list(rows, features=Features(columns))


def processor() -> LlavaProcessor:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    size = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=size)
    # the tower has a token for the class of a picture in addition to its patches, which "default" leaves out again
    return LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip


def model(seed: int = 0) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    small = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.1
    )
    text = Qwen3Config(
        **small, vocab_size=len(SPECIAL + WORDS), num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
        tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    tower = CLIPVisionConfig(**small, image_size=SIZE, patch_size=PATCH)
    config = LlavaConfig(
        vision_config=tower, text_config=text, image_token_id=SPECIAL.index("<image>"), tie_word_embeddings=False
    )
    return LlavaForConditionalGeneration(config)


def save(folder: Path, rows: int = 1024) -> None:
    """Write the model with its processor, the data, and the options of a run on a CPU."""
    model().save_pretrained(folder / "model")
    processor().save_pretrained(folder / "model")
    (folder / "data").mkdir(parents=True, exist_ok=True)
    data(rows, seed=0).to_parquet(folder / "data" / "train.parquet")
    (folder / "grpo.yaml").write_text(OPTIONS.format(folder=folder))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a data set of pictures in six colours, and a tiny model")
    parser.add_argument("out", type=Path)
    save(parser.parse_args().out)
