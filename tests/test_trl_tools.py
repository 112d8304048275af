"""TRL's own loop of tool calls on the engine: TRL gets the turns it expects, and a turn costs only its new tokens.

The model has learned two conversations almost by heart, so that it really calls the tool twice before it answers.
"""

import copy
import functools
import itertools
import math
import tempfile

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import chat_template_utils

import flashpo.trl
from flashpo.rollout import RolloutEngine
from flashpo.trl.patch import patched

SPECIAL = ["<pad>", "<|im_end|>", "<|im_start|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
QUESTIONS = ("1+2+4", "3+2+1")  # of one length
GREEDY = dict(generation_kwargs={"do_sample": False})


@pytest.fixture(autouse=True)
def within_a_step(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    with patched():
        yield


def add(a: int, b: int) -> int:
    """Adds.

    Args:
        a: a number
        b: a number
    """
    return a + b


def call(a: int, b: int) -> dict:
    function = {"name": "add", "arguments": {"a": a, "b": b}}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def conversation(question: str) -> list[dict]:
    a, b, c = map(int, question.split("+"))
    results = [{"role": "tool", "name": "add", "content": str(n)} for n in (a + b, a + b + c)]
    answer = {"role": "assistant", "content": f"It is {a + b + c}"}
    return [{"role": "user", "content": question}, call(a, b), results[0], call(a + b, c), results[1], answer]


@functools.cache
def learnt() -> tuple[str, PreTrainedTokenizerFast]:
    """The folder of a model that knows the conversations, and its tokenizer: bytes, merged where they repeat."""
    base = Tokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    base.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    base.train_from_iterator([chat_template_utils.qwen3_chat_template, str(conversation(QUESTIONS[0]))], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, pad_token="<pad>", eos_token="<|im_end|>")
    tokenizer.chat_template = chat_template_utils.qwen3_chat_template
    template = chat_template_utils.get_training_chat_template(tokenizer)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=1024,
            tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )  # fmt: skip
    said = [
        tokenizer.apply_chat_template(
            conversation(q), tools=[add], chat_template=template, return_assistant_tokens_mask=True, return_dict=True
        )
        for q in QUESTIONS
    ]
    ids = torch.tensor([x["input_ids"] for x in said])
    labels = ids.where(torch.tensor([x["assistant_masks"] for x in said]) == 1, -100)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(200):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1
    folder = tempfile.mkdtemp(prefix="flashpo-tools-")
    model.save_pretrained(folder)
    return folder, tokenizer


def make_trainer(rollout: str, **options):
    folder, tokenizer = learnt()
    environment = {"environment_factory": options.pop("environment_factory", None)}
    tools = {} if environment["environment_factory"] else {"tools": [add], "reward_funcs": calls_of}
    config = flashpo.trl.GRPOConfig(
        tempfile.mkdtemp(prefix="flashpo-out-"), use_cpu=True, bf16=False, report_to="none", save_strategy="no",
        disable_tqdm=True, logging_steps=1, per_device_train_batch_size=4, num_generations=2,
        max_completion_length=240, learning_rate=1e-3, gradient_checkpointing=False, rollout=rollout,
        rollout_options={"check": False} if rollout == "engine" else None, **{"max_steps": 1} | options,
    )  # fmt: skip
    return flashpo.trl.GRPOTrainer(
        model=Qwen3ForCausalLM.from_pretrained(folder),
        args=config,
        processing_class=copy.deepcopy(tokenizer),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": q}]} for q in QUESTIONS]),
        **tools,
        **environment,
    )


def calls_of(completions, **kwargs) -> list[float]:
    return [float(sum(bool(message.get("tool_calls")) for message in messages)) for messages in completions]


@pytest.fixture
def turns(monkeypatch):
    """The rollouts of each turn."""
    seen = []
    generate = RolloutEngine.generate

    def watched(self, prompts, params, **kwargs):
        seen.append(generate(self, prompts, params, **kwargs))
        return seen[-1]

    monkeypatch.setattr(RolloutEngine, "generate", watched)
    return seen


def prompts() -> list[list[dict]]:
    return [[{"role": "user", "content": q}] for q in QUESTIONS for _ in range(2)]


def generate(trainer) -> tuple[tuple, dict]:
    """What TRL's `_generate` returns for the prompts, and the batch that it becomes."""
    seen, method = [], trainer._generate
    trainer._generate = lambda *args: seen.append(method(*args)) or seen[-1]
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts()])
    return seen[0], batch


def logprobs_of(model, prompt, completion):
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def assert_logprobs(trainer, generated):
    prompt_ids, completion_ids, tool_mask, _, logprobs, *_ = generated
    trainer.model.eval()
    for prompt, completion, mask, ours in zip(prompt_ids, completion_ids, tool_mask, logprobs):
        expected = logprobs_of(trainer.model, prompt, completion) * torch.tensor(mask)
        torch.testing.assert_close(torch.tensor(ours), expected, rtol=0, atol=1e-5)


