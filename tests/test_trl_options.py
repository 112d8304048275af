"""TRL's options under our trainers: unknown values and fields, None, and the precision that really applies."""

import contextlib
import dataclasses
import warnings
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import transformers
import trl
from trl.trainer import grpo_trainer, rloo_trainer
from trl_models import assert_same, make_trainer, train

import flashpo
import flashpo.rollout
import flashpo.trl
from flashpo._hosts import trl as host
from flashpo.trl import options
from flashpo.trl._precision import autocast_dtype
from flashpo.trl.patch import patched

SAMPLED_BY_TRL = {"rollout": "generate"}


def outcome(name, package, **settings):
    """The steps of a run, or the error that ended it."""
    try:
        return train(make_trainer(name, package, **settings))
    except (TypeError, ValueError) as error:
        return type(error), str(error)


UNKNOWN = [
    ("loss_type", "grpo_typo"),
    ("importance_sampling_level", "sequence_token"),  # a LossSpec knows it, TRL does not
    ("importance_sampling_level", "sequences"),
    ("scale_rewards", "median"),
    ("multi_objective_aggregation", "max"),
    ("vllm_importance_sampling_mode", "token_clamp"),  # TRL reads it under vLLM only
    ("vllm_importance_sampling_clip_max", None),
    ("top_entropy_quantile", 0.0),
    ("epsilon", torch.tensor(0.2).numpy()[()]),  # no number of Python
]


@pytest.mark.parametrize(("option", "value"), UNKNOWN, ids=[f"{o}={v}" for o, v in UNKNOWN])
def test_a_value_that_our_loss_does_not_know(option, value):
    """It trains as in TRL, or raises what TRL raises."""
    settings = {option: value}
    stock = outcome("GRPO", trl, **settings)
    ours = outcome("GRPO", flashpo.trl, **settings, **SAMPLED_BY_TRL)
    if isinstance(stock, tuple):
        assert ours == stock
    else:
        assert_same(stock, ours)


@pytest.mark.parametrize(("option", "value"), [UNKNOWN[5], UNKNOWN[6], UNKNOWN[8]], ids=str)
def test_what_is_left_to_trl_is_said_once(option, value):
    trainer = make_trainer("GRPO", flashpo.trl, max_steps=2, **{option: value})
    said = "it does not know" if option != "epsilon" and value is not None else "FlashPO leaves the loss"
    with warnings.catch_warnings(record=True) as seen, contextlib.suppress(ValueError):
        warnings.simplefilter("always")
        trainer.train()
    found = [str(w.message) for w in seen if "leaves the loss to TRL" in str(w.message)]
    assert len(found) == 1
    assert said in found[0]


def _tilting(theirs):
    def _compute_loss(self, model, inputs):
        kind = self.__dict__.get("loss_type")
        if kind == "tilted":
            self.loss_type = "grpo"
        try:
            return theirs(self, model, inputs) * (self.args.loss_tilt + (kind == "tilted"))
        finally:
            if kind == "tilted":
                self.loss_type = kind

    return _compute_loss


@pytest.fixture
def later(monkeypatch):
    """A TRL whose losses have one kind and one option more, in code that is taken for known, and its configurations by
    trainer."""
    monkeypatch.setattr(host, "_of_code", lambda *what: iter(()))
    configs = {}
    for module, name in ((grpo_trainer, "GRPO"), (rloo_trainer, "RLOO")):
        cls = getattr(module, f"{name}Trainer")

        monkeypatch.setattr(cls, "_compute_loss", _tilting(cls._compute_loss))
        config = getattr(trl, f"{name}Config")
        where = {"__module__": config.__module__}
        configs[name] = dataclasses.make_dataclass(
            f"{name}Config", [("loss_tilt", float, 1.0)], bases=(config,), namespace=where
        )
    return configs


