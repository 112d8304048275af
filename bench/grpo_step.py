"""A whole GRPO step, rollout, scoring and update: the same TRL script under `python` and under `flashpo run`.

Each run is a process of its own; the two take turns, seed by seed. A step's time is the median of all steps but the
first of each run.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from flashpo.bench.rollout import SHAPES
from flashpo.bench.timing import Device, Tables

SCRIPT = Path(__file__).with_name("step_script.py")
VARIANTS = {"stock TRL": [sys.executable], "flashpo run": [sys.executable, "-m", "flashpo.run"]}
CASES = {"cpu": [(256, 4, 1), (1024, 3, 1)], "cuda": [(512, 8, 3), (2048, 8, 1)]}  # prompt tokens, steps, seeds


class Run(NamedTuple):
    seconds: list[float]
    rewards: list[float]
    peak: int  # bytes of the process


def save_model(device: Device, folder: str) -> None:
    """Random weights, and a tokenizer to which every id is a word."""
    torch.manual_seed(0)
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    config = Qwen3Config(
        **SHAPES[device.name], tie_word_embeddings=True, max_position_embeddings=4096, pad_token_id=0, eos_token_id=1
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    vocabulary = [*special.values(), *(f"w{i}" for i in range(3, config.vocab_size))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


def run(command: list[str], *args: object) -> Run:
    environment = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | os.environ
    process = subprocess.Popen(
        [*command, SCRIPT, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stderr is not None
    errors = process.stderr.read()  # all of it: a full pipe would stop the script
    lines = process.stdout.read().splitlines()
    _, status, usage = os.wait4(process.pid, 0)  # the peak memory of this child alone
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{command} failed with status {process.returncode}:\n{errors[-3000:]}")
    found = json.loads(lines[-1])
    return Run(found["seconds"], found["rewards"], usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def records(device: Device, model: str, prompt: int, steps: int, seeds: int) -> Iterator[dict]:
    runs: dict[str, list[Run]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as out:
        for seed in range(seeds):
            for name, command in VARIANTS.items():
                runs[name].append(run(command, model, out, prompt, steps, seed))
    seconds = {name: statistics.median(s for r in done for s in r.seconds[1:]) for name, done in runs.items()}
    for name, done in runs.items():
        last = [statistics.mean(r.rewards[-2:]) for r in done]
        yield {
            "variant": name,
            "ms": seconds[name] * 1e3,
            "times_flashpo": seconds[name] / seconds["flashpo run"],
            "peak_mb": statistics.median(r.peak for r in done) / 2**20,
            "reward_first": statistics.mean(r.rewards[0] for r in done),
            "reward_last": statistics.mean(last),
            "reward_spread": max(last) - min(last),
        }


def tables(device: Device, with_peers: bool, quick: bool) -> Tables:
    with tempfile.TemporaryDirectory() as model:
        save_model(device, model)
        for prompt, steps, seeds in CASES[device.name][: 1 if quick else None]:
            steps, seeds = (2, 1) if quick else (steps, seeds)
            title = f"GRPO step, 2 x 8 completions of 128 tokens, prompt={prompt}, {seeds} seed" + "s" * (seeds > 1)
            yield title, list(records(device, model, prompt, steps, seeds))
