"""An ordinary TRL script that does not mention FlashPO; distillation_step.py times it with and without `flashpo run`.

python bench/distillation_script.py STUDENT TEACHER OUT ROWS SYSTEM_TOKENS PROMPT_TOKENS NEW_TOKENS STEPS SEED
"""

import sys

import torch
from datasets import Dataset
from script_clock import Clock
from transformers import AutoTokenizer
from trl import DistillationConfig, DistillationTrainer

student, teacher, out = sys.argv[1:4]
rows, system_tokens, prompt_tokens, new_tokens, steps, seed = map(int, sys.argv[4:])
cuda = torch.cuda.is_available()
torch.manual_seed(seed)
vocabulary = len(AutoTokenizer.from_pretrained(student))
words = torch.randint(3, vocabulary, (steps * rows, prompt_tokens))
words[:, :system_tokens] = words[0, :system_tokens]
data = Dataset.from_list([{"prompt": " ".join(f"w{i}" for i in row)} for row in words.tolist()])
config = DistillationConfig(
    out, max_steps=steps, per_device_train_batch_size=rows, max_completion_length=new_tokens, learning_rate=3e-5,
    gradient_checkpointing=cuda, use_cpu=not cuda, bf16=cuda, seed=seed, logging_steps=1, save_strategy="no",
    report_to="none",
)  # fmt: skip
clock = Clock()
trainer = DistillationTrainer(student, teacher, config, data, callbacks=[clock])
trainer.train()
clock.report(losses=[row["loss"] for row in trainer.state.log_history if "loss" in row])
