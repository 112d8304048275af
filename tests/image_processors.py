"""Processors for tiny multimodal models, and data sets with images of a few tokens."""

from datasets import Dataset
from PIL import Image
from transformers import Qwen2VLImageProcessorPil, Qwen3VLProcessor
from trl_models import PAD, text, tokenizer

PATCH = 4
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' }}{% for part in m['content'] %}"
    "{{ ' <|vision_start|> <|image_pad|> <|vision_end|> ' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ ' <eos> ' }}{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
ADDED = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]


class QwenProcessor(Qwen3VLProcessor):
    """Without a processor of videos, which wants torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        if argument_name != "video_processor":
            return super().check_argument_for_proper_class(argument_name, argument)


def qwen_processor() -> QwenProcessor:
    """An image of 16 x 16 is 4 tokens."""
    words = tokenizer()
    words.add_tokens(ADDED, special_tokens=True)
    assert words.convert_tokens_to_ids(ADDED[0]) == PAD
    images = Qwen2VLImageProcessorPil(min_pixels=64, max_pixels=4096, patch_size=PATCH, merge_size=2)
    return QwenProcessor(images, words, None, chat_template=TEMPLATE)


def picture(shade: int, width: int = 16) -> Image.Image:
    image = Image.new("RGB", (width, 16), (shade % 256, 2 * shade % 256, 255 - shade % 256))
    image.putpixel((shade % width, shade % 16), (255, 0, 0))
    return image


def says(role: str, words: str) -> list[dict]:
    return [{"role": role, "content": words}]


def images_data(kind: str, images: list[list[Image.Image]]) -> Dataset:
    """A row for each list of images."""
    answers = {"SFT": ["completion"], "DPO": ["chosen", "rejected"], "KTO": ["completion"]}.get(kind, [])
    rows = []
    for i, own in enumerate(images):
        row = {"prompt": says("user", text(5 + i % 3, i)), "images": own}
        row |= {name: says("assistant", text(4 + i % 3, 10 * n + i)) for n, name in enumerate(answers)}
        rows.append(row | ({"label": i % 2 == 0} if kind == "KTO" else {}))
    return Dataset.from_list(rows)
