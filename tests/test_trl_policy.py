"""TRL's `_compute_loss` and ours on the same tensors, without a model: loss, gradients and metrics."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from trl_models import make_trainer

import flashpo.trl
from flashpo.trl.patch import patched, stock
from flashpo.trl.verify import ADDED

B, T = 6, 13


@pytest.fixture(scope="module")
def grpo():
    trainer = make_trainer("GRPO", flashpo.trl, beta=0.04, steps_per_generation=4, gradient_accumulation_steps=4)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 4  # as transformers' training loop sets it
    return trainer


def tensors():
    """Inputs of `_compute_loss`, ragged, off-policy, with rubbish where the mask is 0 (TRL has zeros there)."""
    lengths = torch.randint(1, T + 1, (B,))
    lengths[0] = T
    mask = (torch.arange(T) < lengths[:, None]).long()
    logprob = -3 * torch.rand(B, T) * mask
    return logprob, torch.rand(B, T) * 3 * mask, {
        "prompt_ids": torch.zeros(B, 2, dtype=torch.long),
        "prompt_mask": torch.ones(B, 2, dtype=torch.long),
        "completion_ids": torch.zeros(B, T, dtype=torch.long),
        "completion_mask": mask,
        "advantages": torch.randn(B),
        "num_items_in_batch": mask.sum() * 3,
        "old_per_token_logps": logprob + 0.4 * torch.randn(B, T) * mask,
        "ref_per_token_logps": logprob + 0.5 * torch.randn(B, T) * mask,
        "sampling_per_token_logps": logprob + 0.4 * torch.randn(B, T) * mask,
    }  # fmt: skip


def compute(trainer, logprob, entropy, inputs):
    """Loss, metrics and the gradients of log-probs and entropies."""
    logprob, entropy = logprob.clone().requires_grad_(), entropy.clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logprob * 1.0, entropy * 1.0, None)
    trainer._metrics["train"].clear()
    try:
        loss = trainer._compute_loss(None, copy.copy(inputs))
        (1.7 * loss).backward()
        getattr(trainer, "flush_metrics", lambda: None)()
    finally:
        del trainer._get_per_token_logps_and_entropies
    metrics = {name: torch.tensor(float(values[-1])) for name, values in trainer._metrics["train"].items()}
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in (logprob, entropy)]
    return {"loss": loss.detach(), "d logprob": grads[0], "d entropy": grads[1], **metrics}


def assert_same_loss(trainer, logprob, entropy, inputs):
    state = {name: copy.deepcopy(getattr(trainer, name)) for name in CONTROLLER if hasattr(trainer, name)}
    with stock():
        expected = compute(trainer, logprob, entropy, inputs)
    after = {name: getattr(trainer, name) for name in state}
    for name, value in state.items():
        setattr(trainer, name, value)
    flashpo.stats(reset=True)
    with patched():
        ours = compute(trainer, logprob, entropy, inputs)
    assert flashpo.stats()["policy_loss_fwd"]
    torch.testing.assert_close({name: getattr(trainer, name) for name in state}, after)
    assert expected["d logprob"].abs().max() > 0
    for name, value in expected.items():
        torch.testing.assert_close(
            ours[name], value, rtol=2e-5, atol=2e-6, equal_nan=True, msg=f"{name}: {ours[name]} for TRL's {value}"
        )
    assert {name for name in ours if not name.startswith(ADDED)} == set(expected)
    return ours


CONTROLLER = ("entropy_coef", "_last_world_entropy", "_entropy_window_stats")
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")


def configure(trainer, monkeypatch, **options):
    """Set the options where TRL reads them: in the trainer, its arguments, or both."""
    for name, value in options.items():
        for target in (trainer, trainer.args):
            if hasattr(target, name):
                monkeypatch.setattr(target, name, value)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_grpo(grpo, loss_type, level, monkeypatch):
    """Every loss x level x beta x delta x masks x importance ratios x gradient accumulation x steps per generation."""
    configure(grpo, monkeypatch, loss_type=loss_type, importance_sampling_level=level)
    ratios = {
        None: None,
        "token": 0.5 + torch.rand(B, T),
        "sequence": 0.5 + torch.rand(B, 1),
    }
    axes = itertools.product(
        (0.0, 0.04), (None, 1.5), ("completion", "tool", "empty row"), ratios, (1, 4), (1, 4), (True, False)
    )
    for i, (beta, delta, mask, ratio, accumulation, per_generation, corrected) in enumerate(axes):
        if (delta and loss_type in ("cispo", "sapo", "vespo")) or (ratio == "sequence" and loss_type == "vespo"):
            continue  # TRL ignores the one and refuses the other
        logprob, entropy, inputs = tensors()
        if mask == "tool":
            inputs["tool_mask"] = (torch.rand(B, T) > 0.3).long()
        elif mask == "empty row":
            inputs["completion_mask"] = inputs["completion_mask"].index_fill(0, torch.tensor([2]), 0)
        if ratio:
            live = inputs["completion_mask"] * inputs.get("tool_mask", 1)
            inputs["importance_sampling_ratio"] = (
                torch.where(live == 1, ratios[ratio], 1.0) if ratio == "token" else ratios[ratio]
            )
        if i % 3 == 0:
            del inputs["old_per_token_logps"]
        monkeypatch.setattr(grpo, "current_gradient_accumulation_steps", accumulation)
        configure(
            grpo, monkeypatch, beta=beta, delta=delta, use_vllm=ratio is not None, steps_per_generation=per_generation,
            vllm_importance_sampling_correction=True, use_bias_correction_kl=corrected,
        )  # fmt: skip
        assert_same_loss(grpo, logprob, entropy, inputs)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_grpo_off_policy_mask_and_high_entropy_tokens(grpo, loss_type, monkeypatch):
    for threshold, top, beta in itertools.product((None, 0.05), (1.0, 0.3), (0.0, 0.04)):
        logprob, entropy, inputs = tensors()
        inputs["sampling_per_token_logps"][1, 0] = torch.nan  # the sampler did not say
        configure(
            grpo, monkeypatch, loss_type=loss_type, off_policy_mask_threshold=threshold, top_entropy_quantile=top,
            beta=beta,
        )  # fmt: skip
        assert_same_loss(grpo, logprob, entropy, inputs)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_grpo_entropy_bonus(grpo, loss_type, adaptive, monkeypatch):
    """Also the controller's state after each of three steps."""
    configure(
        grpo, monkeypatch, loss_type=loss_type, _entropy_bonus_enabled=True, use_adaptive_entropy=adaptive,
        entropy_coef=0.03, top_entropy_quantile=0.5, entropy_target=1.7, entropy_coef_delta=0.01, entropy_coef_max=0.05,
        _last_world_entropy=0.0, _entropy_window_stats=None,
    )  # fmt: skip
    bonus = [assert_same_loss(grpo, *tensors())["d entropy"].abs().max() > 0 for _ in range(3)]
    assert bonus[0]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_grpo_advantages_of_tokens(grpo, loss_type, level, monkeypatch):
    configure(grpo, monkeypatch, loss_type=loss_type, importance_sampling_level=level)
    logprob, entropy, inputs = tensors()
    inputs["advantages"] = torch.randn(B, T)
    assert_same_loss(grpo, logprob, entropy, inputs)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_log_ratios_beyond_88_are_finite(grpo, loss_type, monkeypatch):
    """Soup#342: a clipped, valid token far off-policy gives TRL a finite loss and NaN gradients."""
    configure(grpo, monkeypatch, loss_type=loss_type, beta=0.0)
    logprob, entropy, inputs = tensors()
    inputs["old_per_token_logps"][0, :2] = torch.tensor([-95.0, -120.0])
    inputs["old_per_token_logps"][1, 0] = 110.0
    inputs["advantages"][:2] = torch.tensor([1.0, -1.0])
    with stock():
        theirs = compute(grpo, logprob, entropy, inputs)
    with patched():
        ours = compute(grpo, logprob, entropy, inputs)
    assert ours["loss"].isfinite()
    assert ours["d logprob"].isfinite().all()
    if loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "sapo"):
        assert theirs["d logprob"][0, :2].isnan().all()
        assert (ours["d logprob"][0, :2] == 0).all()  # clipped, or the gate is flat


