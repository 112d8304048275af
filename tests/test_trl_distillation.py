"""TRL's on-policy distillation on token trees, against stock TRL on the same completions."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl_models import CONFIGS, assert_ran, assert_same, bidirectional_path, load, make_trainer, text, train

import flashpo
import flashpo.trl
from flashpo.trl import comparison
from flashpo.trl._text_only import padding_changes_nothing
from flashpo.trl.packed import groups_stay_together

SYSTEM = text(12, 1)
ROWS = [{"prompt": f"{SYSTEM} {text(2 + i % 3, 20 + i // 2)}"} for i in range(16)]
LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def teacher(kind="qwen3", seed=7, **changed):
    """Wider than the students, with other weights."""
    torch.manual_seed(seed)
    config = CONFIGS[kind]()
    config.update({"hidden_size": 48} | changed)
    return AutoModelForCausalLM.from_config(config)


def make(package, model="qwen3", teacher_model=None, **options):
    torch.manual_seed(2)  # adapters are random
    options = dict(max_completion_length=7, temperature=0.9, train_dataset=Dataset.from_list(ROWS)) | options
    if package is flashpo.trl:
        options.setdefault("rollout", "generate")
    return make_trainer(
        "Distillation", package, model, teacher_model=teacher() if teacher_model is None else teacher_model, **options
    )


def assert_same_steps(packed=True, **options):
    flashpo.stats(reset=True)
    stock = train(make(trl, **copy.deepcopy(options)))
    assert not flashpo.stats(), "TRL's own trainer must stay as it is"
    ours = train(make(flashpo.trl, **copy.deepcopy(options), share_prefix=packed))
    assert_ran("linear_divergence_partial", "linear_divergence_bwd")
    assert bool(flashpo.stats().get("tree_attention_bwd")) == packed
    assert_same(stock, ours)
    return ours


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_step_is_that_of_stock_trl(beta):
    (step,) = assert_same_steps(beta=beta)
    assert 0 <= step.metrics["teacher/agreement"] <= 1


@pytest.mark.parametrize(
    ("model", "of_teacher"),
    [("gemma2", "phi"), ("cohere", "gemma2"), ("phi", "granite"), ("qwen3_5_text", "qwen3")],
)
def test_families_that_transform_their_logits(model, of_teacher):
    """Softcap, scales, a head with a bias; a hybrid."""
    assert_same_steps(model=model, teacher_model=teacher(of_teacher), beta=0.5, temperature=1.3)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True, "peft_config": LORA},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 2, "pad_to_multiple_of": 8},
        {"train_dataset": Dataset.from_list(ROWS).to_iterable_dataset()},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options(options):
    assert_same_steps(**options)


def test_a_model_in_bfloat16_beside_a_teacher_in_fp32():
    stock, ours = (
        train(make(package, dtype=torch.bfloat16, teacher_model=teacher())) for package in (trl, flashpo.trl)
    )
    assert_same(stock, ours, torch.bfloat16)


def test_every_distinct_token_runs_once():
    """Of both models: rows share the system prompt and, in pairs, their question."""
    trainer, counts = make(flashpo.trl), []
    for model in (trainer.model, trainer.teacher_model):
        model.get_input_embeddings().register_forward_hook(lambda module, args, out: counts.append(args[0].numel()))
    made = []
    trainer._generate_and_score_completions = lambda rows, make=trainer._generate_and_score_completions: (
        made.append(make(rows)) or made[-1]
    )
    train(trainer)
    batch = made[0]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    rows = [x[m == 1].tolist()[:-1] for x, m in zip(ids, mask)]
    distinct = {tuple(row[: i + 1]) for row in rows for i in range(len(row))}
    assert counts[-1] == counts[-2]
    assert counts[-1] <= len(distinct) + 16 * len(rows)  # stretches too short to pay for a segment run again
    assert counts[-1] < 0.8 * mask.sum()


def test_evaluation():
    data = Dataset.from_list(ROWS[:4])
    logs = [make(package, eval_dataset=data).evaluate() for package in (trl, flashpo.trl)]
    for name in ("eval_loss", "eval_entropy"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-5)
    assert "eval_teacher/agreement" in logs[1]
    assert "eval_teacher/agreement" not in logs[0]


def test_the_engine_generates():
    flashpo.stats(reset=True)
    trainer = make(flashpo.trl, rollout="engine", num_generations=2)
    (step,) = train(trainer)
    assert_ran("decode_attention_fwd", "sample_rows", "tree_attention_bwd", "linear_divergence_bwd")
    assert step.metrics["rollout/tokens_per_second"] > 0
    assert 0 < step.metrics["completions/mean_length"] <= 7


def test_an_option_that_the_engine_does_not_know_is_generated_by_trl():
    with pytest.warns(UserWarning, match="repetition_penalty=1.2 is set"):
        train(make(flashpo.trl, rollout="auto", repetition_penalty=1.2))


# several completions of a prompt


def rows_of(trainer) -> list[list[str]]:
    """The prompts of each generation batch of an epoch."""
    return [[row["prompt"] for row in batch] for batch in trainer.get_train_dataloader()]


def test_one_completion_is_trls_order():
    assert rows_of(make(flashpo.trl)) == rows_of(make(trl))


@pytest.mark.parametrize("streamed", [False, True])
def test_a_prompt_has_its_completions_side_by_side(streamed):
    data = Dataset.from_list([{"prompt": text(3, i)} for i in range(8)])
    data = data.to_iterable_dataset() if streamed else data
    options = dict(train_dataset=data, gradient_accumulation_steps=2, num_generations=4)
    batches = rows_of(make(flashpo.trl, **options))
    assert {len(batch) for batch in batches} == {8}
    for batch in batches:
        assert [batch.count(prompt) for prompt in batch] == [4] * 8
        assert batch[:4] == batch[:1] * 4
    assert batches[0] == batches[1], "once more for each accumulation step"
    assert len(batches) == 2 * 4


def test_several_completions_train_as_stock_trl_on_the_same_rows():
    repeated = Dataset.from_list([row for row in ROWS[:4] for _ in range(4)])
    options = dict(shuffle_dataset=False, per_device_train_batch_size=8, max_steps=2)
    with groups_stay_together(trl.DistillationTrainer, 4):
        stock = train(make(trl, train_dataset=repeated, **options))
    distinct = Dataset.from_list(ROWS[:4])
    ours = train(make(flashpo.trl, train_dataset=distinct, num_generations=4, **options))
    assert_same(stock, ours)


@pytest.mark.parametrize("number", [0, 3, 1.5])
def test_a_wrong_number_of_completions(number):
    with pytest.raises(ValueError, match=rf"num_generations.*{number}"):
        make(flashpo.trl, num_generations=number)


# several teachers


NAMES = ["left", "right", "left", "left"]
OF_TWO = Dataset.from_list([row | {"teacher": name} for row, name in zip(ROWS, NAMES)])


def two():
    return {"left": teacher(), "right": teacher("gemma2", 8)}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("share", [True, False])
def test_several_teachers_are_the_sum_of_single_ones(share, mode):
    """A teacher's part is the loss of a trainer that has it alone, on its rows."""
    trainer = make(flashpo.trl, teacher_model=two(), train_dataset=OF_TWO, share_prefix=share)
    trainer.model.train(mode == "train")
    batch = trainer._generate_and_score_completions(list(OF_TWO))
    ran = []
    for name, model in trainer.teachers.items():
        model.get_input_embeddings().register_forward_hook(
            lambda module, args, out, name=name: ran.append((name, args[0].numel()))
        )
    loss, grads = loss_and_gradients(trainer, batch)
    items = batch["completion_mask"].sum()
    parts = []
    for name, model in two().items():
        alone = make(trl, teacher_model=model)
        alone.model.train(mode == "train")
        rows = torch.tensor([n == name for n in NAMES])
        its = {k: x[rows] if x.dim() else x for k, x in batch.items() if k != "teacher_index"}
        parts.append(loss_and_gradients(alone, its, None if mode == "train" else items))
    assert loss == pytest.approx(sum(part for part, _ in parts).item(), rel=1e-5)
    for name, grad in grads.items():
        expected = sum(part[name] for _, part in parts)
        assert (grad - expected).norm() <= 1e-5 * (expected.norm() + 1e-3)
    if not share:
        width = batch["prompt_ids"].shape[1] + batch["completion_ids"].shape[1]
        assert ran == [("left", 3 * width), ("right", width)]


