"""A model with a calculator: where it writes a sum and "=", the result is put into its mouth and it goes on.

The conversations of a step take their turns together. Within a session everything said so far stays in the KV cache,
so that a turn costs its new tokens only. `spoken` marks what the model said itself: the tokens to train on.

python examples/tool_turns.py --model Qwen/Qwen3-0.6B --prompt "2 dozen and 17 make, written as a sum: "
"""

import argparse
import re
from dataclasses import dataclass, field

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flashpo.rollout import RolloutEngine, RolloutStats, SamplingParams


@dataclass
class Conversation:
    tokens: list[int]
    spoken: list[bool]
    logprobs: list[float] = field(default_factory=list)  # of the spoken tokens


def calculator(text: str) -> str | None:
    """What follows "12+3=": None where no sum has been asked for."""
    terms = re.search(r"(\d+(?: ?\+ ?\d+)+) ?=$", text)
    return terms and str(sum(map(int, terms[1].split("+"))))


def converse(
    engine: RolloutEngine, prompts: list[list[int]], n: int, turns: int, longest_turn: int, seed: int
) -> tuple[list[Conversation], list[RolloutStats]]:
    """n conversations of each prompt, and what each turn cost."""
    conversations = [Conversation(list(prompt), [False] * len(prompt)) for prompt in prompts for _ in range(n)]
    talking, stats = conversations, []
    with engine.session():
        for turn in range(turns):
            params = SamplingParams(
                max_new_tokens=longest_turn,
                stop_strings=["="],
                stop_token_ids=[engine.tokenizer.eos_token_id],
                seed=seed + turn,
            )
            said = engine.generate([conversation.tokens for conversation in talking], params)
            stats.append(said.stats)
            for conversation, tokens, logprobs in zip(talking, said.completion_ids, said.logprobs):
                conversation.tokens += tokens
                conversation.spoken += [True] * len(tokens)
                conversation.logprobs += logprobs
            talking = [conversation for conversation in talking if tell_result(engine.tokenizer, conversation)]
            if not talking:
                break
    return conversations, stats


def tell_result(tokenizer, conversation: Conversation) -> bool:
    """Appends the calculator's answer to the conversation, if it has asked for one."""
    result = calculator(tokenizer.decode(conversation.tokens))
    if result is None:
        return False
    tokens = tokenizer(result, add_special_tokens=False)["input_ids"]
    conversation.tokens += tokens
    conversation.spoken += [False] * len(tokens)
    return True


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Conversations with a calculator")
    parser.add_argument("--model", required=True, help="a local path or a name on the hub")
    parser.add_argument("--prompt", action="append", required=True, help="may be given several times")
    parser.add_argument("--n", type=int, default=8, help="conversations of a prompt")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--longest-turn", type=int, default=64, help="tokens")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    engine = RolloutEngine(model, tokenizer=tokenizer)
    prompts = tokenizer(args.prompt)["input_ids"]
    conversations, stats = converse(engine, prompts, args.n, args.turns, args.longest_turn, args.seed)
    for conversation in conversations:
        print(repr(tokenizer.decode(conversation.tokens)))
    for turn, cost in enumerate(stats):
        print(
            f"turn {turn}: {cost.tokens} tokens at {cost.tokens_per_second:.0f} a second; "
            f"{cost.prefill_tokens} prompt tokens computed, {cost.prefill_tokens_saved} found in the cache"
        )


if __name__ == "__main__":
    main()
