"""The LM head alone in TRL, forward and backward: `python bench/head.py CHECKPOINT`, for demo.py.

Through TRL's own `fused_lm_head` forward, with the layers below it replaced by a constant, stock and accelerated in
turns, on arithmetic problems of the demo's SFT and GRPO batches. Prints [[stock, accelerated], ...], median seconds.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_outputs import BaseModelOutputWithPast
from trl.trainer.utils import add_fused_lm_head

from flashpo.trl import patched
from flashpo.trl.patch import stock

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import arithmetic

WARM_UP, REPEATS = 3, 15


def labels_of(batch: int, tokens) -> torch.Tensor:
    """(batch, length): the completions and their end, -100 on prompts and padding."""
    rows = arithmetic.problems(batch, seed=2)
    prompts, completions = ([tokens(row[key])["input_ids"] for row in rows] for key in ("prompt", "completion"))
    labels = torch.full((batch, max(len(p) + len(c) for p, c in zip(prompts, completions)) + 1), -100)
    for row, prompt, completion in zip(labels, prompts, completions):
        row[len(prompt) : len(prompt) + len(completion) + 1] = torch.tensor([*completion, tokens.eos_token_id])
    return labels


def measure(checkpoint: str, batch: int, outputs: tuple[str, ...]) -> list[float]:
    labels = labels_of(batch, AutoTokenizer.from_pretrained(checkpoint))
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    hidden = torch.randn(*labels.shape, model.config.hidden_size, requires_grad=True)
    model.model.forward = lambda **_: BaseModelOutputWithPast(last_hidden_state=hidden)
    add_fused_lm_head(model, outputs=outputs)

    def step() -> float:
        model.zero_grad()
        start = time.perf_counter()
        model(labels=labels, fused_lm_head=True).loss.backward()
        return time.perf_counter() - start

    times: list[tuple[float, float]] = []
    for _ in tqdm(range(WARM_UP + REPEATS), desc=f"LM head, {batch} sequences", unit="pair"):
        with stock():
            before = step()
        with patched():
            times.append((before, step()))
    return [statistics.median(values) for values in zip(*times[WARM_UP:])]


if __name__ == "__main__":
    sft = measure(sys.argv[1], 64, ("log_probs", "entropy", "is_top1"))
    grpo = measure(sys.argv[1], 128, ("log_probs", "entropy"))
    print(json.dumps([sft, grpo]))
