"""An image processor for the tiny models of trl_models.py, and data sets whose images have only a few tokens."""

from datasets import Dataset
from PIL import Image
from trl_models import PAD, text, tokenizer

from flashpo.bench import image_processor


def qwen_processor() -> image_processor.QwenProcessor:
    """An image of 16 x 16 is 4 tokens."""
    processor = image_processor.qwen_processor(tokenizer())
    assert processor.image_token_id == PAD
    return processor


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