def test_rloo(monkeypatch):
    trainer = make_trainer("RLOO", flashpo.trl)
    trainer.model.train()
    for mask in ("completion", "empty row"):
        logprob, entropy, inputs = tensors()
        if mask == "empty row":
            inputs["completion_mask"] = inputs["completion_mask"].index_fill(0, torch.tensor([2]), 0)
            inputs["old_per_token_logps"][2] = 0
        inputs["old_logps"] = (inputs["old_per_token_logps"] * inputs["completion_mask"]).sum(1)
        assert_same_loss(trainer, logprob, entropy, inputs)


def test_gmpo(grpo, monkeypatch):
    """TRL's experimental GMPOTrainer, which has a loss of its own, against `loss="gmpo"`."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gmpo import GMPOTrainer

    monkeypatch.setattr(grpo, "epsilon_low", 0.4)
    monkeypatch.setattr(grpo, "epsilon_high", 0.4)
    for top, beta, empty in itertools.product((1.0, 0.5), (0.0, 0.04), (False, True)):
        logprob, entropy, inputs = tensors()
        if empty:
            inputs["completion_mask"] = inputs["completion_mask"].index_fill(0, torch.tensor([2]), 0)
        configure(grpo, monkeypatch, beta=beta, top_entropy_quantile=top)
        with stock(), monkeypatch.context() as patch:
            patch.setattr(type(grpo), "_compute_loss", GMPOTrainer._compute_loss)
            expected = compute(grpo, logprob, entropy, inputs)
        spec = replace(flashpo.LOSSES["gmpo"], kl_coef=beta, top_entropy=top)
        with patched(), monkeypatch.context() as patch:
            patch.setattr(grpo, "_loss_spec", lambda spec=spec: spec)
            ours = compute(grpo, logprob, entropy, inputs)
        for name, value in expected.items():
            torch.testing.assert_close(ours[name], value, rtol=2e-5, atol=2e-6, equal_nan=True)
