"""One optimisation step of stock TRL and of ours: the same loss, gradients and logged metrics, over TRL's options."""

import copy
import itertools

import pytest
import torch

pytest.importorskip("trl")
import trl
from datasets import Dataset
from peft import LoraConfig
from trl_models import CONFIGS, DATA, assert_ran, assert_same, assert_same_training, make_trainer, train

import flashpo.trl
from flashpo.trl import patched
from flashpo.trl.verify import Step

LORA = dict(peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
METHODS = ("SFT", "DPO", "KTO", "GRPO", "RLOO")
RL = dict(per_device_train_batch_size=8)


@pytest.mark.parametrize("options", [{}, {"loss_type": "dft"}, {"completion_only_loss": False}], ids=str)
def test_sft(options):
    assert_same_training("SFT", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "sigmoid"},
        {"loss_type": "ipo"},
        {"loss_type": "robust", "label_smoothing": 0.1},
        {"loss_type": "apo_zero"},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"loss_type": "sigmoid", "use_weighting": True},
        {"loss_type": "sigmoid", "ld_alpha": 0.5},
        {"precompute_ref_log_probs": True},
    ],
    ids=str,
)
def test_dpo(options):
    assert_same_training("DPO", **options)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto(loss_type):
    assert_same_training("KTO", loss_type=loss_type)


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_grpo(beta):
    assert_same_training("GRPO", beta=beta, **RL)


def test_grpo_off_policy_iterations():
    """Old log-probs are computed and differ from the policy's from the second step on."""
    options = dict(num_iterations=2, steps_per_generation=2, max_steps=4, learning_rate=1e-2, beta=0.04, **RL)
    assert_same_training("GRPO", **options)


def test_grpo_entropy_bonus_and_top_entropy_tokens():
    """The gradient of the entropy, and a quantile of it as a mask."""
    assert_same_training("GRPO", entropy_coef=0.05, top_entropy_quantile=0.5, **RL)


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_rloo(beta):
    assert_same_training("RLOO", beta=beta, **RL)


@pytest.mark.parametrize("kind", sorted(CONFIGS.keys() - {"qwen3"}))
def test_heads(kind):
    """Tied, soft-capped, scaled up and down, biased, and a mixture of experts with its auxiliary loss."""
    assert_same_training("DPO", model=kind)


@pytest.mark.parametrize("name", METHODS)
def test_moe_aux_loss(name):
    rl = RL if name in ("GRPO", "RLOO") else {}
    steps = assert_same_training(name, model="qwen3_moe", router_aux_loss_coef=0.1, **rl)
    assert steps[0].metrics["aux_loss"] > 0


@pytest.mark.parametrize("name", METHODS)
def test_accumulated_checkpointed_lora_in_bf16(name):
    rl = RL | dict(beta=0.04) if name in ("GRPO", "RLOO") else {}
    assert_same_training(name, gradient_accumulation_steps=2, gradient_checkpointing=True, bf16=True, **LORA, **rl)


@pytest.mark.parametrize("name", METHODS)
def test_lora(name):
    assert_same_training(name, **LORA, **(RL | dict(beta=0.04) if name in ("GRPO", "RLOO") else {}))


def test_head_cast_to_fp32_under_autocast():
    assert_same_training("GRPO", cast_lm_head_to_fp32=True, bf16=True, **RL)


def test_several_steps_train_the_same_weights():
    """Three steps with gradient accumulation: the optimizer sees the same thing each time."""
    assert_same_training("SFT", max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=2)


def test_evaluation():
    logs = []
    for package in (trl, flashpo.trl):
        evaluated = make_trainer("DPO", package, eval_dataset=Dataset.from_list(DATA["DPO"])).evaluate()
        logs.append({k: v for k, v in evaluated.items() if "runtime" not in k and "per_second" not in k})
    stock, ours = (Step(log.pop("eval_loss"), log, {"": torch.ones(1)}) for log in logs)
    assert_same([stock], [ours])


# the whole matrix of GRPO's loss on one generated batch, with ratios away from 1


@pytest.fixture(scope="module")
def grpo():
    """A trainer and one of its batches, off-policy: the policy is moved after old and reference were scored."""
    trainer = make_trainer("GRPO", beta=0.04, num_iterations=2, steps_per_generation=2, **RL)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # `train` sets it
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert inputs["old_per_token_logps"] is not None
    assert inputs["ref_per_token_logps"] is not None
    torch.manual_seed(5)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p += 0.1 * p.std().nan_to_num(0.1) * torch.randn_like(p)
    tool_mask = (torch.rand(inputs["completion_mask"].shape) > 0.3).long()
    return trainer, inputs, tool_mask


def _loss(trainer, inputs) -> Step:
    trainer._metrics["train"].clear()
    trainer.model.zero_grad(set_to_none=True)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    metrics = {k: v[-1] for k, v in trainer._metrics["train"].items()}
    return Step(loss.item(), metrics, {n: p.grad.clone() for n, p in trainer.model.named_parameters()})


LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")


@pytest.mark.parametrize("tool", [False, True], ids=["", "tool_mask"])
@pytest.mark.parametrize(("loss_type", "level", "beta"), itertools.product(LOSSES, ("token", "sequence"), (0.0, 0.04)))
def test_grpo_loss(grpo, loss_type, level, beta, tool, monkeypatch):
    trainer, inputs, tool_mask = grpo
    for name, value in dict(loss_type=loss_type, importance_sampling_level=level, beta=beta).items():
        monkeypatch.setattr(trainer, name, value)
    inputs = copy.copy(inputs) | ({"tool_mask": tool_mask} if tool else {})
    stock = _loss(trainer, inputs)
    assert stock.loss != 0
    flashpo.stats(reset=True)
    with patched():
        ours = _loss(trainer, inputs)
    assert_ran("linear_logprob_partial", "linear_logprob_bwd")
    assert_same([stock], [ours])


def test_grpo_batch_of_nothing_but_masked_tokens_trains_nothing(grpo):
    """N = 0 rows reach the head: a zero that is connected to the model, and zero gradients."""
    trainer, inputs, _ = grpo
    inputs = inputs | {"completion_mask": torch.zeros_like(inputs["completion_mask"])}
    with patched():
        step = _loss(trainer, inputs)
    assert step.loss == 0
    assert step.gradients
    assert all((g == 0).all() for g in step.gradients.values())


def test_train_is_not_vacuous():
    """Guards this file's own comparison: a loss off by a thousandth is seen in loss and gradients."""
    stock = train(make_trainer("SFT"))
    wrong = [Step(s.loss, s.metrics, {n: 1.001 * g for n, g in s.gradients.items()}) for s in stock]
    with pytest.raises(AssertionError, match="grad"):
        assert_same(stock, wrong)
