"""SFT, DPO and KTO on token trees: shared tokens run once, rows do not mix, and what cannot be packed is reported."""

import logging
import warnings

import pytest
import torch

pytest.importorskip("trl")
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl_models import (
    SPECIAL,
    VOCAB,
    Step,
    assert_ran,
    assert_same,
    assert_same_training,
    bidirectional_path,
    make_trainer,
    model_path,
    text,
    tokenizer,
    train,
)

import flashpo.trl
from flashpo.trl import tree_head
from flashpo.trl.patch import patched, stock

SYSTEM = text(20, 1)
FLAT = dict(padding_free=True, max_length=None)
SHARED = {  # of every method 4 rows: all begin alike, and rows 0 and 1 have the same prompt
    "SFT": [
        {"prompt": f"{SYSTEM} {text(17 + i // 2, 50 + i // 2)} ", "completion": text(3 + 2 * i, 60 + i)}
        for i in range(4)
    ],
    "DPO": [
        {
            "prompt": f"{SYSTEM} {text(17 + i // 2, 50 + i // 2)} ",
            "chosen": text(3 + 2 * i, 60 + i),
            "rejected": text(9 - i, 70 + i),
        }
        for i in range(4)
    ],
    "KTO": [
        {
            "prompt": f"{SYSTEM} {text(17 + i // 2, 50 + i // 2)} ",
            "completion": text(3 + 2 * i, 60 + i),
            "label": i % 2 == 0,
        }
        for i in range(4)
    ],
}
PROMPTS = 20 + 17 + 18  # distinct tokens: two prompts behind one beginning; the other tokens are answers


def answers(name: str) -> int:
    """Tokens, end of sequence included, but without each row's last, which predicts nothing."""
    return sum(
        len(row[key].split()) for row in SHARED[name] for key in ("completion", "chosen", "rejected") if key in row
    )


def shared(name: str) -> Dataset:
    return Dataset.from_list(SHARED[name])


def tokens_run(model) -> list[int]:
    """How many tokens each later forward of the model embeds."""
    counts: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, out: counts.append(inputs[0].numel()))
    return counts


@pytest.mark.parametrize("options", [{}, FLAT, {"packing": True, "max_length": 256}], ids=str)
def test_sft_shares_its_beginnings(options):
    assert_same_training("SFT", train_dataset=shared("SFT"), **options)
    trainer = make_trainer("SFT", flashpo.trl, train_dataset=shared("SFT"), **options)
    counts = tokens_run(trainer.model)
    trainer.train()
    assert counts == [PROMPTS + answers("SFT")]


def test_dpo_shares_prompts():
    assert_same_training("DPO", train_dataset=shared("DPO"))
    trainer = make_trainer("DPO", flashpo.trl, train_dataset=shared("DPO"))
    policy, reference = tokens_run(trainer.model), tokens_run(trainer.ref_model)
    trainer.train()
    assert policy == reference == [PROMPTS + answers("DPO")]


def test_kto_shares_prompts():
    assert_same_training("KTO", train_dataset=shared("KTO"))
    trainer = make_trainer("KTO", flashpo.trl, train_dataset=shared("KTO"))
    policy, reference = tokens_run(trainer.model), tokens_run(trainer.ref_model)
    trainer.train()
    completions = PROMPTS + answers("KTO")
    assert policy == reference == [completions, completions]  # of the KL, whose completions are the same ones, and own


def test_precomputed_references_run_packed():
    flashpo.stats(reset=True)
    trainer = make_trainer("DPO", flashpo.trl, train_dataset=shared("DPO"), precompute_ref_log_probs=True)
    assert flashpo.stats()["tree_attention_fwd"]
    assert len(trainer.train_dataset["ref_chosen_logps"]) == 4


