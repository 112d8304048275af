"""PPO, an actor and a critic, on problems whose answers can be checked; the data and the reward are grpo.py's.

python examples/ppo.py --model out/sft                                   # the arithmetic of arithmetic.py
python examples/ppo.py --model Qwen/Qwen3-0.6B --dataset my.jsonl --critic separate --max-completion-length 512
"""

import argparse

import torch
from grpo import exact_answer, load

from flashpo.trl import PPOConfig, PPOTrainer


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="PPO with a verifiable reward")
    parser.add_argument("--model", required=True, help="a local path or a name on the hub")
    parser.add_argument("--critic", default="shared", help="shared, separate, or a path or name of a model")
    parser.add_argument("--dataset", help="a .jsonl file, a local path or a name on the hub; default: arithmetic")
    parser.add_argument("--output-dir", default="out/ppo")
    parser.add_argument("--max-steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=64, help="completions a step")
    parser.add_argument("--minibatches", type=int, default=2, help="steps an epoch")
    parser.add_argument("--epochs", type=int, default=2, help="over each batch of generations")
    parser.add_argument("--max-completion-length", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.num_generations = 1  # of a prompt: the critic is the baseline
    return args


def main() -> None:
    args = parse()
    config = PPOConfig(
        output_dir=args.output_dir,
        critic=args.critic,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        steps_per_generation=args.minibatches,
        num_iterations=args.epochs,
        max_completion_length=args.max_completion_length,
        learning_rate=args.learning_rate,
        gradient_checkpointing=False,
        bf16=torch.cuda.is_available(),
        seed=args.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = PPOTrainer(model=args.model, reward_funcs=exact_answer, args=config, train_dataset=load(args))
    trainer.train()
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
