"""An ordinary TRL script that does not mention FlashPO; reward_step.py times it with and without `flashpo run`.

python bench/reward_script.py MODEL OUT PAIRS PROMPT_TOKENS SHORTEST LONGEST STEPS SEED
"""

import sys

import torch
from datasets import Dataset
from script_clock import Clock
from transformers import AutoTokenizer
from trl import RewardConfig, RewardTrainer

model, out = sys.argv[1:3]
pairs, prompt_tokens, shortest, longest, steps, seed = map(int, sys.argv[3:])
cuda = torch.cuda.is_available()
torch.manual_seed(seed)
vocabulary = len(AutoTokenizer.from_pretrained(model))


def words(count: int) -> str:
    return " ".join(f"w{i}" for i in torch.randint(3, vocabulary, (count,)).tolist())


rows = []
for _ in range(steps * pairs):
    chosen, rejected = torch.randint(shortest, longest + 1, (2,)).tolist()
    rows.append({"prompt": words(prompt_tokens), "chosen": " " + words(chosen), "rejected": " " + words(rejected)})
config = RewardConfig(
    out, max_steps=steps, per_device_train_batch_size=pairs, max_length=None, learning_rate=3e-5,
    gradient_checkpointing=cuda, use_cpu=not cuda, bf16=cuda, seed=seed, logging_steps=1, save_strategy="no",
    report_to="none",
)  # fmt: skip
clock = Clock()
trainer = RewardTrainer(model, config, train_dataset=Dataset.from_list(rows), callbacks=[clock])
trainer.train()
clock.report(losses=[row["loss"] for row in trainer.state.log_history if "loss" in row])