@pytest.mark.parametrize(
    ("name", "settings", "warning"),
    [
        ("GRPO", dict(loss_type="tilted"), "it does not know loss_type='tilted'"),
        ("GRPO", dict(loss_tilt=1.5), "it does not know loss_tilt=1.5"),
        ("RLOO", dict(loss_tilt=1.5), "it does not know loss_tilt=1.5"),
        ("GRPO", {}, None),
        ("RLOO", {}, None),
    ],
    ids=str,
)
def test_a_later_trl(later, name, settings, warning):
    """What it has beyond ours keeps its own loss, over our log-probs; left alone, it costs nothing."""
    users = {
        package: SimpleNamespace(**{f"{name}Config": later[name], f"{name}Trainer": getattr(package, f"{name}Trainer")})
        for package in (trl, flashpo.trl)
    }
    stock = train(make_trainer(name, users[trl], **settings))
    trainer = make_trainer(name, users[flashpo.trl], **settings)
    trainer._rollouts.mode = "generate"
    flashpo.stats(reset=True)
    with pytest.warns(UserWarning, match=warning) if warning else contextlib.nullcontext():
        ours = train(trainer)
    assert_same(stock, ours)
    ran = flashpo.stats()
    assert ran["tree_attention_bwd"]
    assert ("policy_loss_fwd" in ran) == (warning is None)
    assert ("group_advantages_fwd" in ran) == ("loss_tilt" not in settings)  # a value of loss_type is the loss's alone


