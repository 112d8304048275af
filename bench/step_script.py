"""An ordinary TRL script that does not mention FlashPO; grpo_step.py times it with and without `flashpo run`.

python bench/step_script.py MODEL OUT PROMPTS PROMPT_TOKENS NEW_TOKENS STEPS SEED LEARNING_RATE [--use-vllm]
"""

import sys

import torch
from datasets import Dataset
from script_clock import Clock
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

model, out = sys.argv[1:3]
prompts, prompt_tokens, new_tokens, steps, seed = map(int, sys.argv[3:8])
COMPLETIONS = 8
cuda = torch.cuda.is_available()


def even_tokens(completion_ids, **kwargs):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


torch.manual_seed(seed)
vocabulary = len(AutoTokenizer.from_pretrained(model))
words = torch.randint(3, vocabulary, (steps * prompts, prompt_tokens)).tolist()
data = Dataset.from_list([{"prompt": " ".join(f"w{i}" for i in row)} for row in words])
config = GRPOConfig(
    out, max_steps=steps, per_device_train_batch_size=prompts * COMPLETIONS, num_generations=COMPLETIONS,
    max_completion_length=new_tokens, learning_rate=float(sys.argv[8]), lr_scheduler_type="constant",
    gradient_checkpointing=cuda, use_cpu=not cuda, bf16=cuda, seed=seed, logging_steps=1, save_strategy="no",
    report_to="none", use_vllm="--use-vllm" in sys.argv, vllm_mode="colocate",
)  # fmt: skip
clock = Clock()
trainer = GRPOTrainer(model, reward_funcs=even_tokens, args=config, train_dataset=data, callbacks=[clock])
trainer.train()
rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
clock.report(rewards=rewards)