def loss_and_gradients(trainer, batch, items=None):
    trainer.model.zero_grad(set_to_none=True)
    with trainer.accelerator.autocast():
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=items)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def test_several_teachers_train_and_are_logged(tmp_path):
    """One as a path; the batches are shuffled, and split for accumulation."""
    teacher().save_pretrained(tmp_path)
    teachers = {"left": str(tmp_path), "right": teacher("gemma2", 8)}
    options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, remove_unused_columns=True)
    trainer = make(flashpo.trl, teacher_model=teachers, train_dataset=OF_TWO, **options)
    assert trainer.teachers["left"].config.hidden_size == 48
    (step,) = train(trainer)
    assert {"teacher/left/divergence", "teacher/right/divergence"} <= step.metrics.keys()
    report = flashpo.trl.verify(make(flashpo.trl, teacher_model=two(), train_dataset=OF_TWO), steps=1)
    assert not report.disagreements


@pytest.mark.parametrize(
    ("data", "teachers", "what"),
    [
        (ROWS, None, r"train_dataset must have a column 'teacher'.*has \['prompt'\]"),
        ([OF_TWO[0] | {"teacher": "up"}], None, "train_dataset: column 'teacher' names 'up'; teacher_model has left"),
        (list(OF_TWO), {}, "teacher_model must be a model, a path, or a dict"),
        (list(OF_TWO), {"left": 3}, "teacher_model must be a model, a path, or a dict"),
    ],
)
def test_wrong_teachers_are_refused_at_the_start(data, teachers, what):
    with pytest.raises(ValueError, match=what):
        make(flashpo.trl, teacher_model=two() if teachers is None else teachers, train_dataset=Dataset.from_list(data))


