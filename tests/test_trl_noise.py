"""Dropout in training does not count as a mismatch between sampler and trainer, wherever it is in the forward."""

import copy
import logging

import pytest
import torch
import transformers
from peft import LoHaConfig, LoraConfig
from transformers import AutoModelForCausalLM
from transformers.integrations import activate_neftune
from trl_models import SMALL, make_trainer, tokenizer

import flashpo.trl
from flashpo import LOSSES
from flashpo.trl.noise import RandomDraws
from flashpo.trl.patch import patched
from flashpo.trl.policy import QUIET

LONG = dict(max_completion_length=48, temperature=1.0)
ENGINE = dict(rollout="engine", rollout_options={"check": False})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models that have dropout in their layers, by the name of the kind."""
    sizes = dict(vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=256, initializer_range=0.3)
    ends = dict(pad_token_id=0, eos_token_id=1, bos_token_id=1)
    configs = {
        "residual": transformers.GPT2Config(**sizes, **ends, resid_pdrop=0.1, embd_pdrop=0.0, attn_pdrop=0.0),
        "embedding": transformers.GPT2Config(**sizes, **ends, resid_pdrop=0.0, embd_pdrop=0.1, attn_pdrop=0.0),
        "router": transformers.MixtralConfig(**SMALL, num_local_experts=4, router_jitter_noise=0.1),
    }
    found = {}
    for kind, config in configs.items():
        torch.manual_seed(0)
        folder = str(tmp_path_factory.mktemp(kind))
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        found[kind] = folder
    return found


ADAPTERS = {
    "lora": LoraConfig(r=8, lora_alpha=64, lora_dropout=0.1, target_modules="all-linear", init_lora_weights=False),
    "loha": LoHaConfig(r=4, alpha=16, module_dropout=0.3, target_modules=["q_proj", "o_proj"], init_weights=False),
}
NOISES = ["lora", "loha", "residual", "embedding", "router", "neftune"]


def noisy_trainer(kind: str, folders: dict, name: str = "GRPO", **options):
    options = {**ENGINE, **LONG, "share_prefix": False, **options}
    if kind in ADAPTERS:
        options["peft_config"] = ADAPTERS[kind]
    if kind == "neftune":
        options["neftune_noise_alpha"] = 5
    trainer = make_trainer(name, flashpo.trl, folders.get(kind, "qwen3"), **options)
    if kind == "neftune":
        activate_neftune(trainer.model, trainer.neftune_noise_alpha, trainer.accelerator)  # as `train` does
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def generated(trainer) -> dict:
    with patched():
        batch = trainer._generate_and_score_completions([{"prompt": "a b"}] * 4)
    batch.setdefault("num_items_in_batch", batch["completion_mask"].sum())
    batch["advantages"] = torch.tensor([1.0, -0.5, 2.0, 0.3])[:, None].expand_as(batch["completion_ids"]).contiguous()
    return batch


def gradient(trainer, batch: dict) -> torch.Tensor:
    trainer.model.zero_grad()
    torch.manual_seed(5)  # the same dropout each time
    with patched():
        trainer._compute_loss(trainer.model, copy.copy(batch)).backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def uncorrected(trainer, batch: dict) -> torch.Tensor:
    """The gradient as TRL has it for completions that it generated itself."""
    return gradient(trainer, {name: x for name, x in batch.items() if name not in ("sampling_per_token_logps", QUIET)})


@pytest.mark.parametrize("name", ["GRPO", "PPO"])
@pytest.mark.parametrize("kind", NOISES)
def test_noise_of_training_weighs_no_completion(kind, name, folders, caplog):
    if name == "PPO" and kind not in ("lora", "residual"):
        pytest.skip("PPO takes the decision from GRPO: two kinds are enough")
    trainer = noisy_trainer(kind, folders, name)
    batch = generated(trainer)
    with caplog.at_level(logging.INFO, "flashpo"):
        ours, expected = gradient(trainer, batch), uncorrected(trainer, batch)
    assert expected.abs().max() > 0
    assert torch.equal(ours, expected)
    assert "rollout_correction='scored'" in caplog.text
    trainer.flush_metrics()
    assert not any(key.startswith("rollout/mismatch") for key in trainer._metrics["train"])
    weighed = gradient(trainer, {**batch, QUIET: batch["sampling_per_token_logps"] + 1.0})  # the check can fail
    assert not torch.equal(weighed, expected)


@pytest.mark.parametrize("kind", ["lora", "residual"])
def test_scored_without_noise_the_true_mismatch_is_corrected(kind, folders):
    trainer = noisy_trainer(kind, folders, rollout_correction="scored", vllm_importance_sampling_mode="token_truncate")
    batch = generated(trainer)
    agreeing, expected = gradient(trainer, batch), uncorrected(trainer, batch)
    torch.testing.assert_close(agreeing, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())
    trainer.flush_metrics()
    assert trainer._metrics["train"]["rollout/mismatch/max"][0] < 1e-4
    off = {**batch, "sampling_per_token_logps": batch["sampling_per_token_logps"] - 0.5}
    corrected = gradient(trainer, off)
    scale = torch.tensor(0.5).exp().item()
    torch.testing.assert_close(corrected, scale * expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())
    trainer.flush_metrics()
    assert trainer._metrics["train"]["rollout/mismatch/mean"][-1] == pytest.approx(0.5, abs=1e-4)


def test_a_spec_that_asks_for_weights_gets_them_without_noise(folders):
    """`importance` in a LossSpec is a demand, where TRL's options are a default."""
    loss = flashpo.LossSpec(**{**vars(LOSSES["grpo"]), "importance": "token_truncate", "importance_max": 3.0})
    batch = generated(noisy_trainer("lora", folders, loss=loss))
    assert QUIET in batch
    quiet = noisy_trainer("qwen3", folders, loss=loss)
    gradient(quiet, generated(quiet))
    assert QUIET not in generated(quiet)  # a forward that draws nothing is quiet enough: it is known after the first


def test_without_noise_the_mismatch_is_corrected_and_logged(folders):
    trainer = noisy_trainer("qwen3", folders)
    batch = generated(trainer)
    assert QUIET not in batch
    off = {**batch, "sampling_per_token_logps": batch["sampling_per_token_logps"] - 2.0}
    assert gradient(trainer, off).abs().max() == 0  # TRL's default masks sequences this far off
    trainer.flush_metrics()
    assert trainer._metrics["train"]["rollout/mismatch/mean"][0] == pytest.approx(2.0, abs=1e-4)


def test_sequences_too_far_off_policy_are_judged_by_the_same_noise(folders):
    """The threshold compares the trainer with what TRL's own generation leaves: the trainer itself."""
    trainer = noisy_trainer("lora", folders, off_policy_mask_threshold=1e-6)
    batch = generated(trainer)
    assert torch.equal(gradient(trainer, batch), uncorrected(trainer, batch))


@pytest.mark.parametrize(
    "options", [{"rollout": "generate"}, {"old_logprobs": "rollout"}, {"vllm_importance_sampling_correction": False}]
)
def test_scoring_that_nothing_would_read_is_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        flashpo.trl.GRPOConfig("out", use_cpu=True, rollout_correction="scored", **options)
    with pytest.raises(ValueError, match="rollout_correction"):
        flashpo.trl.GRPOConfig("out", use_cpu=True, rollout_correction="always")


def test_drawing_is_seen_and_nothing_else():
    layer, x = torch.nn.Dropout(0.5), torch.ones(4)
    draws = RandomDraws(x.device)
    layer.eval()(x)
    torch.rand(3, generator=torch.Generator())
    assert not draws
    layer.train()(x)
    assert draws
