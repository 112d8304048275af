"""GRPO with TRL on problems whose answers can be checked: prompts, and a column `answer`.

python examples/grpo.py --model out/sft                                  # the arithmetic of arithmetic.py
flashpo run examples/grpo.py --model out/sft                             # the same, faster
flashpo run examples/grpo.py --model Qwen/Qwen3-0.6B --dataset my.jsonl --max-completion-length 512
"""

import argparse
import os
import re

import torch
from datasets import Dataset, load_dataset
from trl import GRPOConfig, GRPOTrainer


def exact_answer(completions, answer, **kwargs) -> list[float]:
    """1 where the last number of a completion is the answer."""
    numbers = (re.findall(r"-?\d+(?:\.\d+)?", text(completion)) for completion in completions)
    return [float(found[-1:] == [right]) for found, right in zip(numbers, answer)]


def text(completion: str | list[dict]) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="GRPO with a verifiable reward")
    parser.add_argument("--model", required=True, help="a local path or a name on the hub")
    parser.add_argument("--dataset", help="a .jsonl file, a local path or a name on the hub; default: arithmetic")
    parser.add_argument("--output-dir", default="out/grpo")
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=128, help="completions a step")
    parser.add_argument("--num-generations", type=int, default=8, help="completions a prompt")
    parser.add_argument("--max-completion-length", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load(args: argparse.Namespace) -> Dataset:
    if args.dataset is None:
        import arithmetic

        prompts = args.max_steps * args.batch_size // args.num_generations
        rows = arithmetic.problems(prompts, args.seed + 1)  # not those of sft.py
        return Dataset.from_list(rows).select_columns(["prompt", "answer"])
    if os.path.isfile(args.dataset):
        return load_dataset("json", data_files=args.dataset, split="train")
    return load_dataset(args.dataset, split="train")


def main() -> None:
    args = parse()
    config = GRPOConfig(
        output_dir=args.output_dir,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        num_generations=args.num_generations,
        max_completion_length=args.max_completion_length,
        learning_rate=args.learning_rate,
        gradient_checkpointing=False,
        bf16=torch.cuda.is_available(),
        seed=args.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = GRPOTrainer(model=args.model, reward_funcs=exact_answer, args=config, train_dataset=load(args))
    trainer.train()
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
