"""`flashpo.trl.verify` agrees on every trainer, leaves the trainer as it was, and finds errors."""

import copy
import sys
from collections import deque

import numpy as np
import pytest
import torch

pytest.importorskip("trl")
import trl
from peft import LoraConfig
from transformers import TrainerCallback
from trl_models import is_clock, make_trainer, train

import flashpo.trl
from flashpo.ops.linear_logprob import LinearLogprob
from flashpo.trl import VerificationError, verify
from flashpo.trl.verify import Step, compare, tolerance_for

verification = sys.modules["flashpo.trl.verify"]  # the package has a function of that name

OPTIONS = {
    "SFT": {},
    "DPO": dict(gradient_accumulation_steps=2),
    "KTO": {},
    "GRPO": dict(per_device_train_batch_size=8, beta=0.04, num_iterations=2),
    "RLOO": dict(per_device_train_batch_size=8, beta=0.04),
}


@pytest.mark.parametrize("package", [trl, flashpo.trl], ids=["trl", "flashpo"])
@pytest.mark.parametrize("name", OPTIONS)
def test_agrees(name, package):
    trainer = make_trainer(name, package, **OPTIONS[name])
    report = verify(trainer)
    assert not report.disagreements
    assert {line.step for line in report.lines} == {0, 1}
    names = {line.name for line in report.lines}
    assert {"loss", "entropy", "grad model.embed_tokens.weight", "grad lm_head.weight"} <= names
    assert report.ops["linear_logprob_partial"]
    assert ("tree_attention_bwd" in report.ops) == (package is flashpo.trl)
    assert "all agree" in str(report)
    first, *rows, last = str(report).splitlines()
    assert first == last, "the verdict, where it is seen without scrolling"
    assert len(rows) == 5, "what agrees is a line for each kind"
    assert any(line.stock > 0 for line in report.lines if line.name.startswith("grad "))


@pytest.mark.parametrize("name", ["SFT", "GRPO"])
def test_bf16_autocast_lora(name):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    report = verify(make_trainer(name, bf16=True, peft_config=lora, gradient_checkpointing=True, **OPTIONS[name]))
    assert report.dtype == torch.bfloat16
    assert all("lora" in line.name for line in report.lines if line.name.startswith("grad "))


@pytest.mark.parametrize("name", OPTIONS)
def test_training_after_it_is_as_if_it_had_not_been(name):
    """Bit for bit: parameters, optimizer, batches, dropout, generation, metrics."""
    options = OPTIONS[name] | dict(max_steps=2)
    plain = make_trainer(name, **options)
    expected = train(plain)
    verified = make_trainer(name, **options)  # which seeds the random state again
    verified.model.eval()  # a mode that is not the one of a step
    random_state = torch.get_rng_state()
    attributes = {k: id(v) for k, v in verified.__dict__.items()}
    metrics = copy.deepcopy(dict(verified._metrics["train"]))
    verify(verified)
    assert {k: id(v) for k, v in verified.__dict__.items()} == attributes
    assert dict(verified._metrics["train"]) == metrics
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not verified.model.training
    assert all(p.grad is None for p in verified.model.parameters())
    for stock, ours in zip(expected, train(verified), strict=True):
        assert stock.loss == ours.loss
        assert stock.metrics == ours.metrics
        assert all(torch.equal(g, ours.gradients[n]) for n, g in stock.gradients.items())
    for a, b in zip(plain.model.parameters(), verified.model.parameters(), strict=True):
        assert torch.equal(a, b)


class Verifies(TrainerCallback):
    """Runs `verify` at the end of a step in the middle of a run; what it may have changed, before and after."""

    def __init__(self, at: int = 2):
        self.at, self.before, self.after = at, None, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            self.before = everything(self.trainer)
            verify(self.trainer, steps=1)
            self.after = everything(self.trainer)


def everything(trainer) -> dict:
    """All that a trainer keeps, deep, as text; the model, the optimizer and random states by their numbers."""
    apart = ("model", "model_wrapped", "ref_model", "optimizer", "lr_scheduler", "accelerator", "critic")
    attributes = {name: value for name, value in trainer.__dict__.items() if name not in apart}
    models = [m for m in (trainer.model, getattr(trainer, "ref_model", None)) if m is not None]
    return {
        "attributes": {name: deep(value) for name, value in attributes.items()},
        "models": [deep(dict(m.state_dict())) for m in models],
        "gradients": [deep([p.grad for p in m.parameters()]) for m in models],
        "modes": [[module.training for module in m.modules()] for m in models],
        "forwards": [[id(module.__dict__.get("forward")) for module in m.modules()] for m in models],
        "optimizer": deep(trainer.optimizer.state_dict()),
        "random": deep(list(verification._random_state())),
    }


