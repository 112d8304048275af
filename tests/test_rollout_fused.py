"""The decode step without the modules' Python gives what the modules give, and stands aside where it could not."""

import pytest
import torch
from rollout_models import FAMILIES, model, prompts

from flashpo.rollout import RolloutEngine, SamplingParams
from flashpo.rollout.fused import FusedBackbone, fused_backbone

FUSED = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")


@pytest.fixture
def calls(monkeypatch):
    seen = []
    original = FusedBackbone.__call__
    monkeypatch.setattr(FusedBackbone, "__call__", lambda self, step: seen.append(step) or original(self, step))
    return seen


def rollouts(net, monkeypatch=None):
    if monkeypatch is not None:
        monkeypatch.setattr("flashpo.rollout.engine.fused_backbone", lambda *args: None)
    engine = RolloutEngine(net, fallback="error", check=False)
    return engine.generate(prompts(5, 70, 131), SamplingParams(n=3, max_new_tokens=40, temperature=0.8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [f for f in FUSED if f in FAMILIES])
def test_the_same_as_the_modules(family, dtype, calls, monkeypatch):
    net = model(family).to(dtype)
    try:
        ours = rollouts(net)
        assert len(calls) == ours.stats.steps > 0
        theirs = rollouts(net, monkeypatch)
    finally:
        net.float()
    assert len(calls) == ours.stats.steps
    if dtype == torch.float32:
        assert ours.completion_ids == theirs.completion_ids
    for a, b, x, y in zip(ours.logprobs, theirs.logprobs, ours.completion_ids, theirs.completion_ids):
        alike = next((i for i, (u, v) in enumerate(zip(x, y)) if u != v), len(x))
        atol = 1e-5 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(torch.tensor(a[:alike]), torch.tensor(b[:alike]), rtol=0, atol=atol)


def test_other_shapes_hooks_and_wider_norms_are_left_to_the_modules():
    net = model("qwen3")
    backbone = net.base_model
    assert fused_backbone(backbone, torch.float32) is not None
    assert fused_backbone(backbone, torch.bfloat16) is None, "the residual stream is wider than the cache"
    hook = backbone.layers[0].register_forward_hook(lambda *args: None)
    assert fused_backbone(backbone, torch.float32) is None
    hook.remove()
    assert fused_backbone(backbone, torch.float32) is not None
    assert fused_backbone(model("gemma2").base_model, torch.float32) is None
