"""GRPO with a reward model, in an ordinary TRL script that does not mention FlashPO; reward_step.py times its scoring
with and without `flashpo run`.

python bench/judge_script.py POLICY JUDGE OUT PROMPTS PROMPT_TOKENS NEW_TOKENS STEPS SEED
"""

import sys
import time

import torch
from datasets import Dataset
from script_clock import Clock
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

policy, judge, out = sys.argv[1:4]
prompts, prompt_tokens, new_tokens, steps, seed = map(int, sys.argv[4:])
COMPLETIONS = 8
cuda = torch.cuda.is_available()
torch.manual_seed(seed)
vocabulary = len(AutoTokenizer.from_pretrained(policy))
words = torch.randint(3, vocabulary, (steps * prompts, prompt_tokens)).tolist()
data = Dataset.from_list([{"prompt": " ".join(f"w{i}" for i in row)} for row in words])
config = GRPOConfig(
    out, max_steps=steps, per_device_train_batch_size=prompts * COMPLETIONS, num_generations=COMPLETIONS,
    max_completion_length=new_tokens, learning_rate=3e-5, gradient_checkpointing=cuda, use_cpu=not cuda, bf16=cuda,
    seed=seed, logging_steps=1, save_strategy="no", report_to="none",
)  # fmt: skip
reward = AutoModelForSequenceClassification.from_pretrained(judge, num_labels=1)
scored = Clock()


def tick(*args) -> None:
    if cuda:
        torch.cuda.synchronize()
    scored.times.append(time.perf_counter())


reward.register_forward_pre_hook(tick)
reward.register_forward_hook(tick)
trainer = GRPOTrainer(policy, reward_funcs=reward, args=config, train_dataset=data)
trainer.train()
scored.report(rewards=[row["reward"] for row in trainer.state.log_history if "reward" in row])