def test_the_same_conversations_at_the_cost_of_their_new_tokens(turns):
    ours, stock = make_trainer("engine", **GREEDY), make_trainer("generate", **GREEDY)
    (generated, batch), (expected, stock_batch) = generate(ours), generate(stock)
    assert generated[:4] == expected[:4], "prompts, completions, masks of the tools' tokens, messages"
    messages = generated[3][0]
    assert [message["role"] for message in messages] == ["assistant", "tool", "assistant", "tool", "assistant"]
    for asked, told in (messages[:2], messages[2:4]):
        assert told["content"] == str(add(**asked["tool_calls"][0]["function"]["arguments"]))
    for name in ("prompt_ids", "completion_ids", "completion_mask", "tool_mask", "advantages"):
        assert torch.equal(batch[name], stock_batch[name]), name
    assert ours._metrics["train"]["tools/call_frequency"] == [2.0]
    assert ours._metrics["train"]["tools/failure_frequency"] == [0.0]
    assert expected[4] is None
    assert_logprobs(ours, generated)
    assert len(turns) == 3
    for before, turn in itertools.pairwise(turns):  # the last token of a completion has never been fed
        known = dict(zip(map(tuple, before.prompt_ids), before.completion_ids))
        new = 0
        for prompt in {tuple(ids) for ids in turn.prompt_ids}:
            ((head, said),) = [(p, c) for p, c in known.items() if prompt[: len(p) + len(c)] == (*p, *c)]
            new += len(prompt) - len(head) - len(said) + 1
        assert turn.stats.prefill_tokens == new
        assert turn.stats.prefill_tokens_saved == sum(map(len, turn.prompt_ids)) - new


def test_sampled_conversations_train_on_what_the_model_said(turns):
    trainer = make_trainer("engine", temperature=1.0, max_steps=3)
    batches, method = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: batches.append(method(inputs)) or batches[-1]
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert max(row["rollout/mismatch/max"] for row in rows) < 1e-4
    assert sum(row["tools/call_frequency"] for row in rows) > 0
    assert len(turns) > 3
    for batch in batches:
        live = (batch["completion_mask"] * batch["tool_mask"]) == 1
        assert (batch["sampling_per_token_logps"][live] < 0).all()
        assert (batch["sampling_per_token_logps"][~live] == 0).all()
    assert any((batch["tool_mask"] == 0).any() for batch in batches)


def test_a_later_turn_that_trl_has_to_generate(monkeypatch, turns):
    """Its log-probs are unknown: the batch is trained on as one of TRL's."""
    trainer = make_trainer("auto", **GREEDY)
    trainer._rollouts.generate([[5]], None, {})  # after the self-check
    turns.clear()

    def refuse(*turn):
        if trainer._rollouts._turns:
            raise flashpo.trl.rollout.CannotGenerate("a tool has sent an image")

    monkeypatch.setattr(trainer._rollouts, "_check_turn", refuse)
    with pytest.warns(UserWarning, match="a tool has sent an image"):
        generated, _ = generate(trainer)
    expected, _ = generate(make_trainer("generate", **GREEDY))
    assert generated[:4] == expected[:4]
    first = len(turns[0].completion_ids[0])
    told = [mask == 0 or i < first for i, mask in enumerate(generated[2][0])]
    assert [math.isfinite(x) for x in generated[4][0]] == told
    trainer.train()
    (row,) = [row for row in trainer.state.log_history if "loss" in row]
    assert math.isfinite(row["loss"])
    assert math.isfinite(row["grad_norm"])
    assert not [name for name in row if "mismatch" in name]


class Calculator:
    """Counts what it is asked for, and gives the reward."""

    def reset(self, **kwargs) -> None:
        self.calls = 0

    def add(self, a: int, b: int) -> int:
        """Adds.

        Args:
            a: a number
            b: a number
        """
        self.calls += 1
        return a + b

    def get_reward(self) -> float:
        return float(self.calls)


def test_environments(turns):
    batches = {}
    for rollout in ("engine", "generate"):
        trainer = make_trainer(rollout, environment_factory=Calculator, **GREEDY)
        _, batches[rollout] = generate(trainer)
        assert [environment.calls for environment in trainer.environments] == [2] * 4
        assert trainer._metrics["train"]["rewards/Calculator/mean"] == [2.0]
    assert len(turns) == 3
    assert turns[-1].stats.prefill_tokens_saved > 0
    for name in ("prompt_ids", "completion_ids", "completion_mask", "tool_mask"):
        assert torch.equal(batches["engine"][name], batches["generate"][name])
