"""examples/tool_turns.py: what the calculator answers, which tokens the model wrote, and the cost of a later turn."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from flashpo.rollout import RolloutEngine

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import arithmetic
import tool_turns

sys.path.pop(0)


@pytest.mark.parametrize(
    ("text", "result"), [("3+4=", "7"), ("is 12 + 30 +1 =", "43"), ("3+4", None), ("4=", None), ("3+4=7", None)]
)
def test_the_calculator_answers_sums_only(text, result):
    assert tool_turns.calculator(text) == result


def test_turns_cost_their_new_tokens_and_mark_who_spoke():
    tokenizer = arithmetic.tokenizer()
    model = arithmetic.model(vocab_size=len(tokenizer), hidden_size=32, layers=1).eval()
    prompts = tokenizer(["3+4", "3+4+1"])["input_ids"]
    conversations, stats = tool_turns.converse(
        RolloutEngine(model, tokenizer=tokenizer, fallback="error"), prompts, n=32, turns=3, longest_turn=12, seed=0
    )
    assert len(stats) > 1, "the calculator was never asked"
    assert len(conversations) == 64
    new = 0
    for conversation in conversations:
        spoken = torch.tensor(conversation.spoken)
        tokens = torch.tensor([conversation.tokens])
        with torch.no_grad():
            logprobs = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        assert torch.tensor(conversation.logprobs) == pytest.approx(logprobs[spoken[1:]], abs=1e-5)
        told = [i for i in range(1, len(spoken)) if not spoken[i] and spoken[i - 1]]
        for i in told:
            said = tokenizer.decode(tokens[0, :i])
            result = tool_turns.calculator(said)
            assert tokenizer.decode(tokens[0, i : i + len(result)]) == result
            assert not spoken[i : i + len(result)].any()
            new += 1 + len(result)  # the "=" had not been fed when its turn ended
    assert 0 < sum(turn.prefill_tokens for turn in stats[1:]) <= new
    assert stats[1].prefill_tokens_saved > 0
