"""A rollout leaves the model as it was, and models that cannot be reproduced are refused."""

import pytest
import torch
from rollout_models import model, prompts
from torch import nn

from flashpo._causal_lm import CausalLM
from flashpo.rollout import RolloutEngine, SamplingParams, seam


def state(net):
    configs = {n: m.config._attn_implementation for n, m in net.named_modules() if hasattr(m, "config")}
    flags = {
        n: (m.training, getattr(m, "gradient_checkpointing", None), type(m).forward, m.__dict__.get("forward"))
        for n, m in net.named_modules()
    }
    weights = {n: (p.data_ptr(), p._version, p.dtype, p.requires_grad) for n, p in net.named_parameters()}
    return configs, flags, weights, net.config.use_cache, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")


@pytest.fixture
def net():
    net = model("qwen3")
    before = net.config._attn_implementation
    net.train()
    net.model.layers[1].mlp.eval()  # one module that its user froze
    net.gradient_checkpointing_enable()
    yield net
    net.gradient_checkpointing_disable()
    net.eval()
    net.config._attn_implementation = before


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_everything_is_as_before(net, implementation):
    net.config._attn_implementation = implementation
    before = state(net)
    RolloutEngine(net).generate(prompts(10), SamplingParams(n=2, max_new_tokens=3))
    assert state(net) == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [0, 1, 4])  # prefill, decode
def test_everything_is_as_before_after_an_exception(net, error, at, monkeypatch):
    engine, calls = RolloutEngine(net), []
    before = state(net)
    whole = engine.generate(prompts(10), SamplingParams(n=2, max_new_tokens=8))
    forward = net.model.layers[1].mlp.forward

    def failing(x):
        calls.append(x.shape)
        if len(calls) == at + 1:
            raise error("in the middle")
        return forward(x)

    with monkeypatch.context() as patch:
        patch.setattr(net.model.layers[1].mlp, "forward", failing)
        with pytest.raises(error, match="in the middle"):
            engine.generate(prompts(10), SamplingParams(n=2, max_new_tokens=8))
    assert state(net) == before
    assert engine.generate(prompts(10), SamplingParams(n=2, max_new_tokens=8)).completion_ids == whole.completion_ids


def test_rollouts_run_without_dropout_and_autocast(net):
    net.config.attention_dropout = 0.5
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = RolloutEngine(net).generate(prompts(10), SamplingParams(max_new_tokens=8))
    finally:
        net.config.attention_dropout = 0.0
    outside = RolloutEngine(net).generate(prompts(10), SamplingParams(max_new_tokens=8))
    assert inside.logprobs == outside.logprobs


def test_our_attention_refuses_to_train(net):
    net.config._attn_implementation_internal = seam.ATTENTION
    with pytest.raises(RuntimeError, match="outside of a rollout"):
        net(torch.tensor([[1, 2]]))


def test_a_model_without_a_head_is_refused(net):
    with pytest.raises(seam.Unsupported, match="Qwen3Model has no language model head"):
        CausalLM.of(net.model)
    with pytest.raises(seam.Unsupported, match="Linear is no model of transformers"):
        CausalLM.of(nn.Linear(2, 2))


def test_the_innermost_attention_answers():
    class Named:
        def __init__(self, name):
            self.name = name

    with seam.in_charge(Named("outer")):
        with seam.in_charge(Named("inner")):
            assert seam._thread.attention.name == "inner"
        assert seam._thread.attention.name == "outer"
    assert seam._thread.attention is None
