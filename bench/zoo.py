"""`make zoo`: every algorithm from the same checkpoint, with the same seeds and tokens, on answers that a program can
check.

A small model first imitates sums, half of which stop before the result (examples/arithmetic.py). From there each
algorithm takes --steps optimisation steps of 64 sequences (DPO: 32 pairs). SFT trains on complete sums, DPO on complete
ones against spoiled ones, and the others on what the model itself writes, rewarded by exact match. distil has no reward
but a teacher, which is the model with which sft ended. judged is GRPO with a reward model, which was trained on
complete sums against spoiled ones. The reward model misses some wrong numbers, so a penalty on the distance from the
start keeps the policy near what it can judge. All have the same budget of tokens, including prompts and discarded
completions. DAPO replaces groups of equal rewards, so it takes fewer steps. The plotted reward is that of held-out
problems, sampled at temperature 1 with a fixed seed.

python -m flashpo.bench.zoo                    # sft dpo ppo grpo dapo gspo rloo cispo distil judged
python -m flashpo.bench.zoo gmpo sapo          # any name of flashpo.LOSSES
"""

import argparse
import importlib
import json
import random
import re
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from tqdm import tqdm

import flashpo
from flashpo.bench.run import machine, show

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("sft", "dpo", "ppo", "grpo", "dapo", "gspo", "rloo", "cispo", "distil", "judged")
NEEDS = {"distil": "sft", "judged": "reward"}  # what is trained first if it has not been trained
SEQUENCES = 64  # per step
GENERATIONS = 8  # completions per prompt
LONGEST = 16  # tokens per completion
TOKENS = 870  # per step; a little more than SEQUENCES have
MARGIN = 0.1  # each must end above its start by this much
HELD_OUT = 512


def arithmetic():
    if not (ROOT / "examples").is_dir():
        raise SystemExit(f"the zoo runs in FlashPO's repository, on its examples; there is no {ROOT / 'examples'}")
    sys.path.insert(0, str(ROOT / "examples"))
    return importlib.import_module("arithmetic")


def exact_answer(completions, answer, **kwargs) -> list[float]:
    """1 if the last number of a completion is the answer."""
    return [float(re.findall(r"\d+", text)[-1:] == [right]) for text, right in zip(completions, answer)]


class Curve(transformers.TrainerCallback):
    """Records the reward on held-out problems, at the start and every few steps."""

    def __init__(self, rows: list[dict], tokenizer, every: int, bar: tqdm):
        self.rows, self.tokenizer, self.every, self.bar = rows, tokenizer, every, bar
        self.steps: list[int] = []
        self.rewards: list[float] = []

    def measure(self, model, step: int) -> None:
        inputs = self.tokenizer([row["prompt"] for row in self.rows], return_tensors="pt", padding=True)
        training = model.training
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            model.eval()
            ids = model.generate(
                **inputs.to(model.device), max_new_tokens=LONGEST, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
            )
            model.train(training)
        texts = self.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        rewards = exact_answer(texts, [row["answer"] for row in self.rows])
        self.steps.append(step)
        self.rewards.append(sum(rewards) / len(rewards))
        self.bar.set_postfix(reward=f"{self.rewards[-1]:.3f}")

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.measure(model, 0)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.bar.update()
        if state.global_step % self.every == 0:
            self.measure(model, state.global_step)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.steps[-1] != state.global_step:
            self.measure(model, state.global_step)


class Budget(transformers.TrainerCallback):
    """Ends training before the steps that, at the rate so far, would exceed the budget of tokens."""

    def __init__(self, tokens: int):
        self.tokens, self.spent = tokens, 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.spent = logs.get("num_tokens", self.spent)  # logged when something was generated
        together = getattr(args, "steps_per_generation", 1)  # optimisation steps that share one generation
        if state.global_step % together == 0:
            control.should_training_stop |= self.spent * (1 + together / state.global_step) > self.tokens


