"""An ordinary TRL script that does not mention FlashPO; images.py times it with and without `flashpo run`.

python bench/image_script.py MODEL OUT PROMPTS IMAGE_TOKENS PROMPT_TOKENS NEW_TOKENS STEPS SEED
"""

import sys

import numpy
import torch
from datasets import Dataset
from image_processor import PATCH, qwen_processor
from PIL import Image
from script_clock import Clock
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

model, out = sys.argv[1:3]
prompts, image_tokens, prompt_tokens, new_tokens, steps, seed = map(int, sys.argv[3:])
COMPLETIONS = 8
cuda = torch.cuda.is_available()


def even_tokens(completion_ids, **kwargs):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


torch.manual_seed(seed)
generator = numpy.random.default_rng(seed)
words = AutoTokenizer.from_pretrained(model)
shape = 2 * PATCH * 16, 2 * PATCH * image_tokens // 16, 3  # 16 rows of image tokens
rows = []
for row in torch.randint(3, len(words) - 4, (steps * prompts, prompt_tokens)).tolist():
    said = [{"role": "user", "content": " ".join(f"w{i}" for i in row)}]
    rows.append({"prompt": said, "images": [Image.fromarray(generator.integers(0, 256, shape, numpy.uint8))]})
config = GRPOConfig(
    out, max_steps=steps, per_device_train_batch_size=prompts * COMPLETIONS, num_generations=COMPLETIONS,
    max_completion_length=new_tokens, learning_rate=3e-5, lr_scheduler_type="constant", gradient_checkpointing=cuda,
    use_cpu=not cuda, bf16=cuda, seed=seed, logging_steps=1, save_strategy="no", report_to="none",
)  # fmt: skip
clock = Clock()
trainer = GRPOTrainer(
    model, even_tokens, config, Dataset.from_list(rows), processing_class=qwen_processor(words), callbacks=[clock]
)
trainer.train()
clock.report(rewards=[row["reward"] for row in trainer.state.log_history if "reward" in row])
