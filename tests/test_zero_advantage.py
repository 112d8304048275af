"""Completions with zero advantage are left out of the training pass; gradients and metrics do not change."""

import copy

import pytest
import torch

pytest.importorskip("trl")
import trl
from peft import LoraConfig
from policy_inputs import PRESETS
from test_policy_loss import batch, tensors_for
from trl_models import SAMPLED_BY_TRL, assert_same, make_trainer, reward, train

import flashpo.trl
from flashpo import LossSpec, pack, policy_loss
from flashpo.trl.scoring import idle_rows
from flashpo.trl.verify import Step

LORA = dict(peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
WITH_OTHER_TERMS = [
    *[dict(kl_coef=0.1, kl=kl) for kl in ("k1", "abs", "k2", "k3", "k1+", "abs+", "k3+")],
    dict(kl_coef=-0.1),
    dict(entropy_coef=0.1),
    dict(entropy_coef=-0.1, entropy_mean="loss"),
]
SPECS = [
    *PRESETS.values(),
    *[LossSpec(ratio=ratio, surrogate=x) for ratio in ("sequence", "sequence_token") for x in ("cispo", "sapo")],
    LossSpec(importance="sequence_truncate", importance_max=2.0, top_entropy=0.5, off_policy_threshold=0.1),
    *[LossSpec(**terms) for terms in WITH_OTHER_TERMS],
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.surrogate}-{spec.ratio}-{spec.aggregation}")
def test_what_a_spec_says_of_itself(spec):
    """Rows of advantage 0 have a gradient exactly where `zero_advantage_is_zero_gradient` is false, in log-probs or
    entropies; and where it is true, whatever their log-probs are, the loss and the others' gradients are the same."""
    made = batch(B=6, T=9)
    made["mask"][:2] = True
    made["advantage"][:2] = 0
    inputs = {name: x.nan_to_num(nan=-1.0) if x.is_floating_point() else x for name, x in made.items()}
    if spec.top_entropy < 1:
        inputs["entropy"][:2] += 3  # they are not the ones that it leaves out

    def run(shift: float):
        logprob, entropy = inputs["logprob"].clone(), inputs["entropy"].clone().requires_grad_()
        logprob[:2] += shift * torch.linspace(-1, 1, 18, dtype=logprob.dtype).view(2, 9)
        logprob.requires_grad_()
        loss = policy_loss(**tensors_for(spec, inputs | {"logprob": logprob, "entropy": entropy}), loss=spec).loss
        gradients = torch.autograd.grad(loss, [logprob, entropy], allow_unused=True)
        return loss, [x for x in gradients if x is not None]

    loss, gradients = run(0.0)
    has_gradient = any((x[:2] != 0).any() for x in gradients)
    assert has_gradient != spec.zero_advantage_is_zero_gradient
    assert any((x[2:] != 0).any() for x in gradients)
    if spec.zero_advantage_is_zero_gradient:
        moved_loss, moved = run(0.5)
        torch.testing.assert_close(moved_loss, loss, rtol=1e-12, atol=0)
        torch.testing.assert_close([x[2:] for x in moved], [x[2:] for x in gradients], rtol=1e-12, atol=0)


def test_a_prompt_is_idle_as_a_whole():
    prompts = torch.tensor([[0, 5], [0, 6], [0, 5], [0, 7], [0, 7], [0, 8]])
    mask = torch.tensor([[1, 1], [1, 0], [1, 0], [1, 0], [0, 0], [0, 0]])
    idle = lambda advantages: idle_rows(torch.tensor(advantages), mask, prompts).tolist()  # noqa: E731
    assert idle([0.0, 0.0, 1.0, 0.0, 9.0, 0.0]) == [False, True, False, True, False, False]
    assert idle([0.0, float("nan"), 0.0, -1.0, 0.0, 0.0]) == [True, False, True, False, False, False]
    # of tokens: what stands behind a row's end does not count
    assert idle([[0.0, 0.0], [0.0, 9.0], [0.0, 9.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])[:4] == [
        True,
        True,
        True,
        False,
    ]


def halves(prompts, completion_ids, **kwargs) -> list[float]:
    """Every other group is degenerate."""
    values, distinct = reward(None, completion_ids), sorted(set(prompts))
    return [1.0 if distinct.index(prompt) % 2 else value for prompt, value in zip(prompts, values)]


class Watch:
    """How many tokens enter the trainer's backbone to be trained, and to be only scored, in its losses; how many ought
    to: what is left of rows with an advantage, of rows without, of all; and rows without a live token."""

    def __init__(self, trainer):
        self.trained, self.scored, self.expected = [], [], []
        self.empty, self.inside = 0, False
        backbone = trainer.accelerator.unwrap_model(trainer.model)
        backbone = getattr(backbone, "get_base_model", lambda: backbone)().model
        backbone.register_forward_pre_hook(self.seen, with_kwargs=True)
        self.loss = trainer._compute_loss
        trainer._compute_loss = self.compute_loss

    def seen(self, module, args, kwargs):
        if self.inside:  # not again in backward
            (self.trained if torch.is_grad_enabled() else self.scored).append(kwargs["input_ids"].shape[1])

    def compute_loss(self, model, inputs):
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        self.empty += int((mask.sum(1) == 0).sum())
        idle = (inputs["advantages"] == 0)[:, None]
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        live = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        self.expected.append(
            [len(pack(ids, live, mask * rows).tokens) for rows in (~idle, idle, torch.ones_like(idle))]
        )
        self.inside = True
        try:
            return self.loss(model, inputs)
        finally:
            self.inside = False


def steps_of(name: str, skip: bool, **options) -> tuple[list[Step], Watch]:
    options = dict(per_device_train_batch_size=8, reward_funcs=halves, **SAMPLED_BY_TRL[name]) | options
    trainer = make_trainer(name, flashpo.trl, skip_zero_advantage=skip, **options)
    watch = Watch(trainer)
    return train(trainer), watch


OPTIONS: dict[str, dict] = {
    "one step": {},
    "micro-batches without any advantage": dict(per_device_train_batch_size=4, gradient_accumulation_steps=4),
    "off-policy": dict(num_iterations=2, steps_per_generation=2, max_steps=4, learning_rate=1e-2),
    "masked truncated completions": dict(
        mask_truncated_completions=True, generation_kwargs={"sequence_bias": [[[1], 6.0]]}, num_generations=8,
        per_device_train_batch_size=16,
    ),
    "checkpointed lora": dict(gradient_checkpointing=True, **LORA),
    "high-entropy tokens": dict(top_entropy_quantile=0.5),
    "a loss of sequences": dict(loss="gspo"),
}  # fmt: skip
RLOO = ("one step", "micro-batches without any advantage", "masked truncated completions")


@pytest.mark.parametrize(("name", "options"), [*[("GRPO", x) for x in OPTIONS], *[("RLOO", x) for x in RLOO]], ids=str)
def test_gradients_and_metrics_are_those_of_all_rows(name, options):
    whole, every = steps_of(name, False, **OPTIONS[options])
    steps, watch = steps_of(name, True, **OPTIONS[options])
    assert_same(whole, steps)
    assert every.scored == []
    assert every.trained == [n for _, _, n in every.expected]
    assert watch.trained == [trained for trained, idle, n in watch.expected]
    assert watch.scored == [idle for _, idle, n in watch.expected if idle > 1]
    assert 0 < sum(watch.scored) < sum(every.trained)
    if options.startswith("micro-batches"):
        assert 1 in watch.trained  # the token that stands in
    if options.startswith("masked"):
        assert 0 < watch.empty < 16


def test_bf16():
    """Autocast casts a weight once for both forwards, where a caller's is around them, as verify's: the gradient must
    not get lost in it."""
    options = dict(per_device_train_batch_size=8, reward_funcs=halves, bf16=True, gradient_checkpointing=True)
    trainer = make_trainer("GRPO", flashpo.trl, **options, **LORA)
    watch = Watch(trainer)
    flashpo.trl.verify(trainer)
    assert watch.scored


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_same_as_trl(name):
    """A whole training, metrics included."""
    options = dict(per_device_train_batch_size=8, reward_funcs=halves, gradient_accumulation_steps=2, max_steps=2)
    stock = train(make_trainer(name, trl, **options))
    trainer = make_trainer(name, flashpo.trl, **options, **SAMPLED_BY_TRL[name])
    watch = Watch(trainer)
    assert_same(stock, train(trainer))
    assert watch.scored


@pytest.mark.parametrize(
    "options",
    [
        dict(beta=0.04),
        dict(entropy_coef=0.01),
        dict(share_prefix=False),
        dict(model="qwen3_moe", router_aux_loss_coef=0.1),
        pytest.param(dict(reward_funcs=reward), id="no equal rewards"),
    ],
    ids=str,
)
def test_what_has_a_gradient_is_trained(options):
    _, watch = steps_of("GRPO", True, **options)
    assert watch.scored == []
    assert len(watch.trained) == 1


def test_a_mixture_of_experts_without_its_auxiliary_loss():
    options = dict(model="qwen3_moe", router_aux_loss_coef=0.0)
    assert_same(steps_of("GRPO", False, **options)[0], steps_of("GRPO", True, **options)[0])


def test_a_critic_learns_from_equal_rewards():
    trainer = make_trainer(
        "PPO", flashpo.trl, per_device_train_batch_size=8, reward_funcs=lambda prompts, **_: [1.0] * 8
    )
    (step,) = train(trainer)
    assert any(g.abs().max() > 0 for g in step.gradients.values())


def test_evaluation_is_one_forward():
    trainer = make_trainer("GRPO", flashpo.trl, per_device_train_batch_size=8, reward_funcs=halves)
    inputs = generated(trainer)
    watch = Watch(trainer)
    with torch.no_grad():
        trainer.compute_loss(trainer.model, inputs)
    assert len(watch.scored) == 1


def generated(trainer) -> dict:
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # `train` sets it
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert 0 < (inputs["advantages"] == 0).sum() < len(inputs["advantages"])
    return inputs


def test_tool_masks_and_advantages_of_tokens():
    """On one batch, directly: what tools wrote is idle too, and a row counts by its own tokens."""
    trainer = make_trainer("GRPO", flashpo.trl, per_device_train_batch_size=8, reward_funcs=halves)
    inputs = generated(trainer)
    torch.manual_seed(4)
    tool_mask = (torch.rand(inputs["completion_mask"].shape) > 0.3).long()
    of_tokens = inputs["advantages"][:, None] * torch.randn(tool_mask.shape)
    for changes in ({"tool_mask": tool_mask}, {"tool_mask": tool_mask, "advantages": of_tokens}):
        found = []
        for skip in (False, True):
            trainer.args.skip_zero_advantage = skip
            trainer.model.zero_grad()
            trainer._metrics["train"].clear()
            trainer.compute_loss(trainer.model, copy.copy(inputs) | changes).backward()
            trainer.flush_metrics()
            metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
            found.append(Step(0.0, metrics, {n: p.grad.clone() for n, p in trainer.model.named_parameters()}))
        assert_same(found[:1], found[1:])
