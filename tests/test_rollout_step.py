"""The decode step can be captured as a CUDA graph: it never reads a value from the device."""

import types

import peft
import pytest
import torch
from rollout_models import FAMILIES as MODELS
from test_rollout_models import FAMILIES, HYBRIDS
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from flashpo._causal_lm import CausalLM
from flashpo.bench.tiny_models import tiny_model
from flashpo.rollout.cache import KVCache, Run
from flashpo.rollout.fused import fused_backbone
from flashpo.rollout.hybrid import States
from flashpo.rollout.prefill import Piece, prefill
from flashpo.rollout.runner import Draw, Runner, Sizes, Step, stream
from flashpo.rollout.seam import rollout_mode
from flashpo.rollout.support import Layer, support


def fake_step(model) -> tuple[Step, FakeTensorMode]:
    """Of the model, whose weights become fake tensors of the mode, as the cache does."""
    cache = KVCache(support(model).layers, 9, torch.bfloat16, torch.device("cpu"))
    mode = FakeTensorMode()
    tables = [table for module in model.modules() for table in (module._parameters, module._buffers)]
    for table in (*tables, cache.keys, cache.values):
        table.update({name: mode.from_tensor(x.detach()) for name, x in table.items() if x is not None})
    with mode:
        return Step(CausalLM.of(model), cache, Sizes(rows=4, shared=2, blocks=2, stop=3, suppressed=2, steps=16)), mode


def tiny(family: str):
    return tiny_model(family).to(torch.bfloat16)  # what a mixture of experts needs for its grouped products


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_needs_nothing_from_the_host(family):
    step, mode = fake_step(tiny(family))
    with mode, rollout_mode(step.parts.base):
        step()
        step()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe"])
def test_a_fused_step_needs_nothing_from_the_host(family):
    step, mode = fake_step(tiny(family))
    step.fused = fused_backbone(step.parts.backbone, torch.bfloat16)
    assert step.fused is not None
    with mode, rollout_mode(step.parts.base):
        step()
        step()


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_adapters_need_nothing_from_the_host(family):
    model = peft.get_peft_model(tiny(family), peft.LoraConfig(r=4, target_modules="all-linear"))
    step, mode = fake_step(model)
    with mode, rollout_mode(model):
        step()


@pytest.mark.parametrize("family", HYBRIDS)
def test_states_need_nothing_from_the_host(family):
    step, mode = fake_step(tiny(family))
    config = step.parts.base.config.get_text_config()
    with mode, rollout_mode(step.parts.base):
        states = States(config, [None])
        prefill(step.parts, step.cache, [Piece([1, 2, 3], [Run([1], 3)])], states=states)
        step.states = States(config, [states.take(0)] * 4)
        step()
        step()


def test_the_checks_above_can_fail():
    step, mode = fake_step(tiny("qwen3"))
    norm = step.parts.backbone.norm
    norm.forward = lambda hidden: hidden * hidden.max().item()
    with mode, rollout_mode(step.parts.base), pytest.raises(DataDependentOutputException):
        step()


def test_sizes_are_rounded_so_that_few_graphs_serve():
    rounded = Sizes(rows=33, shared=0, blocks=5, stop=2, suppressed=0, steps=16).rounded()
    assert rounded == Sizes(64, 1, 8, 2, 0, 16)
    assert rounded._replace(suppressed=3).rounded() == Sizes(64, 1, 8, 2, 4, 16)


def test_parked_places_write_nothing_and_stand_still():
    """Steps of a bucket larger than its rows, past the end of all of them."""
    torch.manual_seed(0)
    net = MODELS["qwen3"]()
    layers = [Layer(i, 2, 16, 16, 0) for i in range(2)]
    cache = KVCache(layers, 6, torch.float32, torch.device("cpu"))
    for tensor in (*cache.keys.values(), *cache.values.values()):
        tensor.fill_(7.0)
    step = Step(CausalLM.of(net), cache, Sizes(rows=4, shared=1, blocks=2, stop=1, suppressed=0, steps=5))
    rows = [types.SimpleNamespace(blocks=[2 + i], tokens=[5], start=0, position=0) for i in range(2)]
    step.load(rows, [], [Draw(1.0, 0, 1.0, 0.0, i, 3, ()) for i in range(2)])
    with rollout_mode(net):
        for _ in range(5):
            step()
    assert step.live.tolist() == [False] * 4
    assert step.own_length.tolist() == [2, 2, 0, 0]
    assert step.position.tolist() == [1, 1, 0, 0]
    written = (cache.values[0] != 7.0).any(-1).any(1)  # (blocks, 64)
    assert written.nonzero().tolist() == [[2, 0], [2, 1], [3, 0], [3, 1]]
    assert torch.isfinite(step.logprobs[:2, :, :2]).all()


def test_streams_are_distinct():
    keys = {stream(seed, prompt, index) for seed in (0, 1, 2**62) for prompt in range(20) for index in range(20)}
    assert len(keys) == 3 * 400
    assert all(-(2**63) <= key < 2**63 for key in keys)


def test_a_gpu_runner_keeps_graphs_while_weights_stay(monkeypatch):
    """Its bookkeeping, with the capture left out."""
    captured = []
    runner = Runner(None, types.SimpleNamespace(device=torch.device("cpu")))
    runner.cuda, runner.check_every = True, 16
    monkeypatch.setattr(runner, "_capture", lambda step: captured.append(step.sizes) or (step, step))
    monkeypatch.setattr("flashpo.rollout.runner.Step", FakeStep)
    row = types.SimpleNamespace(blocks=[1], tokens=[5], start=0, position=0)
    draw = Draw(1.0, 0, 1.0, 0.0, 0, 3, ())

    def load(count):
        return runner.load([row] * count, [], [draw] * count)[0]

    runner.use("here", "base")
    first = load(3)
    assert load(4) is first
    assert load(5) is not first
    runner.use("here", "adapter")
    assert load(3) is not first
    runner.use("here", "base")
    assert load(3) is first
    runner.use("elsewhere", "base")
    assert load(3) is not first
    assert [sizes.rows for sizes in captured] == [4, 8, 4, 4]


class FakeStep:
    def __init__(self, parts, cache, sizes, fused):
        self.sizes = sizes

    def load(self, *tables):
        pass