def deep(value, seen=()):
    """Comparable with ==: numbers of tensors and arrays, and the attributes of our own objects."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if id(value) in seen:
        return "itself"
    seen = (*seen, id(value))
    if isinstance(value, torch.Tensor):
        return value.dtype, value.detach().cpu().flatten().tolist()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): deep(x, seen) for key, x in value.items()}
    if isinstance(value, list | tuple | set | deque):
        return [deep(x, seen) for x in value]
    ours = type(value).__module__.startswith(("flashpo.trl", "flashpo.ops", "transformers.trainer_callback"))
    if ours and not isinstance(value, type) and not callable(value):
        return {name: deep(x, seen) for name, x in vars(value).items() if name != "trainer"}
    return id(value)


MID_RUN = {
    "GRPO": dict(num_iterations=2, steps_per_generation=2, gradient_accumulation_steps=2, beta=0.04),
    "RLOO": dict(beta=0.04, num_iterations=2),
    "PPO": dict(num_iterations=2),
    "SFT": {},
    "DPO": {},
    "KTO": {},
}


@pytest.mark.parametrize("name", MID_RUN)
def test_in_the_middle_of_a_run(name):
    """Statistics that wait for the log, generations in use and the engine are as before; so is the rest of the run."""
    options = MID_RUN[name] | dict(max_steps=4, logging_steps=3)
    expected = make_trainer(name, flashpo.trl, **options)
    expected.train()
    trainer = make_trainer(name, flashpo.trl, **options)
    callback = Verifies()
    callback.trainer = trainer
    trainer.add_callback(callback)
    trainer.train()
    for part, before in callback.before.items():
        assert callback.after[part] == before, part
    if name in ("GRPO", "RLOO", "PPO"):
        assert callback.before["attributes"]["_pending"]["stats"]["train"], "nothing was waiting"
        assert callback.before["attributes"]["_pending"]["turns"] == [True], "TRL generated"
    logs = [
        [{k: v for k, v in log.items() if not is_clock(k) and "per_second" not in k} for log in t.state.log_history]
        for t in (expected, trainer)
    ]
    assert logs[0] == logs[1]
    for a, b in zip(expected.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_after_training_too():
    """The optimizer has a state then, and GRPO a buffer of completions."""
    trainer = make_trainer("GRPO", max_steps=1, **OPTIONS["GRPO"])
    trainer.train()
    before = copy.deepcopy(trainer.optimizer.state_dict())
    buffered, step = trainer._buffered_inputs, trainer._step
    verify(trainer, steps=1)
    assert trainer._buffered_inputs is buffered
    assert trainer._step == step
    after = trainer.optimizer.state_dict()
    assert all(torch.equal(v, after["state"][i][k]) for i, s in before["state"].items() for k, v in s.items())


@pytest.mark.parametrize("scale", [1.001, 0.0])
def test_a_wrong_gradient_is_found(scale, monkeypatch):
    """Forward right, backward wrong (Liger#968, #1298): loss and metrics agree."""
    backward = LinearLogprob.backward
    monkeypatch.setattr(LinearLogprob, "backward", staticmethod(lambda ctx, *g: _scaled(backward(ctx, *g), scale)))
    with pytest.raises(VerificationError, match="disagree on grad") as error:
        verify(make_trainer("SFT"))
    wrong = {line.name for line in error.value.report.disagreements}
    assert "grad model.embed_tokens.weight" in wrong
    assert "loss" not in wrong
    assert "<-- disagrees" in str(error.value)


def _scaled(grads, scale):
    return tuple(None if g is None else scale * g for g in grads)


def test_a_dropped_temperature_is_found(monkeypatch):
    """unsloth-zoo#832."""
    forward = LinearLogprob.forward

    def cold(ctx, hidden, weight, target, bias, token_temperature, temperature, *rest):
        return forward(ctx, hidden, weight, target, bias, token_temperature, 1.0, *rest)

    monkeypatch.setattr(LinearLogprob, "forward", staticmethod(cold))
    with pytest.raises(VerificationError, match="entropy"):
        verify(make_trainer("GRPO", **OPTIONS["GRPO"]))


def test_no_steps_verify_nothing():
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        verify(make_trainer("SFT"), steps=0)


def test_a_patch_that_does_nothing_is_found(monkeypatch):
    monkeypatch.setattr(sys.modules["flashpo.trl.patch"], "DEVICES", ())
    with pytest.raises(VerificationError, match="none of FlashPO's operators ran"):
        verify(make_trainer("SFT"))


def test_a_failed_verification_restores_too(monkeypatch):
    trainer = make_trainer("SFT")
    attributes = dict(trainer.__dict__)
    monkeypatch.setattr(LinearLogprob, "backward", staticmethod(lambda ctx, *grads: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        verify(trainer)
    assert trainer.__dict__ == attributes


def test_compare_does_not_pass_nan_or_a_missing_gradient():
    one = {"a": torch.ones(3)}
    nan = Step(1.0, {"kl": float("nan")}, one)
    tolerance = tolerance_for(torch.float32)
    assert all(line.agrees for line in compare(0, nan, nan, tolerance))
    for other in (
        Step(1.0, {"kl": 0.0}, one),
        Step(1.0, {}, {}),
        Step(1.0, {"kl": float("nan")}, {}),
        Step(1.0, {"kl": float("nan")}, {"a": torch.full((3,), float("nan"))}),
        Step(float("nan"), {"kl": float("nan")}, one),
        Step(float("inf"), {"kl": float("nan")}, one),
    ):
        assert not all(line.agrees for line in compare(0, nan, other, tolerance))