def test_a_teacher_of_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"teacher_model\['right'\] has a vocabulary of 50 tokens, the student of 97"):
        make(flashpo.trl, teacher_model=two() | {"right": teacher(vocab_size=50)}, train_dataset=OF_TWO)


def test_an_unknown_teacher_in_a_stream_is_refused_when_it_comes():
    rows = Dataset.from_list([OF_TWO[0] | {"teacher": "up"}] * 4).to_iterable_dataset()
    with pytest.raises(ValueError, match="the batch: column 'teacher' names 'up'"):
        make(flashpo.trl, teacher_model=two(), train_dataset=rows).train()


# what stays with TRL


@pytest.mark.parametrize("padded", ["student", "teacher"])
def test_one_that_cannot_take_trees_is_padded_alone(padded):
    path = bidirectional_path()
    models = {"model": path} if padded == "student" else {"teacher_model": load(path)}
    who = "" if padded == "student" else "the teacher: "
    with pytest.warns(UserWarning, match=rf"not shared: {who}qwen3: its attention is bidirectional"):
        trainer = make(flashpo.trl, **models)
    flashpo.stats(reset=True)
    train(trainer)
    assert_ran("tree_attention_fwd", "linear_divergence_bwd")
    with pytest.raises(ValueError, match="share_prefix=True, but"):
        make(flashpo.trl, share_prefix=True, **models)


def test_without_sharing_both_are_padded():
    assert_same_steps(packed=False, teacher_model=teacher("gpt2", hidden_size=32), model="qwen3_tied")


def test_double_precision_is_trls():
    with pytest.warns(UserWarning, match=r"leaves the divergence to TRL: a head is torch.float64"):
        steps = train(make(flashpo.trl, dtype=torch.float64, teacher_model=teacher().double()))
    assert_same(train(make(trl, dtype=torch.float64, teacher_model=teacher().double())), steps)