@pytest.mark.parametrize("name", ["DPO", "KTO"])
def test_a_reference_by_disabled_adapters(name):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = make_trainer(name, flashpo.trl, train_dataset=shared(name), peft_config=lora)
    counts = tokens_run(trainer.model)
    assert not flashpo.trl.verify(trainer, steps=1).disagreements
    tree = PROMPTS + answers(name)
    assert len(counts) == (4 if name == "DPO" else 8)  # policy and reference, padded and packed
    assert counts[len(counts) // 2 :] == [tree] * (len(counts) // 2)


@pytest.mark.parametrize("options", [{}, FLAT, FLAT | {"pad_to_multiple_of": 64}], ids=str)
def test_auxiliary_loss_of_shared_tokens(options):
    """Every row's tokens count in it, also those that run once, and what pads a padding-free batch, as in TRL."""
    options = options | dict(model="qwen3_moe", router_aux_loss_coef=0.1, train_dataset=shared("SFT"))
    assert assert_same_training("SFT", **options)[0].metrics["aux_loss"] > 0


@pytest.mark.parametrize("options", [{}, FLAT], ids=str)
def test_sft_with_labels_anywhere(options):
    """Turns of an assistant, a row without any, one that ends in a prompt: labels are what the dataset says."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for i in range(4):
        ids = torch.randint(len(SPECIAL), VOCAB, (9 + 4 * i,), generator=generator)
        labels = ids.masked_fill(torch.rand(len(ids), generator=generator) > 0.3 * (i != 1), -100)
        labels[-2:] = -100
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    options = options | dict(train_dataset=Dataset.from_list(rows), dataset_kwargs={"skip_prepare_dataset": True})
    assert_same_training("SFT", per_device_train_batch_size=2, gradient_accumulation_steps=2, **options)


@pytest.mark.parametrize("options", [{}, FLAT], ids=str)
def test_sft_losses_on_logits_stay_padded(options):
    """Label smoothing needs the logits, which TRL says; the metrics are from the tree."""
    options = options | dict(label_smoothing_factor=0.1, train_dataset=shared("SFT"))
    expected = train(make_trainer("SFT", **options))
    trainer = make_trainer("SFT", flashpo.trl, **options)
    counts = tokens_run(trainer.model)
    assert_same(expected, train(trainer))
    padded, packed = counts
    assert packed == PROMPTS + answers("SFT") < padded


@pytest.mark.parametrize("options", [{}, {"loss_type": "dft"}], ids=str)
def test_sft_loss_types_without_padding(options):
    assert_same_training("SFT", **FLAT, **options)


# one call of a model


def scorer(kind: str = "qwen3", mode="auto", name: str = "SFT"):
    """A model as the trainer leaves it."""
    return make_trainer(name, flashpo.trl, model=kind, share_prefix=mode).model


def rows(lengths=(30, 25, 28), common: int = 18) -> dict[str, torch.Tensor]:
    """A padded batch, labels on what is not common."""
    ids = torch.randint(len(SPECIAL), VOCAB, (len(lengths), max(lengths)))
    ids[:, :common] = ids[0, :common]
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :common] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def flattened(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    live = batch["attention_mask"] == 1
    position = torch.arange(live.shape[1]).expand_as(live)
    return {
        "input_ids": batch["input_ids"][live][None],
        "labels": batch["labels"][live][None],
        "position_ids": position[live][None],
    }


def run(model, batch):
    with patched():
        return model(**batch, use_cache=False, fused_lm_head=True)


def as_step(out) -> Step:
    fields = {k: v.float() for k, v in out.items() if isinstance(v, torch.Tensor) and v.dim() > 0}
    return Step(out.loss.item(), {}, fields)


@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO"])
@pytest.mark.parametrize("flat", [False, True])
@torch.no_grad()
def test_output_is_that_of_trl(name, flat):
    """Every field, where labels are and where none are."""
    model, batch = scorer(name=name), rows()
    batch = flattened(batch) if flat else batch
    flashpo.stats(reset=True)
    ours = run(model, batch)
    assert_ran("tree_attention_fwd")
    with stock():
        expected = run(model, batch)
    assert ours.keys() == expected.keys()
    assert torch.equal(ours.label_mask, expected.label_mask)
    assert_same([as_step(expected)], [as_step(ours)])


@pytest.mark.parametrize("flat", [False, True])
@torch.no_grad()
def test_rows_do_not_see_each_other(flat):
    """A huge token in one row, behind what the rows have in common, changes that row alone."""
    model, batch = scorer(), rows()
    huge = len(SPECIAL)
    for name in ("input_ids", "labels"):
        batch[name] = batch[name].where(batch[name] != huge, huge + 1)
    model.get_input_embeddings().weight[huge] *= 1e4
    live = batch["attention_mask"] == 1

    def scores() -> torch.Tensor:
        if not flat:
            return run(model, batch).log_probs
        values = torch.nn.functional.pad(run(model, flattened(batch)).log_probs, (1, 0))
        return torch.zeros(live.shape).masked_scatter(live, values)[:, 1:]

    before = scores()
    batch["input_ids"][1, 19] = huge  # its label stays
    change = (scores() - before).abs()
    assert change[1, 19:24].min() > 1e-3
    assert change[[0, 2]].max() < 1e-5


# what is not packed


@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO"])
def test_switched_off(name):
    flashpo.stats(reset=True)
    trainer = make_trainer(name, flashpo.trl, share_prefix=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="FlashPO")
        trainer.train()
    assert_ran("linear_logprob_partial")
    assert "tree_attention_fwd" not in flashpo.stats()


@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO"])
def test_a_model_that_cannot_be_packed(name):
    reason, model = "qwen3: its attention is bidirectional", bidirectional_path()
    with pytest.warns(UserWarning, match="FlashPO") as said:
        trainer = make_trainer(name, flashpo.trl, model=model)
    (warning,) = [str(w.message) for w in said if "FlashPO" in str(w.message)]  # one for policy and reference
    assert warning == f"FlashPO scores padded rows here, prompts are not shared: {reason}."
    flashpo.stats(reset=True)
    trainer.train()
    assert_ran("linear_logprob_partial")
    assert "tree_attention_fwd" not in flashpo.stats()
    with pytest.raises(ValueError, match=f"share_prefix=True, but {reason}"):
        make_trainer(name, flashpo.trl, model=model, share_prefix=True)


def test_noise_on_embeddings():
    with pytest.raises(ValueError, match="share_prefix=True, but neftune_noise_alpha"):
        make_trainer("SFT", flashpo.trl, neftune_noise_alpha=5.0, share_prefix=True)
    with pytest.warns(UserWarning, match="neftune_noise_alpha"):
        assert_same_training("SFT", packed=False, neftune_noise_alpha=5.0)


def with_gap(batch):
    batch["attention_mask"][1, 3] = 0


def with_first_token_labelled(batch):
    """Padded on the left: TRL scores it by the hidden state of a padding token."""
    batch["attention_mask"][1, :5] = 0
    batch["labels"][1] = batch["input_ids"][1].masked_fill(batch["attention_mask"][1] == 0, -100)


def with_four_dimensions(batch):
    length = batch["input_ids"].shape[1]
    batch["attention_mask"] = torch.ones(len(batch["input_ids"]), 1, length, length, dtype=torch.bool).tril()


def without_mask(batch):
    del batch["attention_mask"]


def with_positions(batch):
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])


def with_wild_positions(batch):
    batch.update(flattened(batch), attention_mask=None)
    batch["position_ids"][0, 5:9] += 3


def with_rows_of_positions(batch):
    with_positions(batch)
    del batch["attention_mask"]


REFUSED = {
    with_gap: "must lie together",
    with_first_token_labelled: "a row's first token cannot be scored",
    with_four_dimensions: "attention_mask must be",
    without_mask: "the batch has no attention_mask",
    with_positions: "the batch has position_ids",
    with_wild_positions: "position_ids must count",
    with_rows_of_positions: "must be one row",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
@torch.no_grad()
def test_a_batch_that_cannot_be_packed(change):
    """It runs as TRL runs it, once with a warning; with share_prefix=True it is an error."""
    model, strict, batch = scorer(), scorer(mode=True), rows()
    change(batch)
    with stock():
        expected = run(model, batch)
    flashpo.stats(reset=True)
    with pytest.warns(UserWarning, match=f"FlashPO scores padded rows here, .*{REFUSED[change]}"):
        ours = run(model, batch)
    assert "tree_attention_fwd" not in flashpo.stats()
    assert_same([as_step(expected)], [as_step(ours)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, batch)
    with pytest.raises(ValueError, match=f"share_prefix=True, but .*{REFUSED[change]}"):
        run(strict, batch)


def test_a_device_that_is_not_ours(monkeypatch):
    monkeypatch.setattr(tree_head, "DEVICES", ("cuda",))
    with pytest.raises(ValueError, match="share_prefix=True, but the batch is on cpu"):
        run(scorer(mode=True), rows())


def test_padding_free_dpo(caplog):
    """TRL says that it is put off."""
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer("DPO", flashpo.trl, padding_free=True, train_dataset=shared("DPO"))
        assert "padding_free" not in caplog.text
        assert trainer.args.padding_free
        make_trainer("DPO", flashpo.trl, padding_free=True, share_prefix=False)
        assert "temporarily unavailable" in caplog.text
    counts = tokens_run(trainer.model)
    trainer.train()
    assert counts == [PROMPTS + answers("DPO")]


@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO", "GRPO", "RLOO", "PPO"])
def test_configurations(name):
    config = getattr(flashpo.trl, f"{name}Config")
    assert config("out", use_cpu=True, bf16=False).share_prefix == "auto"
    with pytest.raises(ValueError, match="share_prefix must be"):
        config("out", use_cpu=True, bf16=False, share_prefix="yes")


@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO", "GRPO", "RLOO", "PPO"])
def test_configurations_from_a_command_line(name):
    """As TRL's scripts read theirs."""
    config = getattr(flashpo.trl, f"{name}Config")

    def parsed(*options: str):
        line = ["--output_dir", "out", "--use_cpu", "--bf16", "false", *options]
        return trl.TrlParser((config,)).parse_args_and_config(line)[0]

    assert parsed().share_prefix == "auto"
    assert parsed("--share_prefix", "false").share_prefix is False
    assert parsed("--share_prefix", "True").share_prefix is True
    if name in ("GRPO", "RLOO", "PPO"):
        args = parsed("--rollout", "engine", "--rollout_options", '{"kv_memory": 1000}')
        assert (args.rollout, args.rollout_options) == ("engine", {"kv_memory": 1000})
        with pytest.raises(TypeError, match="rollout_options must be a dict"):
            parsed("--rollout_options", "kv_memory")
        with pytest.raises(ValueError, match="rollout_options: kv_bytes: RolloutEngine takes tokenizer, kv_memory"):
            parsed("--rollout_options", '{"kv_bytes": 1000}')


@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO"])
def test_configurations_of_trl_will_do(name, tmp_path):
    settings = dict(use_cpu=True, bf16=False, report_to="none", max_steps=1, save_strategy="no")
    model = AutoModelForCausalLM.from_pretrained(model_path())
    args = getattr(trl, f"{name}Config")(str(tmp_path), **settings)
    flashpo.stats(reset=True)
    trainer = getattr(flashpo.trl, f"{name}Trainer")(
        model, args=args, train_dataset=shared(name), processing_class=tokenizer()
    )
    trainer.train()
    assert_ran("tree_attention_fwd")


def test_other_models_of_the_process_stay_as_they_are():
    """Only what our own trainer gave a head takes trees, and TRL's function is back in its place."""
    from trl.trainer import dpo_trainer, utils

    scorer(name="DPO")
    assert dpo_trainer.add_fused_lm_head is utils.add_fused_lm_head
    model = make_trainer("DPO").model
    flashpo.stats(reset=True)
    run(model, rows())
    assert_ran("linear_logprob_partial")
    assert "tree_attention_fwd" not in flashpo.stats()
