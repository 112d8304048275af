"""`flashpo.verl.register()` as a user of verl meets it: by names in a configuration, through verl's own call sites."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from verl_peer import AlgoConfig, actor_config, core, importing, policy_batch, ragged_mask

import flashpo.verl
from flashpo.verl.advantages import ADV_ESTIMATORS
from flashpo.verl.losses import POLICY_LOSSES

DIFFERENT = {"clip_cov", "kl_cov", "optimal_token_baseline", "tir_optimal_token_baseline"}  # we have no counterpart


@pytest.fixture
def registries(monkeypatch):
    """verl's registries, without what our plugin has put there where it is installed, and the functions that verl calls
    by name; put back afterwards."""
    for registry in ("POLICY_LOSS_REGISTRY", "ADV_ESTIMATOR_REGISTRY"):
        own = {name: f for name, f in getattr(core, registry).items() if not name.startswith("flashpo_")}
        monkeypatch.setattr(core, registry, own)
    for name in flashpo.verl.CALLED_BY_NAME.values():
        monkeypatch.setattr(core, name, getattr(core, name))


@pytest.fixture(scope="module")
def ray_trainer():
    with importing():
        return pytest.importorskip("verl.trainer.ppo.ray_trainer", exc_type=ImportError)


def test_registers_beside_verls_own(registries):
    before = dict(core.POLICY_LOSS_REGISTRY), dict(core.ADV_ESTIMATOR_REGISTRY)
    for _ in range(2):
        flashpo.verl.register()
    for name, loss in POLICY_LOSSES.items():
        assert core.get_policy_loss_fn(f"flashpo_{name}") is loss
    for name, estimator in ADV_ESTIMATORS.items():
        assert core.get_adv_estimator_fn(f"flashpo_{name}") is estimator
    after = core.POLICY_LOSS_REGISTRY, core.ADV_ESTIMATOR_REGISTRY
    assert all(before[i].items() <= after[i].items() for i in (0, 1))
    assert set(before[0]) | set(before[1]) == {*POLICY_LOSSES, *ADV_ESTIMATORS, *DIFFERENT}


def test_replaces_verls_own(registries):
    for _ in range(2):
        flashpo.verl.register(replace=True)
    assert core.get_policy_loss_fn("gspo") is core.get_policy_loss_fn("flashpo_gspo") is POLICY_LOSSES["gspo"]
    assert core.get_adv_estimator_fn(core.AdvantageEstimator.GDPO) is ADV_ESTIMATORS["gdpo"]
    assert core.compute_gae_advantage_return is ADV_ESTIMATORS["gae"]
    assert core.compute_grpo_outcome_advantage is ADV_ESTIMATORS["grpo"]


def data_proto(ray_trainer, sequences=12, tokens=7):
    mask = ragged_mask(sequences, tokens)
    rewards = torch.randn(sequences, tokens) * mask
    batch = {
        "token_level_rewards": rewards,
        "response_mask": mask.long(),
        "values": torch.randn(sequences, tokens),
        "reward_baselines": torch.randn(sequences),
        "prompts": torch.ones(sequences, 3, dtype=torch.long),
        "attention_mask": torch.ones(sequences, 3 + tokens, dtype=torch.long),
    }
    uid = np.array([f"uid-{i % 4}" for i in range(sequences)], dtype=object)
    accuracy = np.random.default_rng(0).normal(size=sequences)
    return ray_trainer.DataProto.from_dict(batch, non_tensors={"uid": uid, "accuracy": accuracy})


def compute(ray_trainer, data, estimator, **config):
    config = AlgoConfig(adv_estimator=estimator, gdpo_reward_keys=["accuracy"], **config)
    out = ray_trainer.compute_advantage(
        copy.deepcopy(data), estimator, gamma=0.97, lam=0.9, config=config,
        norm_adv_by_std_in_grpo=config.norm_adv_by_std_in_grpo,
    )  # fmt: skip
    live = data.batch["response_mask"].bool()
    return torch.stack([out.batch[name].float()[live] for name in ("advantages", "returns")])


@pytest.mark.parametrize("name", sorted(set(ADV_ESTIMATORS) - {"gae", "gdpo", "remax"}))
def test_compute_advantage_by_our_names(registries, ray_trainer, name):
    data = data_proto(ray_trainer)
    data.batch.pop("reward_baselines")
    flashpo.verl.register()
    ours, theirs = compute(ray_trainer, data, f"flashpo_{name}"), compute(ray_trainer, data, name)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(ADV_ESTIMATORS))
def test_compute_advantage_by_verls_names(registries, ray_trainer, name):
    """An unchanged configuration, after `register(replace=True)`."""
    data = data_proto(ray_trainer)
    if name != "remax":
        data.batch.pop("reward_baselines")
    theirs = compute(ray_trainer, data, name)
    flashpo.verl.register(replace=True)
    flashpo.stats(reset=True)
    assert torch.allclose(compute(ray_trainer, data, name), theirs, rtol=1e-5, atol=1e-6)
    assert set(flashpo.stats()) & {"gae_fwd", "group_advantages_fwd"}


def test_what_verl_does_not_hand_over(registries, ray_trainer):
    """compute_advantage gives values to "gae" and single rewards to "gdpo"; other names have nothing to run on."""
    flashpo.verl.register()
    data = data_proto(ray_trainer)
    for name, missing in (("gae", "values"), ("gdpo", "non_tensor_batch")):
        with pytest.raises(ValueError, match=rf"{missing}.*flashpo\.verl\.replace"):
            compute(ray_trainer, data, f"flashpo_{name}")


def test_dr_grpo_by_configuration(registries, ray_trainer):
    """norm_adv_by_std_in_grpo=False reaches ours. verl hands it to "grpo" alone: "grpo_vectorized" ignores it."""
    flashpo.verl.register()
    data = data_proto(ray_trainer)
    data.batch.pop("reward_baselines")
    expected = compute(ray_trainer, data, "grpo", norm_adv_by_std_in_grpo=False)
    for name in ("flashpo_grpo", "flashpo_grpo_vectorized"):
        ours = compute(ray_trainer, data, name, norm_adv_by_std_in_grpo=False)
        assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-6)
    ignored = compute(ray_trainer, data, "grpo_vectorized", norm_adv_by_std_in_grpo=False)
    assert torch.equal(ignored, compute(ray_trainer, data, "grpo_vectorized"))


@pytest.mark.parametrize("name", sorted(set(POLICY_LOSSES) - {"bypass_mode"}))
def test_the_actors_loss(registries, name):
    """`policy_loss.loss_mode=flashpo_...` in verl's `ppo_loss`: nested log-probs, entropy bonus, KL term."""
    with importing():
        from tensordict import TensorDict
        from verl.utils.tensordict_utils import assign_non_tensor
        from verl.workers.utils.losses import ppo_loss
    flashpo.verl.register()
    old, log_prob, advantages, mask = (x.float() if x.is_floating_point() else x for x in policy_batch())
    lengths = (29, 7, 20, 29, 12, 3)

    def nested(x):
        return torch.nested.as_nested_tensor([row[:n] for row, n in zip(x, lengths)], layout=torch.jagged)

    prompt = torch.zeros(6, 2)
    ids = {"prompts": torch.nested.as_nested_tensor(list(prompt.long()), layout=torch.jagged)}
    ids["responses"] = nested(torch.zeros(old.shape, dtype=torch.long))
    tensors = {
        "response_mask": nested(mask.long()),
        "old_log_probs": nested(old),
        "advantages": nested(advantages),
        "ref_log_prob": nested(old - 0.1),
    }
    # two tokens of prompt: the response's log-probs begin at the last of them, and the last token's is of no use
    shifted = [torch.cat([torch.zeros(1), row[:n], torch.zeros(1)]) for row, n in zip(log_prob, lengths)]

    def loss_and_gradient(mode):
        leaf = torch.cat(shifted).requires_grad_()
        config = actor_config(
            loss_mode=mode, use_kl_loss=True, entropy_coeff=0.01, kl_loss_coef=0.05, loss_agg_mode="seq-mean-token-mean"
        )
        data = TensorDict({**ids, **tensors}, batch_size=[6])
        assign_non_tensor(data, dp_size=2, batch_num_tokens=90, global_batch_size=12)
        loss, metrics = ppo_loss(config, {"log_probs": leaf, "entropy": leaf.detach().abs()}, data)
        loss.backward()
        return loss.detach(), leaf.grad, {key: getattr(value, "values", value) for key, value in metrics.items()}

    ours, theirs = loss_and_gradient(f"flashpo_{name}"), loss_and_gradient(name)
    assert torch.allclose(ours[0], theirs[0], rtol=1e-5)
    assert torch.allclose(ours[1], theirs[1], rtol=1e-4, atol=1e-6 * theirs[1].abs().max().item())
    assert ours[2].keys() == theirs[2].keys()
    for key, values in theirs[2].items():
        assert ours[2][key] == pytest.approx(values, rel=1e-4, abs=1e-6), key


def imported_verl(environment, path):
    code = """
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, ADV_ESTIMATOR_REGISTRY
for registry, name in ((POLICY_LOSS_REGISTRY, "gspo"), (ADV_ESTIMATOR_REGISTRY, "rloo")):
    print("flashpo_" + name in registry, registry[name] is registry.get("flashpo_" + name))
"""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=path,
    )
    return run.stdout.split()


def test_verl_loads_us(tmp_path, monkeypatch):
    """By its entry points, or by a variable that names a module; either happens halfway through `import verl`."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    points = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["entry-points"]
    package = tmp_path / "example-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: example\nVersion: 1.0\n")
    lines = [f"{name} = {module}" for name, module in points["verl.plugins"].items()]
    (package / "entry_points.txt").write_text("\n".join(["[verl.plugins]", *lines, ""]))
    plain = {key: value for key, value in os.environ.items() if not key.startswith("VERL_")}
    assert imported_verl(plain, tmp_path) == ["True", "False"] * 2
    replacing = {"VERL_USE_EXTERNAL_PLUGINS": "none", "VERL_USE_EXTERNAL_MODULES": "flashpo.verl.replace"}
    assert imported_verl({**plain, **replacing}, tmp_path) == ["True", "True"] * 2
