"""Reward models: a training step of one, and the cost of scoring rollouts with one.

The same TRL scripts run under `python` and under `flashpo run`. Models and the alternation of runs are those of
grpo_step.py. The models have random weights.
"""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from flashpo.bench.grpo_step import VARIANTS, Run, compared, run, save_model
from flashpo.bench.shapes import SHAPES
from flashpo.bench.timing import Device, Tables

TRAINING, SCORING = (Path(__file__).with_name(f"{name}_script.py") for name in ("reward", "judge"))


class Training(NamedTuple):
    model: str  # a name in SHAPES
    prompt: int  # tokens
    shortest: int  # of answers, whose lengths are uniformly distributed
    longest: int
    pairs: int = 4  # per step
    steps: int = 4

    @property
    def title(self) -> str:
        answers = f"{self.shortest} to {self.longest}" if self.shortest < self.longest else f"{self.longest}"
        return f"reward training step, {self.model} model, prompt={self.prompt}, answers of {answers} tokens"

    def run(self, command: list[str], device: str, folder: str) -> Run:
        save_model(SHAPES[self.model], None, device, folder)
        settings = self.pairs, self.prompt, self.shortest, self.longest, self.steps, 0
        return run(command, TRAINING, folder, f"{folder}/out", *settings)


class Scoring(NamedTuple):
    """The time is that of the reward model only."""

    model: str  # a name in SHAPES
    prompt: int  # tokens
    mean_length: int | None  # of completions, without the limit; None: they end at the limit only
    new: int = 128  # the limit of completions
    policy: str = "tiny"
    prompts: int = 2  # per step; each has 8 completions
    steps: int = 4

    @property
    def title(self) -> str:
        completions = f"mean length {self.mean_length}" if self.mean_length else f"all of {self.new} tokens"
        return f"scoring by a reward model, {self.model} model, prompt={self.prompt}, completions {completions}"

    def run(self, command: list[str], device: str, folder: str) -> Run:
        policy, judge = f"{folder}/policy", f"{folder}/judge"
        save_model(SHAPES[self.policy], self.mean_length, device, policy)
        save_model(SHAPES[self.model], None, device, judge)
        settings = self.prompts, self.prompt, self.new, self.steps, 0
        return run(command, SCORING, policy, judge, f"{folder}/out", *settings)


Case = Training | Scoring
CASES: dict[str, list[Case]] = {
    "cpu": [
        Training("42M", 512, 128, 128),
        Training("42M", 512, 16, 128),
        Scoring("42M", 512, 48),
        Scoring("42M", 512, None),
    ],
    "cuda": [Training("1.7B", 2048, 64, 512), Scoring("1.7B", 2048, 256, new=512, policy="0.6B")],
}


def records(device: Device, case: Case) -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: [case.run(command, device.name, folder)] for name, command in VARIANTS.items()}
    yield from compared(runs)


def tables(device: Device, with_peers: bool, quick: bool) -> Tables:
    for case in CASES[device.name]:
        yield case.title, partial(records, device, case._replace(steps=2) if quick else case)
