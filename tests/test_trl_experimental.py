"""`patch()` does for the trainers in trl.experimental what flashpo.trl.experimental and its page say."""

import importlib
import inspect
import pathlib
import pkgutil
import re

import pytest

pytest.importorskip("trl")
import transformers
import trl.experimental
from datasets import Dataset
from trl_models import PROMPTS, load, text, tokenizer

import flashpo
import flashpo.trl
from flashpo.trl import report, start
from flashpo.trl.experimental import EXPERIMENTAL, share_prompts, table

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "trainers.md"
PROMPT = [{"prompt": p} for p in PROMPTS]
GOLD = [
    {"prompt": p, "chosen": text(4, i), "rejected": text(5, 50 + i), "reference": text(3, 90 + i)}
    for i, p in enumerate(PROMPTS)
]
CHATS = [
    {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": text(4, i)}]}
    for i, p in enumerate(PROMPTS)
]
LABELLED = [{"prompt": p, "completion": text(4, i), "label": i % 2 == 0} for i, p in enumerate(PROMPTS)]
HINTS = [{"prompt": [{"role": "user", "content": p}], "privileged_context": text(4, i)} for i, p in enumerate(PROMPTS)]


@pytest.fixture(autouse=True)
def experimental(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def rewards(completions, **_):
    return [float(i % 2) for i in range(len(completions))]


RUNS = {  # rows, arguments of the trainer, options
    "a2po": (PROMPT, {"reward_funcs": rewards}, {"max_completion_length": 4}),
    "cpo": (GOLD, {}, {}),
    "distillation": (PROMPT, {"teacher_model": "a model"}, {"max_completion_length": 4}),
    "gkd": (CHATS, {"teacher_model": "a model"}, {"lmbda": 0.0}),
    "gmpo": (PROMPT, {"reward_funcs": rewards}, {"max_completion_length": 4, "num_generations": 2}),
    "iw_opd": (CHATS, {"teacher_model": "a model"}, {"max_completion_length": 4}),
    "kto": (
        [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 2 == 0} for i, r in enumerate(GOLD)],
        {},
        {},
    ),
    "online_dpo": (PROMPT, {"reward_funcs": rewards}, {"max_new_tokens": 4, "per_device_train_batch_size": 2}),
    "orpo": (GOLD, {}, {}),
    "sdft": (
        HINTS,
        {},
        {
            "max_completion_length": 4,
            "num_generations": 2,
            "distillation_mode": "sampled_token",
            "distillation_alpha": 1.0,
        },
    ),
    "sdpo": (HINTS, {"reward_funcs": rewards}, {"max_completion_length": 4, "num_generations": 2}),
    "tpo": (GOLD, {}, {}),
}


def make(package, folder, **more):
    rows, extra, options = RUNS[package]
    known, module = EXPERIMENTAL[package], importlib.import_module(f"trl.experimental.{package}")
    cls = getattr(module, known.trainer)
    config = getattr(module, known.trainer.replace("Trainer", "Config"))
    settings = dict(
        use_cpu=True, bf16=False, report_to="none", save_strategy="no", max_steps=1, disable_tqdm=True,
        gradient_checkpointing=False, per_device_train_batch_size=4,
    )  # fmt: skip
    extra = {name: load("qwen3") if x == "a model" else x for name, x in extra.items()}
    rows = [
        {k: x for k, x in row.items() if package != "kto" or k in ("prompt", "completion", "label")} for row in rows
    ]
    return cls(
        model=load("qwen3"),
        args=config(output_dir=str(folder), **settings | options | more),
        processing_class=tokenizer(),
        train_dataset=Dataset.from_list(rows),
        **extra,
    )


@pytest.mark.parametrize("package", RUNS)
def test_what_runs_under_patch(package, tmp_path):
    known = EXPERIMENTAL[package]
    flashpo.stats(reset=True)
    with flashpo.trl.patched():
        make(package, tmp_path).train()
    ran = [op for op in flashpo.stats() if not op.startswith("merge_")]
    for begin in known.ops:
        assert any(op.startswith(begin) for op in ran), ran
    ours = known.ops + ("tree_",) * known.shares  # where `flashpo run` is at work, as another test may have left it
    assert all(op.startswith(ours) for op in ran) if ours else not ran


@pytest.mark.parametrize("package", [name for name, known in EXPERIMENTAL.items() if known.shares])
def test_shared_prompts_train_as_padded_rows(package, tmp_path):
    def step(sharing):
        trainer = make(package, tmp_path, logging_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=1e9)
        if sharing:
            start.before_training(trainer)  # as under `flashpo run`
            assert trainer._shares_prompts
            share_prompts(trainer)
        with flashpo.trl.patched():
            trainer.train()
        return trainer.state.log_history[0], dict(trainer.model.named_parameters())

    (log, weights), before = step(False), dict(load("qwen3").named_parameters())
    flashpo.stats(reset=True)
    shared_log, shared = step(True)
    assert "tree_attention_bwd" in flashpo.stats()
    for name in log.keys() - {"logits/chosen", "logits/rejected"}:  # which count padding
        if "runtime" not in name and "second" not in name:
            assert shared_log[name] == pytest.approx(log[name], rel=1e-4, abs=1e-5), name
    for name, x in weights.items():
        step_of = (x - before[name]).abs().max()
        assert (shared[name] - x).abs().max() <= 1e-3 * step_of + 1e-7, name


def test_only_trainers_that_pad_on_the_right_share_prompts(tmp_path):
    with pytest.raises(TypeError, match=r"trainer must be one of TRL's CPOTrainer, .*, got a SDPOTrainer"):
        share_prompts(make("sdpo", tmp_path))


def test_every_trainer_is_listed():
    found = {}
    for module in pkgutil.iter_modules(trl.experimental.__path__):
        package = importlib.import_module(f"trl.experimental.{module.name}")
        for name in dir(package):
            cls = getattr(package, name)
            if inspect.isclass(cls) and issubclass(cls, transformers.Trainer) and name[0] != "_":
                found[module.name] = name
    assert {package: known.trainer for package, known in EXPERIMENTAL.items()} == found


def test_the_page_has_the_table():
    assert table() in PAGE.read_text()


@pytest.mark.parametrize(
    ("cls", "ops", "says"),
    [
        (
            "flashpo.trl.grpo.GRPOTrainer",
            ["tree_attention_fwd", "linear_logprob_bwd"],
            "not rollout engine: see below; not loss: .*",
        ),
        ("flashpo.trl.sft.SFTTrainer", ["tree_attention_fwd", "linear_logprob_bwd"], ""),
        ("trl.trainer.sft_trainer.SFTTrainer", ["linear_logprob_bwd"], "it is TRL's own SFTTrainer.*"),
        ("trl.experimental.gkd.GKDTrainer", [], "the model gives it whole logits.*"),
        ("transformers.Trainer", [], "FlashPO does not know this trainer"),
    ],
)
def test_what_is_said_of_a_trainer(cls, ops, says):
    module, _, name = cls.rpartition(".")
    of = getattr(importlib.import_module(module), name)
    said = report._said(type("Users", (of,), {}), report.Run(report.Counter(ops)), finished=True)
    assert re.fullmatch(rf"[\w\s,-]+ by FlashPO(; {says})?" if says else r"[\w\s,-]+ by FlashPO", said), said
