"""`make demo`: the same unmodified TRL scripts with and without `flashpo run`, on arithmetic; any CPU, a few minutes.

It runs examples/sft.py and then, from the checkpoint of the stock run, examples/grpo.py; each of them stock and
accelerated with the same seeds. It prints a table and writes demo.png and demo.json. The time of a step is the median
of the times between the trainer's log lines, so it contains everything: data, generation, optimiser. demo_parts.py
times the LM head and generation separately.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
STOCK = [sys.executable]
FLASHPO = [sys.executable, "-m", "flashpo.run"]
FIRST_STEPS = 5  # not timed, because of allocations and cold caches
FOOTNOTE = """
The model is a small Qwen3 with random weights, 4 layers, hidden size 128 and a vocabulary of 2,048, of which the data
use 16: the head has the share of the work that it has in Qwen3-0.6B, but sequences of 20 tokens are far from real ones.
The head and generation were timed apart, their two variants interleaved. Two things favour FlashPO more than on a GPU
with a real model: on CPUs stock TRL also scores prompts and padding, and its tile is 32,768 columns wide whatever the
vocabulary, which costs memory and cache. The runs follow one another, so a busy machine distorts their ratios. Peak
memory is the whole process's, most of it libraries."""


class Run(NamedTuple):
    step_time: float  # seconds
    tokens_per_s: float
    peak_memory: float  # bytes, of the process
    loss: list[float]
    grad_norm: list[float]
    reward: list[float]


def environment() -> dict[str, str]:
    # OpenMP threads that spin take ten times as long if other processes use the CPU, too.
    passive = {"OMP_WAIT_POLICY": "PASSIVE"}
    return passive | os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def train(title: str, python: list[str], script: str, out: Path, steps: int, *args: str) -> Run:
    """Run the script in a separate process and read its progress from the log lines that the trainer prints."""
    out.mkdir(parents=True, exist_ok=True)
    command = [*python, EXAMPLES / script, "--output-dir", out, "--max-steps", str(steps), *args]
    times = []
    with open(out / "stderr.log", "w") as errors, tqdm(total=steps, desc=title, unit="step") as bar:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment())
        try:
            for line in process.stdout:
                if line.startswith("{'loss'"):
                    times.append(time.perf_counter())
                    bar.update()
        except BaseException:
            process.kill()
            raise
        _, status, usage = os.wait4(process.pid, 0)  # gives the peak memory of this child only
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        tail = (out / "stderr.log").read_text()[-3000:]
        raise SystemExit(f"{title} failed with status {process.returncode}; the end of {out / 'stderr.log'}:\n{tail}")

    history = [row for row in json.loads((out / "trainer_state.json").read_text())["log_history"] if "loss" in row]
    step_time = statistics.median(b - a for a, b in zip(times[FIRST_STEPS:], times[FIRST_STEPS + 1 :]))
    return Run(
        step_time,
        history[-1]["num_tokens"] / len(history) / step_time,
        usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        [row["loss"] for row in history],
        [row["grad_norm"] for row in history],
        [row["reward"] for row in history if "reward" in row],
    )


def part_times(checkpoint: Path) -> dict[str, tuple[float, float]]:
    """Median seconds of parts of a step, stock and accelerated."""
    command = [sys.executable, Path(__file__).with_name("demo_parts.py"), checkpoint]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment())
    return {name: tuple(pair) for name, pair in json.loads(result.stdout).items()}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def table(sft: list[Run], grpo: list[Run], parts: dict[str, tuple[float, float]]) -> str:
    lines = [f"{'':28s}{'stock TRL':>12s}{'flashpo run':>13s}{'ratio':>8s}"]

    def row(name: str, a: float, b: float, form: str, better: float | None = None) -> None:
        ratio = "" if better is None else f"{better:7.2f}x"
        lines.append(f"{name:28s}{form.format(a):>12s}{form.format(b):>13s}{ratio:>8s}")

    for kind, (a, b) in (("SFT", sft), ("GRPO", grpo)):
        row(f"{kind} step, ms", 1e3 * a.step_time, 1e3 * b.step_time, "{:.1f}", a.step_time / b.step_time)
        for name, pair in parts.items():
            if name.startswith(kind):
                row(f"{name}, ms", *(1e3 * seconds for seconds in pair), "{:.1f}", pair[0] / pair[1])
        row(f"{kind} tokens/s", a.tokens_per_s, b.tokens_per_s, "{:.0f}", b.tokens_per_s / a.tokens_per_s)
        peaks = [run.peak_memory / 2**20 for run in (a, b)]
        row(f"{kind} peak memory, MiB", *peaks, "{:.0f}", peaks[0] / peaks[1])
    row("SFT last loss", *(run.loss[-1] for run in sft), "{:.4f}")
    for when, part in (("first", slice(10)), ("last", slice(-10, None))):
        row(f"GRPO reward, {when} 10 steps", *(mean(run.reward[part]) for run in grpo), "{:.3f}")
    return "\n".join(lines)


