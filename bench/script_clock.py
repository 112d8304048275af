"""For the scripts that grpo_step.py and distillation_step.py time: measures the time of their steps and their
memory."""

import json
import time
from pathlib import Path

import torch
from transformers import TrainerCallback


class Clock(TrainerCallback):
    def __init__(self):
        self.times: list[float] = []

    def on_step_begin(self, *args, **kwargs):
        self.times.append(time.perf_counter())

    def on_step_end(self, *args, **kwargs):
        self.times.append(time.perf_counter())

    def report(self, **found) -> None:
        """Print one line of JSON on stdout."""
        seconds = [end - begin for begin, end in zip(self.times[::2], self.times[1::2])]
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        else:  # not ru_maxrss, which starts at the value of the parent process
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            peak = int(status["VmHWM"].split()[0]) << 10
        print(json.dumps({"seconds": seconds, "peak": peak, **found}))
