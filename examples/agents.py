"""Two agents that learn from working together: two LoRA adapters, planner and worker, over one frozen base model.

The problem is a sum of three numbers. The planner speaks first and takes one addition off it; the worker reads the
conversation so far and finishes. A problem gets several plans, and each plan several results:

    3+4+6= --> 7+6= --> 13
           |        --> 12
           --> 8+6= --> 14
                    --> 14
    problem    planner  worker

The planner's reward is for right results, for which it needs the worker. The worker's is for doing what the plan says,
be the plan right or wrong; a plan that is no sum cannot be judged. A turn is compared with the others that answer the
same conversation. The base model imitates demonstrations half of whose steps are wrong; that being right pays is for
the agents to find out.

What the turns of an agent have in common is computed once, in rollout and training: FlashPO finds it in the tokens.

python examples/agents.py                  # half a minute on two CPU cores; fails if an agent learns too little
"""

import argparse
import random
import re
from dataclasses import dataclass
from statistics import mean

import arithmetic
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import set_seed

import flashpo
from flashpo.rollout import RolloutEngine, SamplingParams

AGENTS = ("planner", "worker")
LONGEST_TURN = 6  # tokens
LARGEST = 6
TOKENIZER = arithmetic.tokenizer()
STOP = {"planner": TOKENIZER.convert_tokens_to_ids("="), "worker": TOKENIZER.eos_token_id}


@dataclass
class Turn:
    """What an agent said in a conversation, and what it earned by that."""

    conversation: int  # number of the conversation that it answers
    before: list[int]  # that conversation
    tokens: list[int]
    logprobs: list[float]  # with which these were sampled
    reward: float = 0.0

    @property
    def text(self) -> str:
        return TOKENIZER.decode(self.tokens, skip_special_tokens=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A planner and a worker learn to add")
    parser.add_argument("--warm-start-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--problems", type=int, default=32, help="a step")
    parser.add_argument("--plans", type=int, default=4, help="of each problem")
    parser.add_argument("--results", type=int, default=4, help="of each plan")
    parser.add_argument("--updates", type=int, default=2, help="of each agent on its turns of a step")
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
        problems, said = zip(*(demonstration(rng) for _ in range(64)))
        prompts, rest = (TOKENIZER(list(texts))["input_ids"] for texts in (problems, said))
        tokens, real, mask = padded(prompts, [[*ids, TOKENIZER.eos_token_id] for ids in rest])
        loss = model(input_ids=tokens, attention_mask=real, labels=tokens.where(mask, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def padded(before: list[list[int]], said: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Conversations as (B, T) tokens; which of them are real, and which are those that were said last."""
    rows = [old + new for old, new in zip(before, said)]
    batch = TOKENIZER.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    tokens, real = batch["input_ids"], batch["attention_mask"]
    new = torch.arange(tokens.shape[1]) >= torch.tensor([len(old) for old in before])[:, None]
    return tokens, real, new & real.bool()


def speak(engine: RolloutEngine, agent: str, conversations: list[list[int]], n: int, seed: int) -> list[Turn]:
    """n turns of the agent in each conversation."""
    params = SamplingParams(n=n, max_new_tokens=LONGEST_TURN, stop_token_ids=[STOP[agent]], seed=seed)
    said = engine.generate(conversations, params, adapters=[agent] * len(conversations))
    return [Turn(*turn) for turn in zip(said.prompt_index, said.prompt_ids, said.completion_ids, said.logprobs)]


def rollout(
    engine: RolloutEngine, problems: int, plans: int, results: int, rng: random.Random
) -> dict[str, list[Turn]]:
    """The turns of each agent: `plans` of each problem, `results` of each plan."""
    terms = [[rng.randint(1, LARGEST) for _ in range(3)] for _ in range(problems)]
    prompts = TOKENIZER(["+".join(map(str, numbers)) + "=" for numbers in terms])["input_ids"]
    planned = speak(engine, "planner", prompts, plans, rng.randrange(2**62))
    worked = speak(engine, "worker", [t.before + t.tokens for t in planned], results, rng.randrange(2**62))
    for i, plan in enumerate(planned):
        reward(str(sum(terms[plan.conversation])), plan, worked[i * results : (i + 1) * results])
    return {"planner": planned, "worker": worked}


def reward(answer: str, plan: Turn, results: list[Turn]) -> None:
    """Of a plan, by the results that it led to, and of these."""
    plan.reward = mean(float(result.text == answer) for result in results)
    terms = re.fullmatch(r"(\d+)\+(\d+)=", plan.text)
    for result in results:
        result.reward = float(result.text == str(int(terms[1]) + int(terms[2]))) if terms else float("nan")


def learn(model, agent: str, optimizer, turns: list[Turn], updates: int, kl_coef: float) -> dict[str, float]:
    """Some updates of one agent's adapter by its own turns; the metrics of the last."""
    rewards = torch.tensor([turn.reward for turn in turns])
    advantage = flashpo.group_advantages(rewards, torch.tensor([turn.conversation for turn in turns])).advantage
    tokens, real, mask = padded([turn.before for turn in turns], [turn.tokens for turn in turns])
    tree = flashpo.pack(tokens, real, mask)
    old = torch.zeros(mask.shape).masked_scatter(mask, torch.tensor([x for turn in turns for x in turn.logprobs]))
    model.set_adapter(agent)
    with torch.no_grad(), model.disable_adapter():
        ref = flashpo.score(model, tree, outputs=()).logprob
    for _ in range(updates):
        logprob = flashpo.score(model, tree, outputs=()).logprob
        loss, stats = flashpo.policy_loss(logprob, old, advantage, mask, ref_logprob=ref, kl_coef=kl_coef)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
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
    engine = RolloutEngine(model, fallback="error")

    rng = random.Random(args.seed + 1)
    rewards: dict[str, list[float]] = {agent: [] for agent in AGENTS}
    print("step  " + "  ".join(f"{agent:^32}" for agent in AGENTS))
    print("      " + "  ".join(f"{name:>8}" for _ in AGENTS for name in ("reward", "loss", "kl", "clipped")))
    for step in range(args.steps):
        turns = rollout(engine, args.problems, args.plans, args.results, rng)
        numbers = []
        for agent in AGENTS:
            metrics = learn(model, agent, optimizers[agent], turns[agent], args.updates, args.kl_coef)
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
