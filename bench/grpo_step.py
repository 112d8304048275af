"""A whole GRPO step (rollout, scoring, update): the same TRL script under `python` and under `flashpo run`.

Each run is a separate process; the two alternate, seed by seed. The time of a step is the median over all runs and all
of their steps except the first. The model's weights are random. A model that never stops writes completions of full
length that are all different, so there is least to share. A model that stops with a constant probability per token
shows what stock TRL pays for padding and for waiting for the longest completion. A tiny model makes enough steps to
learn; its rewards show whether both runs learn the same.
"""

import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from flashpo.bench.demo import environment
from flashpo.bench.shapes import SHAPES, causal_lm
from flashpo.bench.timing import Device, Tables

SCRIPT = Path(__file__).with_name("step_script.py")
VARIANTS = {"stock TRL": [sys.executable], "flashpo run": [sys.executable, "-m", "flashpo.run"]}
END = 1  # the token that ends a completion


class Case(NamedTuple):
    prompt: int  # tokens
    steps: int
    seeds: int
    mean_length: int | None = None  # of completions, without the limit; None: they end at the limit only
    model: str = "42M"  # a name in SHAPES
    new: int = 128  # the limit of completions
    prompts: int = 2  # per step; each has 8 completions

    @property
    def title(self) -> str:
        completions = f"mean length {self.mean_length}" if self.mean_length else f"all of {self.new} tokens"
        return f"GRPO step, {self.model} model, prompt={self.prompt}, completions {completions}"


CASES = {
    "cpu": [
        Case(256, 4, 3, mean_length=48),
        Case(256, 4, 1),
        Case(1024, 3, 1, mean_length=48),
        Case(1024, 3, 1),
        Case(256, 3, 1, mean_length=48, model="35M hybrid"),
        Case(1024, 3, 1, mean_length=48, model="35M hybrid"),
        Case(32, 40, 3, model="tiny"),
    ],
    "cuda": [
        Case(2048, 4, 1, mean_length=256, model="1.7B", new=512, prompts=1),
        Case(2048, 4, 1, model="1.7B", new=512, prompts=1),
    ],
}


class Run(NamedTuple):
    seconds: list[float]
    peak: int  # bytes of the process; on a GPU, of the GPU's memory
    rewards: list[float] = []  # noqa: RUF012  # a NamedTuple's; read only
    losses: list[float] = []  # noqa: RUF012


def save_model(shape: dict[str, Any], mean_length: int | None, device: str, folder: str) -> None:
    """Save a model with random weights, and a tokenizer for which every id is a word."""
    torch.manual_seed(0)
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    model = causal_lm(shape, device, max_position_embeddings=4096, pad_token_id=0, eos_token_id=END)
    if mean_length is not None:
        end_completions(model, 1 / mean_length)
    model.to(torch.bfloat16 if device == "cuda" else torch.float32).save_pretrained(folder)
    vocabulary = [*special.values(), *(f"w{i}" for i in range(3, model.config.vocab_size))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


@torch.no_grad()
def end_completions(model: PreTrainedModel, probability: float) -> None:
    """Let END follow every token with about this probability.

    Feature 0 of the residual stream is set to 1 for all tokens, since only the embedding writes to it. END's row of the
    head, which is tied to the embedding, then reads its logit from that feature.
    """
    embedding = model.model.embed_tokens.weight
    embedding[:, 0] = 1
    for name, module in model.model.layers.named_modules():
        if name.endswith(("o_proj", "out_proj", "down_proj")):
            module.weight[0] = 0
    hidden = model.model(torch.randint(3, len(embedding), (4, 64), device=embedding.device)).last_hidden_state
    logits = hidden @ embedding.T
    above_mean = math.log(probability / (1 - probability)) + (logits.logsumexp(-1) - logits.mean(-1)).mean()
    embedding[END] = embedding.mean(0)
    embedding[END, 0] = 1 + above_mean / hidden[..., 0].mean()


def run(command: list[str], script: Path, *args: object) -> Run:
    done = subprocess.run([*command, script, *map(str, args)], capture_output=True, text=True, env=environment())
    if done.returncode != 0:
        raise RuntimeError(f"{command} failed with status {done.returncode}:\n{done.stderr[-3000:]}")
    return Run(**json.loads(done.stdout.splitlines()[-1]))


def records(device: Device, case: Case) -> Iterator[dict]:
    runs: dict[str, list[Run]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as model, tempfile.TemporaryDirectory() as out:
        save_model(SHAPES[case.model], case.mean_length, device.name, model)
        learns = case.model == "tiny"  # the other models make too few steps
        settings = case.prompts, case.prompt, case.new, case.steps
        for seed in range(case.seeds):
            for name, command in VARIANTS.items():
                runs[name].append(run(command, SCRIPT, model, out, *settings, seed, 4e-3 if learns else 3e-5))
    for record in compared(runs):
        done = runs[record["variant"]]
        last = [statistics.mean(r.rewards[-5:]) for r in done]
        if learns:
            record |= {
                "reward_first": statistics.mean(r.rewards[0] for r in done),
                "reward_last": statistics.mean(last),
                "reward_spread": max(last) - min(last),
            }
        yield record


def compared(runs: dict[str, list[Run]]) -> Iterator[dict]:
    """A record for each variant: medians over all steps of its runs but their first, and over the runs' peaks."""
    seconds = {name: statistics.median(s for r in done for s in r.seconds[1:]) for name, done in runs.items()}
    for name, done in runs.items():
        yield {
            "variant": name,
            "ms": seconds[name] * 1e3,
            "times_flashpo": seconds[name] / seconds["flashpo run"],
            "peak_mb": statistics.median(r.peak for r in done) / 2**20,
        }


def tables(device: Device, with_peers: bool, quick: bool) -> Tables:
    for case in CASES[device.name][: 1 if quick else None]:
        case = case._replace(steps=2, seeds=1) if quick else case
        yield case.title, partial(records, device, case)
