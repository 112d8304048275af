"""Reward models on token trees, in TRL's RewardTrainer and as reward models of GRPO, against stock TRL."""

import copy
import warnings

import pytest

pytest.importorskip("trl")
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification
from trl_models import assert_same, bidirectional_path, judge, make_trainer, text, tokenizer, train

import flashpo
import flashpo.trl

SYSTEM = text(20, 1)
PAIRS = [
    {
        "chosen": f"{SYSTEM} {text(17, 50 + i // 2)} {text(3 + 2 * i, 60 + i)}",
        "rejected": f"{SYSTEM} {text(17, 50 + i // 2)} {text(9 - i, 70 + i)}",
    }
    for i in range(4)
]
LORA = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def make_reward_trainer(package, tmp_path, kind="qwen3", pairs=PAIRS, peft_config=None, **options):
    data, adapter = Dataset.from_list(pairs), copy.deepcopy(peft_config)
    output = {"output_dir": str(tmp_path)}
    return make_trainer("Reward", package, kind, train_dataset=data, peft_config=adapter, **output | options)


def assert_same_rewards(tmp_path, **options):
    stock = train(make_reward_trainer(trl, tmp_path, **options))
    flashpo.stats(reset=True)
    ours = make_reward_trainer(flashpo.trl, tmp_path, **options, share_prefix=True)
    embedded = []
    ours.model.get_input_embeddings().register_forward_hook(lambda module, args, out: embedded.append(args[0].numel()))
    assert_same(stock, train(ours))
    assert flashpo.stats()["tree_attention_bwd"]
    return embedded


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "gpt2", "qwen3_5_text"])
def test_a_step_is_that_of_stock_trl(kind, tmp_path):
    (tokens,) = assert_same_rewards(tmp_path, kind=kind)
    rows = [pair[key].split() for pair in PAIRS for key in ("chosen", "rejected")]
    distinct = 20 + 2 * 17 + sum(len(row) - 37 + 1 for row in rows)  # an end of sequence each
    assert tokens == distinct


@pytest.mark.parametrize(
    "options",
    [
        {"peft_config": LORA},
        {"center_rewards_coefficient": 0.1},
        {"pairs": [pair | {"margin": 0.5 * i} for i, pair in enumerate(PAIRS)]},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options(options, tmp_path):
    assert_same_rewards(tmp_path, **options)


def test_evaluation(tmp_path):
    trainers = [make_reward_trainer(package, tmp_path) for package in (trl, flashpo.trl)]
    flashpo.stats(reset=True)
    stock, ours = (trainer.evaluate(Dataset.from_list(PAIRS)) for trainer in map(_with_evaluation, trainers))
    assert flashpo.stats()["tree_attention_fwd"]
    for name in ("eval_loss", "eval_accuracy", "eval_margin"):
        assert ours[name] == pytest.approx(stock[name], rel=1e-5)


def _with_evaluation(trainer):
    trainer.evaluate = lambda data, run=trainer.evaluate: run(
        trainer._prepare_dataset(data, tokenizer(), trainer.args, "eval")
        if "chosen_ids" not in data.column_names
        else data
    )
    return trainer


def test_without_sharing_it_is_stock_trl(tmp_path):
    flashpo.stats(reset=True)
    train(make_reward_trainer(flashpo.trl, tmp_path, share_prefix=False))
    assert "tree_attention_fwd" not in flashpo.stats()


def test_a_model_that_cannot_is_padded_after_a_warning(tmp_path):
    with pytest.warns(UserWarning, match=r"its attention is bidirectional"):
        trainer = make_reward_trainer(flashpo.trl, tmp_path, kind=bidirectional_path())
    flashpo.stats(reset=True)
    train(trainer)
    assert "tree_attention_fwd" not in flashpo.stats()


def test_the_reward_model_of_grpo_shares_prompts(tmp_path):
    """The same rewards as stock TRL's, a prompt's completions on one tree."""
    judge("qwen3").save_pretrained(tmp_path)
    prompts = Dataset.from_list([{"prompt": text(30, i)} for i in range(4)])
    steps, counts = [], []
    for package, options in ((trl, {}), (flashpo.trl, {"rollout": "generate"})):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        embedded = []
        model.get_input_embeddings().register_forward_hook(
            lambda module, args, out, embedded=embedded: embedded.append(args[0].numel())
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="FlashPO")
            trainer = make_trainer("GRPO", package, reward_funcs=model, train_dataset=prompts, **options)
            trainer.reward_processing_classes = [tokenizer()]
            steps.append(train(trainer))
        counts.append(embedded[-1])
    assert_same(*steps)
    assert counts[1] < 0.7 * counts[0]


def test_verify(tmp_path):
    """Its stock run is padded."""
    trainer, embedded = make_reward_trainer(flashpo.trl, tmp_path), []
    trainer.model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: embedded.append(args[0].numel())
    )
    report = flashpo.trl.verify(trainer, steps=1)
    assert "tree_attention_fwd" in report.ops
    assert not report.disagreements
    padded, packed = embedded
    assert padded > 2 * packed
