"""A whole step of on-policy distillation (rollout, both models, update): the same TRL script under `python` and under
`flashpo run`.

Models and the alternation of runs are those of grpo_step.py; student and teacher have random weights. Each prompt gets
one completion, as in TRL, and all prompts begin with the same system prompt.
"""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from flashpo.bench.grpo_step import VARIANTS, Run, compared, run, save_model
from flashpo.bench.shapes import SHAPES
from flashpo.bench.timing import Device, Tables

SCRIPT = Path(__file__).with_name("distillation_script.py")


class Case(NamedTuple):
    student: str  # a name in SHAPES
    teacher: str
    system: int  # tokens of the common system prompt
    prompt: int  # tokens, including the system prompt
    new: int  # the limit of completions
    mean_length: int | None  # of completions, without the limit; None: they end at the limit only
    rows: int = 16  # per step
    steps: int = 4
    seeds: int = 1

    @property
    def title(self) -> str:
        completions = f"mean length {self.mean_length}" if self.mean_length else f"all of {self.new} tokens"
        models = f"student {self.student}, teacher {self.teacher}"
        return f"distillation step, {models}, prompt={self.prompt} ({self.system} shared), completions {completions}"


CASES = {
    "cpu": [Case("42M", "120M", 128, 256, 128, length) for length in (48, None)],
    "cuda": [Case("0.6B", "1.7B", 1024, 2048, 512, length) for length in (256, None)],
}


def records(device: Device, case: Case) -> Iterator[dict]:
    runs: dict[str, list[Run]] = {name: [] for name in VARIANTS}
    folders = tempfile.TemporaryDirectory(), tempfile.TemporaryDirectory(), tempfile.TemporaryDirectory()
    with folders[0] as student, folders[1] as teacher, folders[2] as out:
        save_model(SHAPES[case.student], case.mean_length, device.name, student)
        save_model(SHAPES[case.teacher], case.mean_length, device.name, teacher)
        settings = case.rows, case.system, case.prompt, case.new, case.steps
        for seed in range(case.seeds):
            for name, command in VARIANTS.items():
                runs[name].append(run(command, SCRIPT, student, teacher, out, *settings, seed))
    yield from compared(runs)


def tables(device: Device, with_peers: bool, quick: bool) -> Tables:
    for case in CASES[device.name][: 1 if quick else None]:
        case = case._replace(steps=2, seeds=1) if quick else case
        yield case.title, partial(records, device, case)