def test_a_subclass_that_changes_hidden_states_is_believed():
    def halved(self, *args, **kwargs):
        return 0.5 * super(type(self), self)._get_last_hidden_state(*args, **kwargs)

    steps = []
    for package in (trl, flashpo.trl):
        subclass = type("Users", (package.DistillationTrainer,), {"_get_last_hidden_state": halved})
        users = SimpleNamespace(DistillationTrainer=subclass, DistillationConfig=package.DistillationConfig)
        flashpo.stats(reset=True)
        steps.append(train(make(users, **({} if package is trl else {"rollout": "generate"}))))
    assert_ran("tree_attention_bwd")
    assert_same(*steps)


# self-checks


def test_verify():
    report = flashpo.trl.verify(make(flashpo.trl, num_generations=4, gradient_accumulation_steps=2), steps=1)
    assert {"linear_divergence_bwd", "tree_attention_bwd"} <= report.ops.keys()


def test_verify_finds_a_teacher_that_differs_on_trees(monkeypatch):
    trainer, on = make(flashpo.trl), comparison.States.on

    def spoiled(tree, model):
        states = on(tree, model)
        return states if model is trainer.model else states._replace(hidden=states.hidden.roll(1, 0))

    monkeypatch.setattr(comparison.States, "on", spoiled)
    with pytest.raises(flashpo.trl.VerificationError, match=r"disagree on .*loss"):
        flashpo.trl.verify(trainer, steps=1)


def test_under_patch_trls_own_trainer_compares_with_our_operator():
    stock = train(make(trl))
    flashpo.stats(reset=True)
    with flashpo.trl.patched():
        patched = train(make(trl))
        assert flashpo.trl.verify(make(trl), steps=1).ops["linear_divergence_bwd"]
    assert_ran("linear_divergence_partial", "linear_divergence_bwd")
    assert_same(stock, patched)
    flashpo.stats(reset=True)
    train(make(trl))
    assert not flashpo.stats()


@pytest.mark.parametrize("aligned", [True, False])
def test_positions_that_count_the_padding(aligned):
    """GPT-2 has an embedding a position, and TRL's padding shifts a short prompt's. Prompts of one length have none."""
    rows = [{"prompt": text(6 if aligned else 4 + i % 3, i)} for i in range(4)]
    options = dict(model="gpt2", disable_dropout=True, train_dataset=Dataset.from_list(rows))
    stock = train(make(trl, **options))
    flashpo.stats(reset=True)
    warns = contextlib.nullcontext() if aligned else pytest.warns(UserWarning, match="padded on the left, and the")
    with warns:
        ours = train(make(flashpo.trl, **options))
    assert flashpo.stats()["tree_attention_fwd"], "the teacher takes trees in any case"
    assert bool(flashpo.stats().get("tree_attention_bwd")) == aligned
    assert_same(stock, ours)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "qwen3_vl", "qwen3_5", "longrope", "gpt2"])
def test_which_models_positions_count_the_padding(kind):
    assert padding_changes_nothing(load(kind)) == (kind != "gpt2")


def test_tokens_of_tools_and_rows_without_any_token():
    """As a loop of tools and truncation leave them: stock TRL's loss and gradients."""
    trainers = [make(package) for package in (trl, flashpo.trl)]
    batch = trainers[1]._generate_and_score_completions(ROWS[:4])
    batch["tool_mask"] = (torch.arange(batch["completion_mask"].shape[1]) % 3 > 0).long().expand(4, -1).clone()
    batch["tool_mask"][2] = 0
    for kept in (1, 0):
        batch["tool_mask"] *= kept
        batch["num_items_in_batch"] = batch["tool_mask"].sum()
        (expected, grads), (loss, ours) = (loss_and_gradients(trainer, batch) for trainer in trainers)
        assert loss == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)
        assert ours.keys() == grads.keys()
        for name, grad in grads.items():
            assert (ours[name] - grad).norm() <= 1e-4 * (grad.norm() + 1e-3), name
