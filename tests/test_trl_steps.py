"""One optimisation step of ours equals one of stock TRL: loss, gradients and logged metrics, for TRL's options."""

import copy
import importlib
import itertools

import pytest
import torch

pytest.importorskip("trl")
import trl
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from trl_models import CONFIGS, DATA, assert_ran, assert_same, assert_same_training, make_trainer, train

import flashpo.trl
from flashpo.ops.linear_logprob import LinearLogprob
from flashpo.trl import patched
from flashpo.trl.patch import stock
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


@pytest.mark.parametrize("kind", sorted(CONFIGS.keys() - {"qwen3", "granitemoehybrid"}))
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


@pytest.mark.parametrize("name", METHODS)
def test_trl_4612_an_adapter_on_the_head_is_refused(name):
    """It would never be trained: the head's weight is read directly. TRL raises, and so do we."""
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        make_trainer(name, flashpo.trl, peft_config=LoraConfig(target_modules=["lm_head"]))


@pytest.mark.parametrize("name", METHODS)
def test_a_trained_copy_of_the_head_beside_an_adapter(name):
    """`modules_to_save`: the policy uses the copy, a reference without adapters the original."""
    lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    steps = assert_same_training(name, peft_config=lora, **(RL | dict(beta=0.04) if name in ("GRPO", "RLOO") else {}))
    assert any("lm_head.modules_to_save" in parameter for parameter in steps[0].gradients)


def test_prompt_tuning():
    """Virtual tokens lengthen the labels."""
    adapter = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.warns(UserWarning, match="PROMPT_TUNING acts outside of the model's layers"):
        assert_same_training("DPO", packed=False, peft_config=adapter)


@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_bf16_parameters(name):
    assert_same_training(name, dtype=torch.bfloat16)


@pytest.mark.parametrize("options", [{"packing": True, "max_length": 32}, {"padding_free": True, "max_length": None}])
def test_sft_in_one_row(options):
    assert_same_training("SFT", **options)


@pytest.mark.parametrize("name", ["SFT", "DPO", "GRPO"])
def test_torch_compile(name):
    """What Dynamo makes of the patched module; the backend `eager` keeps a compiler out of it."""
    rl = RL if name == "GRPO" else {}
    assert_same_training(name, torch_compile=True, torch_compile_backend="eager", **rl)


@pytest.mark.parametrize("name", ["ORPO", "CPO"])
def test_experimental_trainers_on_logits(name, monkeypatch):
    """Those that still work on `outputs.logits` are reached by the patch, through `selective_log_softmax`."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    package = importlib.import_module(f"trl.experimental.{name.lower()}")
    expected = train(make_trainer(name, package))
    flashpo.stats(reset=True)
    with patched():
        actual = train(make_trainer(name, package))
    assert_ran("selective_log_softmax_fwd", "selective_log_softmax_bwd")
    assert_same(expected, actual)


def test_head_cast_to_fp32_under_autocast():
    assert_same_training("GRPO", cast_lm_head_to_fp32=True, bf16=True, **RL)


def test_several_steps_train_the_same_weights():
    """Three steps with gradient accumulation: the optimizer sees the same thing each time."""
    assert_same_training("SFT", max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=2)


@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO"])
def test_evaluation(name):
    flashpo.stats(reset=True)
    logs = []
    for package in (trl, flashpo.trl):
        evaluated = make_trainer(name, package, eval_dataset=Dataset.from_list(DATA[name])).evaluate()
        logs.append({k: v for k, v in evaluated.items() if not k.endswith(("_time", "_runtime", "_per_second"))})
    assert_ran("tree_attention_fwd")
    steps = [Step(log.pop("eval_loss"), log, {"": torch.ones(1)}) for log in logs]
    assert_same(steps[:1], steps[1:])


# the whole matrix of GRPO's loss on one generated batch, with ratios away from 1


@pytest.fixture(scope="module")
def grpo():
    """A trainer and one of its batches, off-policy: the policy is moved after old and reference were scored."""
    trainer = make_trainer("GRPO", flashpo.trl, beta=0.04, num_iterations=2, steps_per_generation=2, **RL)
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
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    trainer.flush_metrics()
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
    flashpo.stats(reset=True)
    with stock():
        expected = _loss(trainer, inputs)
    assert expected.loss != 0
    assert not flashpo.stats()
    actual = _loss(trainer, inputs)
    assert_ran("linear_logprob_partial", "linear_logprob_bwd")
    assert_same([expected], [actual])


def test_grpo_tool_tokens_do_not_reach_the_head(grpo, monkeypatch):
    """Nor can the ratio of one overflow: its old log-prob is real, the policy's is not computed."""
    trainer, inputs, tool_mask = grpo
    old = inputs["old_per_token_logps"].where(tool_mask == 1, -200.0)
    inputs = inputs | {"tool_mask": tool_mask, "old_per_token_logps": old}
    rows = []
    forward = LinearLogprob.forward
    monkeypatch.setattr(
        LinearLogprob, "forward", staticmethod(lambda ctx, h, *rest: rows.append(len(h)) or forward(ctx, h, *rest))
    )
    step = _loss(trainer, inputs)
    assert rows == [(inputs["completion_mask"] * tool_mask).sum()]
    assert all(g.isfinite().all() for g in step.gradients.values())
    assert step.metrics["kl"] < 10


def test_grpo_batch_of_nothing_but_masked_tokens_trains_nothing(grpo):
    """N = 0 rows reach the head: a zero that is connected to the model, and zero gradients."""
    trainer, inputs, _ = grpo
    inputs = inputs | {"completion_mask": torch.zeros_like(inputs["completion_mask"])}
    step = _loss(trainer, inputs)
    assert step.loss == 0
    assert step.gradients
    assert all((g == 0).all() for g in step.gradients.values())


def test_train_is_not_vacuous():
    """Guards this file's own comparison: a loss off by a thousandth is seen in loss and gradients."""
    right = train(make_trainer("SFT"))
    wrong = [Step(s.loss, s.metrics, {n: 1.001 * g for n, g in s.gradients.items()}) for s in right]
    with pytest.raises(AssertionError, match="grad"):
        assert_same(right, wrong)