def differences(sft: list[Run]) -> str:
    a, b = (run.loss for run in sft)

    def largest(steps: int) -> str:
        return f"{max(abs(x - y) for x, y in zip(a[:steps], b[:steps])):.1e}"

    return (
        f"SFT, largest difference of a step's loss: {largest(10)} in the first 10 steps,\n"
        f"{largest(50)} in 50, {largest(len(a))} in all {len(a)}: training amplifies what rounding began.\n"
        "GRPO: the engine draws by random numbers of its own, so its run is another sample: compare the rewards."
    )


def plot(path: Path, sft: list[Run], grpo: list[Run], parts: dict[str, tuple[float, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (rewards, losses, bars) = plt.subplots(1, 3, figsize=(15, 4))
    styles = ("stock TRL", "tab:gray", "-"), ("flashpo run", "tab:orange", "--")
    for of_sft, of_grpo, (name, colour, dashes) in zip(sft, grpo, styles):
        smooth = [mean(of_grpo.reward[max(0, i - 4) : i + 1]) for i in range(len(of_grpo.reward))]
        rewards.plot(of_grpo.reward, dashes, color=colour, alpha=0.25)
        rewards.plot(smooth, dashes, color=colour, label=name)
        losses.plot(of_sft.loss, dashes, color=colour, label=name)
    rewards.set(title="GRPO: reward (mean of 5 steps)", xlabel="step", ylim=(0, 1))
    losses.set(title="SFT: loss", xlabel="step", yscale="log")
    pairs = {
        "SFT step": [run.step_time for run in sft],
        "GRPO step": [run.step_time for run in grpo],
        **parts,
    }
    for i, (name, colour, _) in enumerate(styles):
        at = [x + (i - 0.5) * 0.4 for x in range(len(pairs))]
        drawn = bars.bar(at, [1e3 * pair[i] for pair in pairs.values()], 0.4, color=colour, label=name)
        bars.bar_label(drawn, fmt="%.0f")
    bars.set_xticks(range(len(pairs)), [name.replace(" ", "\n") for name in pairs])
    bars.set(title="Time, ms")
    bars.margins(y=0.15)
    for axes in (rewards, losses, bars):
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="flashpo.bench.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--sft-steps", type=int, default=250)
    parser.add_argument("--grpo-steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not EXAMPLES.is_dir():
        raise SystemExit(f"the demo runs the scripts of FlashPO's repository; there is no {EXAMPLES}")
    if min(args.sft_steps, args.grpo_steps) < FIRST_STEPS + 2:
        raise SystemExit(f"--sft-steps and --grpo-steps must be at least {FIRST_STEPS + 2}")
    out, seed = args.out, ("--seed", str(args.seed))
    subprocess.run([sys.executable, EXAMPLES / "arithmetic.py", out, *seed], check=True, stderr=subprocess.DEVNULL)

    def pair(script: str, steps: int, model: Path) -> list[Run]:
        return [
            train(f"{script} {name}", python, script, out / f"{script[:-3]}-{name}", steps, "--model", model, *seed)
            for name, python in (("stock", STOCK), ("flashpo", FLASHPO))
        ]

    sft = pair("sft.py", args.sft_steps, out / "model")
    checkpoint = out / "sft-stock"  # both GRPO runs start from it
    grpo = pair("grpo.py", args.grpo_steps, checkpoint)
    parts = part_times(checkpoint)
    print("\n" + table(sft, grpo, parts) + "\n\n" + differences(sft))
    print(FOOTNOTE)
    plot(out / "demo.png", sft, grpo, parts)
    results = {"sft": [r._asdict() for r in sft], "grpo": [r._asdict() for r in grpo], "part_seconds": parts}
    (out / "demo.json").write_text(json.dumps(results))
    print(f"wrote {out / 'demo.png'} and {out / 'demo.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
