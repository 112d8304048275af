"""Two parts of the demo's steps by themselves, stock and accelerated in turns: `python bench/demo_parts.py CHECKPOINT`.

One part is the LM head, forward and backward, through the forward of TRL's `fused_lm_head`, with the layers below it
replaced by a constant. The other is the generation of a GRPO step, by transformers' `generate` as TRL calls it and by
the rollout engine. Both use arithmetic problems in batches of the demo's sizes. Prints {part: [stock, accelerated]} in
median seconds.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_outputs import BaseModelOutputWithPast
from trl.trainer.utils import add_fused_lm_head

from flashpo.rollout import RolloutEngine, SamplingParams
from flashpo.trl import patched
from flashpo.trl.patch import stock

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import arithmetic

WARM_UP, REPEATS = 3, 15
PROMPTS, COMPLETIONS, NEW = 16, 8, 16  # as in examples/grpo.py


def labels_of(batch: int, tokens) -> torch.Tensor:
    """(batch, length): the completions with their end token; -100 on prompts and padding."""
    rows = arithmetic.problems(batch, seed=2)
    prompts, completions = ([tokens(row[key])["input_ids"] for row in rows] for key in ("prompt", "completion"))
    labels = torch.full((batch, max(len(p) + len(c) for p, c in zip(prompts, completions)) + 1), -100)
    for row, prompt, completion in zip(labels, prompts, completions):
        row[len(prompt) : len(prompt) + len(completion) + 1] = torch.tensor([*completion, tokens.eos_token_id])
    return labels


def head(checkpoint: str, batch: int, outputs: tuple[str, ...]) -> list[float]:
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

    return in_turns(f"LM head, {batch} sequences", stock()(step), patched()(step))


def generation(checkpoint: str) -> list[float]:
    model, tokens = AutoModelForCausalLM.from_pretrained(checkpoint).eval(), AutoTokenizer.from_pretrained(checkpoint)
    prompts = tokens([row["prompt"] for row in arithmetic.problems(PROMPTS, seed=2)])["input_ids"]
    padded = tokens.pad({"input_ids": [p for p in prompts for _ in range(COMPLETIONS)]}, return_tensors="pt")
    sampling = GenerationConfig(
        max_new_tokens=NEW, do_sample=True, top_k=0, pad_token_id=tokens.pad_token_id, eos_token_id=tokens.eos_token_id
    )
    engine = RolloutEngine(model, fallback="error")
    params = SamplingParams(n=COMPLETIONS, max_new_tokens=NEW, stop_token_ids=[tokens.eos_token_id])

    def generate() -> float:
        start = time.perf_counter()
        model.generate(**padded, generation_config=sampling)
        return time.perf_counter() - start

    return in_turns(
        f"generation, {PROMPTS} x {COMPLETIONS} sequences",
        generate,
        lambda: engine.generate(prompts, params).stats.seconds,
    )


def in_turns(title: str, stock_seconds: Callable[[], float], our_seconds: Callable[[], float]) -> list[float]:
    """Time the variants in turns; return the medians."""
    times = [(stock_seconds(), our_seconds()) for _ in tqdm(range(WARM_UP + REPEATS), desc=title, unit="pair")]
    return [statistics.median(values) for values in zip(*times[WARM_UP:])]


if __name__ == "__main__":
    parts = {
        "SFT head": head(sys.argv[1], 64, ("log_probs", "entropy", "is_top1")),
        "GRPO head": head(sys.argv[1], 128, ("log_probs", "entropy")),
        "GRPO generation": generation(sys.argv[1]),
    }
    print(json.dumps(parts))
