"""A step of each trainer, a rollout and a token tree: short enough for every version in `flashpo._hosts.versions`.

`make matrix` runs this file in an environment for each of them. Where its TRL lacks something that FlashPO needs, TRL's
own code runs and the reason is given.
"""

import contextlib
import warnings

import pytest
import torch
from rollout_models import FAMILIES as FAMILIES_BY_NAME
from rollout_models import greedy, model, prompts

pytest.importorskip("trl")
import trl
from trl_models import SAMPLED_BY_TRL, assert_same, load, make_trainer, train

import flashpo
import flashpo.trl
from flashpo._hosts import trl as host
from flashpo.packing import pack, packable, score
from flashpo.rollout import RolloutEngine, SamplingParams

FAMILIES = ["llama", "qwen2", "qwen3", "mistral"]


@contextlib.contextmanager
def said():
    found: list[str] = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield found
    found += [str(w.message) for w in seen if str(w.message).startswith("FlashPO")]


def by_trl(name: str, **settings):
    """A step of TRL's own; None where its kernels are of Triton alone and there is no GPU, as in 1.15."""
    try:
        return train(make_trainer(name, trl, **settings))
    except (RuntimeError, AttributeError) as error:
        if "active drivers" not in str(error) and "'apply'" not in str(error):
            raise
        return None


@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO", "Reward", "GRPO", "RLOO", "Distillation"])
def test_a_step_is_that_of_the_installed_trl(name):
    ours = SAMPLED_BY_TRL.get(name, {})

    def settings():
        return {"teacher_model": load("qwen3_tied")} if name == "Distillation" else {}

    stock = by_trl(name, **settings())
    if stock is None:
        stock = train(make_trainer(name, flashpo.trl, share_prefix=False, **ours, **settings()))
    flashpo.stats(reset=True)
    with said() as warned:
        steps = train(make_trainer(name, flashpo.trl, **ours, **settings()))
    assert_same(stock, steps)
    trees = not host.why_not(host.trainer_class(f"{name}Trainer"), host.TREES)
    assert len(warned) == (not trees), warned
    assert ("tree_attention_bwd" in flashpo.stats()) == trees


@pytest.mark.parametrize("name", ["GRPO", "RLOO", "PPO"])
def test_the_engine_generates(name):
    flashpo.stats(reset=True)
    with said() as warned:
        (step,) = train(make_trainer(name, flashpo.trl))
    assert warned == []
    assert {"sample_rows", "tree_attention_bwd", "policy_loss_bwd"} <= set(flashpo.stats())
    assert name == "RLOO" or step.metrics["rollout/mismatch/max"] < 1e-4  # whose loss compares with no sampler


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_completions(family):
    net = model(family)
    params = SamplingParams(temperature=0.0, max_new_tokens=6, stop_token_ids=())
    found = RolloutEngine(net, fallback="error").generate(prompts(4, 9), params)
    assert found.completion_ids == [greedy(net, prompt, 6) for prompt in prompts(4, 9)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tree_of_rows(family):
    net = FAMILIES_BY_NAME[family]().double().train()
    assert packable(net).ok
    ids = torch.randint(5, 60, (4, 12), generator=torch.Generator().manual_seed(1))
    ids[1:, :6] = ids[0, :6]
    mask, scored = torch.ones_like(ids), torch.ones_like(ids[:, 6:])
    upstream = torch.randn(scored.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    shared = score(net, pack(ids, mask, scored)).logprob
    logits = net(ids, attention_mask=mask, use_cache=False).logits[:, 5:-1]
    padded = logits.log_softmax(-1).gather(-1, ids[:, 6:, None])[..., 0]
    ours, plain = (torch.autograd.grad((x * upstream).sum(), list(net.parameters())) for x in (shared, padded))
    for x, y in zip((shared, *ours), (padded, *plain)):
        assert (x - y).norm() <= 1e-4 * y.norm()  # norms compute in fp32
