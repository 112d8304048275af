"""A GRPO step of one TRL script on one GPU machine: TRL with vLLM in its process, and `flashpo run`.

    python bench/vllm_peer.py MODEL [--prompt 2048] [--new 512] [--prompts 1] [--steps 6] [--seeds 3]

It needs a GPU, TRL and vLLM. MODEL is a folder or a name that both can load. The two run in turn, seed by seed, and the
time of a step is the median of all steps but the first of each run. Unverified: it was written without a GPU.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPT = Path(__file__).with_name("step_script.py")
VARIANTS = {
    "TRL with vLLM": ([sys.executable], "--use-vllm"),
    "flashpo run": ([sys.executable, "-m", "flashpo.run"], ""),
}


def main() -> int:
    from flashpo.bench.grpo_step import run

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for name, default in (("prompt", 2048), ("new", 512), ("prompts", 1), ("steps", 6), ("seeds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    peaks: dict[str, list[int]] = {name: [] for name in VARIANTS}
    for seed in range(args.seeds):
        for name, (command, how) in VARIANTS.items():
            with tempfile.TemporaryDirectory() as out:
                settings = args.prompts, args.prompt, args.new, args.steps, seed, 1e-6, how
                done = run(command, SCRIPT, args.model, out, *settings)
            seconds[name] += done.seconds[1:]
            peaks[name].append(done.peak)
            print(f"seed {seed}, {name}: {statistics.median(done.seconds[1:]):.2f} s a step", flush=True)
    ours = statistics.median(seconds["flashpo run"])
    print(
        f"\n{subprocess.check_output(['nvidia-smi', '--query-gpu=name', '--format=csv,noheader'], text=True).strip()}"
    )
    for name, times in seconds.items():
        median, peak = statistics.median(times), statistics.median(peaks[name]) / 2**30
        print(f"{name:15} {median:8.2f} s a step, {median / ours:5.2f} times FlashPO's, peak {peak:.1f} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
