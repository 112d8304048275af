"""Sums with their running totals, "3+4+6=" -> "7,13": data whose answers a program can check, and a model for it.

Half of the completions stop before the last number. Who imitates them is right half the time; that finishing pays is
for GRPO to find out.

python examples/arithmetic.py OUT      writes OUT/model (random weights, with its tokenizer) and OUT/train.jsonl
"""

import argparse
import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed

ALPHABET = "0123456789+=,"
TERMS = 3, 4  # fewest and most numbers in a sum
LARGEST = 6


def problem(rng: random.Random) -> dict[str, str]:
    """A prompt, a completion with the running totals that may stop one too early, and the right answer."""
    terms = [rng.randint(1, LARGEST) for _ in range(rng.randint(*TERMS))]
    totals = [sum(terms[:n]) for n in range(2, len(terms) + 1)]
    shown = totals[: len(totals) - rng.randint(0, 1)]
    return {
        "prompt": "+".join(map(str, terms)) + "=",
        "completion": ",".join(map(str, shown)),
        "answer": str(totals[-1]),
    }


def totals(prompt: str) -> str:
    """The complete completion of a prompt."""
    terms = [int(term) for term in prompt.rstrip("=").split("+")]
    return ",".join(str(sum(terms[:n])) for n in range(2, len(terms) + 1))


def spoiled(prompt: str, rng: random.Random) -> str:
    """One that stops short, or ends in a wrong number."""
    *kept, last = totals(prompt).split(",")
    return ",".join(kept if rng.random() < 0.5 else [*kept, str(int(last) + rng.choice([-2, -1, 1, 2]))])


def problems(count: int, seed: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [problem(rng) for _ in range(count)]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    special = ["<pad>", "<eos>", "<unk>"]
    vocab = {token: i for i, token in enumerate([*special, *ALPHABET])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def model(vocab_size: int = 2048, hidden_size: int = 128, layers: int = 4, seed: int = 0) -> Qwen3ForCausalLM:
    """A small Qwen3 with random weights; a vocabulary beyond the alphabet gives the LM head its share of a real model.

    With the defaults the head holds 25 % of the weights that a token is multiplied with; in Qwen3-0.6B it is 26 %.
    """
    set_seed(seed)
    characters = tokenizer()
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.09,  # transformers' 0.02 suits hidden sizes above 1,000
        pad_token_id=characters.pad_token_id,
        eos_token_id=characters.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def save(directory: str | Path, **config) -> Path:
    """`model(**config)` and the tokenizer, as `from_pretrained` reads them."""
    directory = Path(directory)
    model(**config).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the arithmetic model and its data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    path = save(args.out / "model", seed=args.seed)
    data = args.out / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in problems(args.count, args.seed)))
    print(f"wrote {path} and {data}")


if __name__ == "__main__":
    main()
