"""A TRL script as one finds them, without a word of FlashPO: grpo_step.py times it with and without `flashpo run`.

python bench/step_script.py MODEL OUT PROMPTS PROMPT_TOKENS NEW_TOKENS STEPS SEED LEARNING_RATE
"""

import json
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

model, out = sys.argv[1:3]
prompts, prompt_tokens, new_tokens, steps, seed = map(int, sys.argv[3:8])
COMPLETIONS = 8
cuda = torch.cuda.is_available()


def even_tokens(completion_ids, **kwargs):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


class Clock(TrainerCallback):
    times: list[float] = []  # noqa: RUF012

    def on_step_begin(self, *args, **kwargs):
        self.times.append(time.perf_counter())

    def on_step_end(self, *args, **kwargs):
        self.times.append(time.perf_counter())


torch.manual_seed(seed)
vocabulary = len(AutoTokenizer.from_pretrained(model))
words = torch.randint(3, vocabulary, (steps * prompts, prompt_tokens)).tolist()
data = Dataset.from_list([{"prompt": " ".join(f"w{i}" for i in row)} for row in words])
config = GRPOConfig(
    out, max_steps=steps, per_device_train_batch_size=prompts * COMPLETIONS, num_generations=COMPLETIONS,
    max_completion_length=new_tokens, learning_rate=float(sys.argv[8]), lr_scheduler_type="constant",
    gradient_checkpointing=cuda, use_cpu=not cuda, bf16=cuda, seed=seed, logging_steps=1, save_strategy="no",
    report_to="none",
)  # fmt: skip
trainer = GRPOTrainer(model, reward_funcs=even_tokens, args=config, train_dataset=data, callbacks=[Clock()])
trainer.train()
rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
seconds = [end - begin for begin, end in zip(Clock.times[::2], Clock.times[1::2])]
if cuda:
    peak = torch.cuda.max_memory_allocated()
else:  # not ru_maxrss, which begins with that of the process that started this one
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) << 10
print(json.dumps({"seconds": seconds, "rewards": rewards, "peak": peak}))
