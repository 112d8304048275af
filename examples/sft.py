"""Supervised fine-tuning with TRL on prompts and completions; the loss is on completions.

python examples/sft.py --model Qwen/Qwen3-0.6B --dataset my.jsonl        # or any local path, or a dataset of the hub
flashpo run examples/sft.py --model Qwen/Qwen3-0.6B --dataset my.jsonl   # the same, faster

Without a model at hand, for grpo.py and ppo.py to begin with:
python examples/arithmetic.py out/arithmetic && python examples/sft.py --model out/arithmetic/model
"""

import argparse
import os

import torch
from datasets import Dataset, load_dataset
from trl import SFTConfig, SFTTrainer


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Supervised fine-tuning")
    parser.add_argument("--model", required=True, help="a local path or a name on the hub")
    parser.add_argument("--dataset", help="a .jsonl file, a local path or a name on the hub; default: arithmetic")
    parser.add_argument("--output-dir", default="out/sft")
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load(args: argparse.Namespace) -> Dataset:
    if args.dataset is None:
        import arithmetic

        rows = arithmetic.problems(args.max_steps * args.batch_size, args.seed)
        return Dataset.from_list(rows).select_columns(["prompt", "completion"])
    if os.path.isfile(args.dataset):
        return load_dataset("json", data_files=args.dataset, split="train")
    return load_dataset(args.dataset, split="train")


def main() -> None:
    args = parse()
    config = SFTConfig(
        output_dir=args.output_dir,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=args.max_steps // 20,
        gradient_checkpointing=False,
        bf16=torch.cuda.is_available(),
        seed=args.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = SFTTrainer(model=args.model, args=config, train_dataset=load(args))
    trainer.train()
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