@pytest.mark.parametrize("name", ["GRPO", "RLOO", "PPO"])
def test_a_later_option_beside_a_loss_of_ours(later, name, tmp_path):
    """Which would not read it."""
    from flashpo.trl import config, ppo_config

    options_of = ppo_config.CorrectionOptions if name == "PPO" else config.PolicyOptions
    base = flashpo.trl.PPOConfig if name == "PPO" else getattr(flashpo.trl, f"{name}Config")
    cls = type(f"{name}Config", (base, options_of, later["RLOO" if name == "RLOO" else "GRPO"]), {})
    settings = dict(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    ours = {} if name == "PPO" else {"loss": "gspo"}
    cls = dataclasses.dataclass(cls)
    cls(**settings, **ours)
    message = "loss_tilt=2.0 is not supported by PPO" if name == "PPO" else "loss_tilt exclude each other"
    with pytest.raises(ValueError, match=message):
        cls(**settings, **ours, loss_tilt=2.0)


def test_fields_of_a_users_own_configuration_are_the_users(tmp_path):
    """TRL's code cannot read them either."""

    @dataclasses.dataclass
    class Config(trl.GRPOConfig):
        benchmarks: str = ""

    args = Config(output_dir=str(tmp_path), use_cpu=True, bf16=False, benchmarks="aime")
    assert options.unknown_fields(args, options.GRPO) == []


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_every_option_of_trl_is_listed_once(name):
    """Where this fails after an update of TRL: what does the new option do, and who has to know it?"""
    known = getattr(options, name)
    listed = [*known.loss_values, *known.advantage_values, *known.checked, *known.elsewhere]
    assert len(listed) == len(set(listed))
    of_transformers = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    assert set(listed) == {f.name for f in dataclasses.fields(getattr(trl, f"{name}Config"))} - of_transformers


def test_options_that_need_our_advantages():
    trainer = make_trainer("GRPO", flashpo.trl, group_by="agent")
    trainer.scale_rewards = "rank"
    with pytest.raises(ValueError, match=r"group_by=\['agent'\] needs FlashPO's advantages.*scale_rewards='rank'"):
        trainer._keeps_trls_advantages()


# numbers and flags of TRL's configurations with which its own trainers need to be set
NEEDED = {
    "num_generations", "temperature", "beta", "num_iterations", "epsilon", "top_entropy_quantile", "entropy_coef",
    "learning_rate", "logging_steps",
}  # fmt: skip


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_none_where_a_number_is_usual(name):
    """All options at once that TRL trains with as None."""
    of_trl = {*options.GRPO.checked, *options.GRPO.elsewhere, *options.RLOO.checked}
    fields = [f for f in dataclasses.fields(getattr(trl, f"{name}Config")) if f.name in of_trl - NEEDED]
    settings = {f.name: None for f in fields if isinstance(f.default, bool | int | float)}
    assert {"max_completion_length", "top_p", "top_k", "shuffle_dataset"} <= set(settings)
    stock = train(make_trainer(name, trl, **settings))
    assert_same(stock, train(make_trainer(name, flashpo.trl, **settings, **SAMPLED_BY_TRL)))
    (step,) = train(make_trainer(name, flashpo.trl, **settings, rollout="engine"))
    assert step.metrics["completions/max_length"] <= 20  # transformers' default


def test_a_total_length_counts_the_padded_prompt():
    """Which only TRL's own generation has."""
    trainer = make_trainer("GRPO", flashpo.trl, max_completion_length=None, generation_kwargs={"max_length": 12})
    with patched(), pytest.warns(UserWarning, match="max_length is set without max_new_tokens"):
        ids, _ = trainer._generate_single_turn([[3, 4]] * 4, None, {}, 4)
    assert max(map(len, ids)) <= 10


@pytest.mark.parametrize("wanted", [dict(fp16=True), dict(bf16=True), {}], ids=str)
def test_rollouts_have_the_precision_that_training_has(wanted):
    """fp16 is not granted on a CPU: both compute in fp32 then."""
    trainer = make_trainer("GRPO", flashpo.trl, rollout="engine", **wanted)
    trainer.train()
    assert autocast_dtype(trainer.accelerator) == (torch.bfloat16 if "bf16" in wanted else None)
    (mismatch,) = [log["rollout/mismatch/mean"] for log in trainer.state.log_history if "loss" in log]
    assert mismatch < (1e-2 if "bf16" in wanted else 1e-5)


def test_a_trainer_whose_constructor_did_not_run():
    """It has what TRL's method needs, and nothing of ours."""
    trainer = object.__new__(flashpo.trl.GRPOTrainer)
    trainer.accelerator = SimpleNamespace(device=torch.device("cpu"), is_main_process=True, gather=lambda x: x)
    trainer.args = SimpleNamespace(report_to=[])
    trainer.model = SimpleNamespace(training=True)
    trainer.state = SimpleNamespace(global_step=2, num_input_tokens_seen=0)
    trainer._metrics = {"train": defaultdict(list)}
    trainer._tokenizer = SimpleNamespace(pad_token_id=0)
    trainer.eos_token_ids = [2]
    trainer.use_vllm, trainer.tools = False, None
    trainer.processing_class = SimpleNamespace(batch_decode=lambda ids, **_: ["decoded"])
    trainer.rollout_func = lambda prompts, trainer: {"prompt_ids": [[1]], "completion_ids": [[2]], "logprobs": [[-0.1]]}
    for context in (contextlib.nullcontext, patched):
        with context():
            assert trainer._generate(["prompt"])[1] == [[2]]


def test_a_model_with_a_generate_of_its_own(monkeypatch):
    """The engine names the reason, TRL calls it, and the reason is said once."""
    reason = "the model has a generate method of its own"
    trainer = make_trainer("GRPO", flashpo.trl, max_steps=2)
    supported = flashpo.rollout.support
    called = []
    generate = trainer.model.generate

    def users(*args, **kwargs):
        called.append(True)
        return generate(*args, **kwargs)

    trainer.model.generate = users
    monkeypatch.setattr(
        "flashpo.trl.rollout.support",
        lambda model: dataclasses.replace(supported(model), ok="generate" not in vars(model), reason=reason),
    )
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer.train()
    assert len(called) == 2
    assert len([w for w in seen if reason in str(w.message)]) == 1
