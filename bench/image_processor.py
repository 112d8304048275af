"""The processor of Qwen's multimodal models for any tokenizer. It works without torchvision, which only videos need."""

from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil, Qwen3VLProcessor

PAD = "<|image_pad|>"
ADDED = [PAD, "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
PATCH = 4  # pixels; an image token stands for 8 x 8 pixels
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' }}{% for part in m['content'] %}"
    "{{ ' <|vision_start|> <|image_pad|> <|vision_end|> ' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ ' <eos> ' }}{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)


class QwenProcessor(Qwen3VLProcessor):
    def check_argument_for_proper_class(self, argument_name, argument):
        if argument_name != "video_processor":
            return super().check_argument_for_proper_class(argument_name, argument)


def qwen_processor(words: PreTrainedTokenizerFast) -> QwenProcessor:
    """The processor; it adds the image tokens to the tokenizer `words`."""
    words.add_tokens(ADDED, special_tokens=True)
    words.padding_side = "left"  # as TRL loads processors: it pads the types of tokens by it
    images = Qwen2VLImageProcessorPil(min_pixels=64, max_pixels=1 << 20, patch_size=PATCH, merge_size=2)
    return QwenProcessor(images, words, None, chat_template=TEMPLATE)