def config(kind: type, out: Path, steps: int, seed: int, rows: int = SEQUENCES, **options):
    return kind(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=rows, seed=seed, logging_steps=1,
        gradient_checkpointing=False, bf16=False, use_cpu=not torch.cuda.is_available(), save_strategy="no",
        report_to="none", disable_tqdm=True, **options,
    )  # fmt: skip


def trainer(name: str, model: Path, out: Path, steps: int, seed: int):
    """Data in TRL's format, and our trainer class."""
    sums, fast = arithmetic(), importlib.import_module("flashpo.trl")
    rows = sums.problems(steps * SEQUENCES, seed + 1)
    if name in ("start", "sft"):
        if name == "sft":
            rows = [row | {"completion": sums.totals(row["prompt"])} for row in rows]
        data = Dataset.from_list(rows).select_columns(["prompt", "completion"])
        rate = {"learning_rate": 2e-3 if name == "start" else 2e-4, "lr_scheduler_type": "cosine"}
        return fast.SFTTrainer(str(model), config(trl_config("SFT"), out, steps, seed, **rate), train_dataset=data)
    if name in ("dpo", "reward"):
        rng = random.Random(seed)
        prompts = [row["prompt"] for row in rows[: len(rows) // 2]]
        pairs = [{"prompt": p, "chosen": sums.totals(p), "rejected": sums.spoiled(p, rng)} for p in prompts]
    if name == "reward":
        # TRL ends the texts from which a reward model learns with <eos>, but omits it where GRPO asks the model. So the
        # tokens are given as they are
        ids, characters = ("chosen", "rejected"), sums.tokenizer()
        data = [{f"{i}_ids": characters(pair["prompt"] + pair[i])["input_ids"] for i in ids} for pair in pairs]
        rate = {"learning_rate": 1e-3, "lr_scheduler_type": "cosine"}
        args = config(fast.RewardConfig, out, steps, seed, SEQUENCES // 2, **rate)
        return fast.RewardTrainer(str(model), args, train_dataset=Dataset.from_list(data))
    if name == "dpo":
        args = config(trl_config("DPO"), out, steps, seed, SEQUENCES // 2, learning_rate=3e-5, beta=0.3)
        return fast.DPOTrainer(str(model), args=args, train_dataset=Dataset.from_list(pairs))
    data = Dataset.from_list(rows).select_columns(["prompt", "answer"])
    if name == "distil":
        options = dict(learning_rate=3e-4, max_completion_length=LONGEST, num_generations=GENERATIONS)
        args = config(fast.DistillationConfig, out, steps, seed, **options)
        return fast.DistillationTrainer(str(model), str(out.parent / NEEDS[name]), args, data)
    online = dict(
        learning_rate=3e-4, max_completion_length=LONGEST, steps_per_generation=2, num_generations=GENERATIONS
    )
    if name == "ppo":
        # So that it gets as many fresh tokens as the others
        made = fast.PPOTrainer, fast.PPOConfig, online | {"num_iterations": 1}
    elif name == "rloo":
        made = fast.RLOOTrainer, fast.RLOOConfig, online | {"beta": 0.0}
    else:
        made = fast.GRPOTrainer, fast.GRPOConfig, online | {"loss": name} | ONLINE.get(name, {})
    kind, of_kind, options = made
    args = config(of_kind, out, steps, seed, **options)
    reward = str(out.parent / NEEDS[name]) if name in NEEDS else exact_answer
    return kind(str(model), reward_funcs=reward, args=args, train_dataset=data)


ONLINE: dict[str, dict] = {
    "dapo": {"dynamic_sampling": 1},
    "judged": {"loss": "grpo", "beta": 1.0, "learning_rate": 1e-4},
}


def trl_config(name: str) -> type:
    return getattr(importlib.import_module("trl"), f"{name}Config")


def train(made, out: Path, *callbacks: transformers.TrainerCallback) -> float:
    """Train, and return the seconds that it took. Afterwards the model is in `out`."""
    for callback in callbacks:
        made.add_callback(callback)
    made.remove_callback(transformers.PrinterCallback)
    start = time.perf_counter()
    made.train()
    seconds = time.perf_counter() - start
    made.save_model(str(out))
    return seconds


def learn(name: str, model: Path, out: Path, steps: int, seed: int, measurements: int = 12) -> tuple[dict, Curve]:
    with tqdm(total=steps, desc=name, unit="step") as bar:
        made = trainer(name, model, out, steps, seed)
        sums = arithmetic()
        curve = Curve(sums.problems(HELD_OUT, seed + 10**6), sums.tokenizer(), -(-steps // measurements), bar)
        seconds = train(made, out, curve, Budget(steps * TOKENS))
    tokens = max(row.get("num_tokens", 0) for row in made.state.log_history)
    record = {
        "variant": name,
        "reward at start": curve.rewards[0],
        "reward at end": curve.rewards[-1],
        "reward gain": curve.rewards[-1] - curve.rewards[0],
        "steps": made.state.global_step,
        "tokens": tokens,
        "s": seconds,
    }
    return record, curve


def learn_to_judge(model: Path, out: Path, steps: int, seed: int) -> None:
    made = trainer("reward", model, out, steps, seed)
    seconds = train(made, out)
    accuracy = statistics.mean([row["accuracy"] for row in made.state.log_history if "accuracy" in row][-10:])
    print(f"the reward model took {seconds:.0f} s; of its last pairs it judged {accuracy:.0%} rightly")


def plot(curves: dict[str, Curve], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for name, curve in curves.items():
        axes.plot(curve.steps, curve.rewards, marker=".", label=name)
    axes.set(xlabel=f"steps of {SEQUENCES} sequences", ylabel="share of right answers, held out", ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="flashpo.bench.zoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=list(NAMES), help=f"default: {' '.join(NAMES)}")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--start-steps", type=int, default=250, help="of the imitation that all begin with")
    parser.add_argument("--margin", type=float, default=MARGIN, help="by which each must gain reward")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/zoo"))
    parser.add_argument("--record", type=Path, metavar="FILE", help="append the table to this .jsonl file")
    args = parser.parse_args(argv)
    if unknown := [n for n in args.names if n not in (*NAMES, *flashpo.LOSSES)]:
        parser.error(f"unknown algorithms {unknown}; known: {', '.join(dict.fromkeys((*NAMES, *flashpo.LOSSES)))}")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    base = arithmetic().save(args.out / "model", seed=args.seed)
    begin, _ = learn("start", base, args.out / "start", args.start_steps, args.seed, measurements=1)
    records, curves, done = [], {}, set()
    for name in args.names:
        if (needed := NEEDS.get(name)) and needed not in done:
            prepare = learn_to_judge if needed == "reward" else partial(learn, needed, measurements=1)
            prepare(args.out / "start", args.out / needed, args.steps, args.seed)
        done |= {name, needed}
        record, curves[name] = learn(name, args.out / "start", args.out / name, args.steps, args.seed)
        records.append(record)
    title = f"zoo: up to {args.steps} steps of {SEQUENCES} sequences, {args.steps * TOKENS} tokens"
    show(title, records)
    plot(curves, args.out / "zoo.png")
    document = {
        **machine("cpu"),
        "command": "python -m flashpo.bench.zoo " + " ".join(sys.argv[1:] if argv is None else argv),
    }
    document["tables"] = {title: records}
    (args.out / "zoo.json").write_text(json.dumps(document))
    if args.record:
        with args.record.open("a") as file:
            file.write(json.dumps(document) + "\n")
    print(f"imitation took {begin['s']:.0f} s; wrote {args.out / 'zoo.png'} and {args.out / 'zoo.json'}")
    late = [r["variant"] for r in records if r["reward gain"] < args.margin]
    if late:
        print(f"gained less than {args.margin}: {', '.join(late)}", file=sys.stderr)
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
