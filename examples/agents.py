"""Two agents that learn from working together: two LoRA adapters, planner and worker, over one frozen base model.

The problem is a sum of three numbers. The planner speaks first and takes one addition off it; the worker reads the
conversation so far and finishes:

    3+4+6=      7+6=      13
    problem     planner   worker

The planner's reward is for the right result, for which it needs the worker. The worker's is for doing what the plan
says, be the plan right or wrong; a plan that is no sum cannot be judged. The base model imitates demonstrations half of
whose steps are wrong; that being right pays is for the agents to find out.

python examples/agents.py                  # a minute or two on two CPU cores; fails if an agent learns too little
"""

import argparse
import random
import re
from dataclasses import dataclass, field

import arithmetic
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import set_seed

import flashpo

AGENTS = ("planner", "worker")
LONGEST_TURN = 6  # tokens
LARGEST = 6
TOKENIZER = arithmetic.tokenizer()
STOP = {"planner": TOKENIZER.convert_tokens_to_ids("="), "worker": TOKENIZER.eos_token_id}


@dataclass
class Turn:
    """Tokens start to stop of a trajectory, and what they earned."""

    agent: str
    number: int  # of the turn in its conversation
    start: int
    stop: int
    reward: float = 0.0


@dataclass
class Trajectory:
    problem: int  # number of the problem in its batch: trajectories of one problem are compared
    answer: int
    tokens: list[int]
    turns: list[Turn] = field(default_factory=list)

    def text(self, turn: Turn) -> str:
        return TOKENIZER.decode(self.tokens[turn.start : turn.stop], skip_special_tokens=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A planner and a worker learn to add")
    parser.add_argument("--warm-start-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--problems", type=int, default=32, help="a step")
    parser.add_argument("--samples", type=int, default=8, help="trajectories of each problem")
    parser.add_argument("--updates", type=int, default=2, help="of each agent on the trajectories of a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--kl-coef", type=float, default=0.01)
    parser.add_argument("--margin", type=float, default=0.25, help="by which each agent's reward has to rise")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def demonstration(rng: random.Random) -> tuple[str, str]:
    """A problem and what planner and worker say, each of them right half of the time."""
    a, b, c = (rng.randint(1, LARGEST) for _ in range(3))
    partial = a + b + rng.choice([0, 0, 0, -1, 1, 2])
    result = partial + c + rng.choice([0, 0, 0, -1, 1, 2])
    return f"{a}+{b}+{c}=", f"{partial}+{c}={result}"


def warm_start(model, steps: int, seed: int) -> None:
    """Supervised training of the whole model on demonstrations."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=max(steps, 1))
    for _ in range(steps):
        rows = [demonstration(rng) for _ in range(64)]
        prompts, rest = ([TOKENIZER(text)["input_ids"] for text in column] for column in zip(*rows))
        tokens, real = padded([p + r + [TOKENIZER.eos_token_id] for p, r in zip(prompts, rest)])
        said = torch.arange(tokens.shape[1]) >= torch.tensor([len(p) for p in prompts])[:, None]
        mask = (real & said)[:, 1:]
        loss = -logprobs(model, tokens, real, mask).sum() / mask.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def padded(rows: list[list[int]], left: bool = False) -> tuple[Tensor, Tensor]:
    """(B, T) tokens, and which of them are real."""
    side = "left" if left else "right"
    batch = TOKENIZER.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"].bool()


def logprobs(model, tokens: Tensor, real: Tensor, mask: Tensor) -> Tensor:
    """(B, T - 1): the log-probability of each next token, 0 outside of the mask, where nothing is computed."""
    hidden = model.model(input_ids=tokens, attention_mask=real.long()).last_hidden_state
    target = tokens[:, 1:].where(mask, -100)
    return flashpo.linear_logprob(hidden[:, :-1], model.lm_head.weight, target, outputs=()).logprob


@torch.no_grad()
def speak(model, agent: str, trajectories: list[Trajectory]) -> None:
    """The agent's turn in every conversation."""
    model.set_adapter(agent)
    tokens, real = padded([t.tokens for t in trajectories], left=True)
    said = model.generate(
        input_ids=tokens,
        attention_mask=real.long(),
        do_sample=True,
        top_k=0,
        max_new_tokens=LONGEST_TURN,
        eos_token_id=STOP[agent],
        pad_token_id=TOKENIZER.pad_token_id,
    )[:, tokens.shape[1] :]
    for trajectory, row in zip(trajectories, said.tolist()):
        if STOP[agent] in row:
            row = row[: row.index(STOP[agent]) + 1]
        start = len(trajectory.tokens)
        trajectory.tokens += row
        trajectory.turns.append(Turn(agent, len(trajectory.turns), start, len(trajectory.tokens)))


def reward(trajectory: Trajectory) -> None:
    planner, worker = trajectory.turns
    plan = re.fullmatch(r"(\d+)\+(\d+)=", trajectory.text(planner))
    result = trajectory.text(worker)
    planner.reward = float(result == str(trajectory.answer))
    worker.reward = float(result == str(int(plan[1]) + int(plan[2]))) if plan else float("nan")


def rollout(model, problems: int, samples: int, rng: random.Random) -> list[Trajectory]:
    trajectories = []
    for problem in range(problems):
        terms = [rng.randint(1, LARGEST) for _ in range(3)]
        prompt = TOKENIZER("+".join(map(str, terms)) + "=")["input_ids"]
        trajectories += [Trajectory(problem, sum(terms), list(prompt)) for _ in range(samples)]
    for agent in AGENTS:
        speak(model, agent, trajectories)
    for trajectory in trajectories:
        reward(trajectory)
    return trajectories


def advantages(trajectories: list[Trajectory], tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(B, T - 1) each, of the next tokens: the advantage of the turn that said them, and each agent's mask.

    A turn is compared with the same turn of the same agent in the other conversations about the same problem.
    """
    turns = [(row, t.problem, turn) for row, t in enumerate(trajectories) for turn in t.turns]
    most = max(turn.number for *_, turn in turns) + 1
    keys = [(problem * len(AGENTS) + AGENTS.index(turn.agent)) * most + turn.number for _, problem, turn in turns]
    rewards = torch.tensor([turn.reward for *_, turn in turns])
    of_turn = flashpo.group_advantages(rewards, torch.tensor(keys)).advantage
    of_token = torch.zeros(tokens.shape)
    own = {agent: torch.zeros(tokens.shape, dtype=torch.bool) for agent in AGENTS}
    for (row, _, turn), value in zip(turns, of_turn):
        of_token[row, turn.start : turn.stop] = value
        own[turn.agent][row, turn.start : turn.stop] = True
    return of_token[:, 1:], {agent: mask[:, 1:] for agent, mask in own.items()}


def learn(
    model, agent: str, optimizer, trajectories: list[Trajectory], updates: int, kl_coef: float
) -> dict[str, float]:
    """Some updates of one agent's adapter by its own tokens; the metrics of the last."""
    tokens, real = padded([t.tokens for t in trajectories])
    advantage, own = advantages(trajectories, tokens)
    batch = tokens, real, own[agent]
    model.set_adapter(agent)
    with torch.no_grad():
        old = logprobs(model.get_base_model(), *batch)
        with model.disable_adapter():
            ref = logprobs(model.get_base_model(), *batch)
    for _ in range(updates):
        loss, stats = flashpo.policy_loss(
            logprobs(model.get_base_model(), *batch), old, advantage, own[agent], ref_logprob=ref, kl_coef=kl_coef
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    rewards = torch.tensor([turn.reward for t in trajectories for turn in t.turns if turn.agent == agent])
    clipped = (stats.clip_low + stats.clip_high).item()
    return {"reward": rewards.nanmean().item(), "loss": loss.item(), "kl": stats.kl.item(), "clipped": clipped}


def two_agents(base):
    """The base, frozen, with an adapter for each agent, and their optimizers' parameters."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config, adapter_name=AGENTS[0])
    for agent in AGENTS[1:]:
        model.add_adapter(agent, config)
    return model, {a: [p for n, p in model.named_parameters() if f".{a}." in n] for a in AGENTS}


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    set_seed(args.seed)
    base = arithmetic.model(vocab_size=len(TOKENIZER), hidden_size=64, layers=2, seed=args.seed)
    warm_start(base, args.warm_start_steps, args.seed)
    model, parameters = two_agents(base)
    optimizers = {agent: torch.optim.AdamW(parameters[agent], lr=args.learning_rate) for agent in AGENTS}

    rng = random.Random(args.seed + 1)
    rewards: dict[str, list[float]] = {agent: [] for agent in AGENTS}
    print("step  " + "  ".join(f"{agent:^32}" for agent in AGENTS))
    print("      " + "  ".join(f"{name:>8}" for _ in AGENTS for name in ("reward", "loss", "kl", "clipped")))
    for step in range(args.steps):
        trajectories = rollout(model, args.problems, args.samples, rng)
        numbers = []
        for agent in AGENTS:
            metrics = learn(model, agent, optimizers[agent], trajectories, args.updates, args.kl_coef)
            rewards[agent].append(metrics["reward"])
            numbers += metrics.values()
        if step % 5 == 0 or step == args.steps - 1:
            print(f"{step:4}  " + "  ".join(f"{x:8.3f}" for x in numbers), flush=True)

    window = max(1, min(5, args.steps // 3))
    rises = {a: sum(r[-window:]) / window - sum(r[:window]) / window for a, r in rewards.items()}
    for agent, rise in rises.items():
        print(f"{agent}'s reward rose by {rise:.2f}; wanted: {args.margin:.2f}")
    return int(min(rises.values()) < args.margin)


if __name__ == "__main__":
    raise SystemExit(main())
