"""Quantised models: their own layers compute in a rollout, live, under adapters and in the head, too."""

import pytest
import torch
import torch.nn.functional as F
import trl_models
from rollout_models import SIZES, forward_logprobs, prompts
from torch import nn
from torch.utils._pytree import tree_map
from transformers import Qwen3Config, Qwen3ForCausalLM

import flashpo.trl
from flashpo.rollout import RolloutEngine, SamplingParams
from flashpo.rollout.weights import WeightView

peft = pytest.importorskip("peft")
PARAMS = SamplingParams(n=2, max_new_tokens=12)


def rounded(weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


class Buffers(nn.Module):
    """As GPTQ and AWQ have it: no weight, and no Linear."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        for name, value in zip(("quantised", "scale"), rounded(linear.weight.detach())):
            self.register_buffer(name, value)

    def forward(self, x):
        return F.linear(x, self.quantised * self.scale)


class Bytes(nn.Linear):
    """As bitsandbytes has it: a Linear whose weight is another shape of bytes."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        quantised, scale = rounded(linear.weight.detach())
        self.weight = nn.Parameter(quantised.view(torch.uint8).view(-1, 1), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x):
        weight = self.weight.view(torch.int8).view(self.out_features, self.in_features)
        return F.linear(x, weight * self.scale)


class Quantised(torch.Tensor):
    """As torchao has it: a plain Linear whose weight is a tensor without a storage."""

    @staticmethod
    def __new__(cls, quantised, scale):
        return torch.Tensor._make_wrapper_subclass(cls, quantised.shape, dtype=scale.dtype, device=scale.device)

    def __init__(self, quantised, scale):
        self.quantised, self.scale = quantised, scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Quantised(args[0].quantised, args[0].scale)
        plain = tree_map(lambda x: x.quantised * x.scale if isinstance(x, Quantised) else x, (args, kwargs or {}))
        return function(*plain[0], **plain[1])


def subclass(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(Quantised(*rounded(linear.weight.detach())), requires_grad=False)
    return linear


def bitsandbytes(kind: str):
    bnb = pytest.importorskip("bitsandbytes")

    def make(linear: nn.Linear) -> nn.Module:
        sizes = linear.in_features, linear.out_features
        if kind == "nf4":
            layer = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.float32, quant_type="nf4")
            layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        else:
            layer = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
            layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        return layer.to("cpu")

    return make


def torchao(linear: nn.Linear) -> nn.Linear:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())
    return linear


def quantised_model(layer, head: bool):
    torch.manual_seed(0)
    config = Qwen3Config(**SIZES | {"intermediate_size": 128}, head_dim=16, tie_word_embeddings=False)
    model = Qwen3ForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.requires_grad = False
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if type(child) is nn.Linear and (head or name != "lm_head"):
                setattr(owner, name, layer(child))
    return model


def with_lora(model):
    names = ["q_proj", "v_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False)).eval()


def assert_logprobs(model, rollouts, atol=1e-5):
    for prompt, completion, logprobs in zip(rollouts.prompt_ids, rollouts.completion_ids, rollouts.logprobs):
        exact = forward_logprobs(model, prompt, completion)
        torch.testing.assert_close(torch.tensor(logprobs), exact, atol=atol, rtol=0)


@pytest.mark.parametrize("weights", ["auto", "shadow"])
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("layer", [Buffers, Bytes, subclass])
def test_a_quantised_base(layer, head, weights):
    model = quantised_model(layer, head)
    engine = RolloutEngine(model, weights=weights, fallback="error")
    assert_logprobs(model, engine.generate(prompts(5, 70), PARAMS))
    assert type(model.model.layers[0].mlp.up_proj) in (layer, nn.Linear)


@pytest.mark.parametrize("layer", [Bytes, subclass])  # on which PEFT's own Linear can stand
def test_adapters_on_a_quantised_base(layer):
    model = with_lora(quantised_model(layer, head=False))
    assert_logprobs(model, RolloutEngine(model, fallback="error").generate(prompts(5, 70), PARAMS))
    with (
        pytest.raises(ValueError, match=r"lora: no merged form of \w*Linear; use lora='live'"),
        WeightView(model, lora="merged"),
    ):
        pass


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    ("layer", "atol"),
    [("nf4", 0.1), ("int8", 0.5), (torchao, 1e-4)],  # the first two round activations by their batch
    ids=["nf4", "int8", "torchao"],
)
def test_libraries(layer, atol, lora):
    model = quantised_model(bitsandbytes(layer) if isinstance(layer, str) else layer, head=False)
    model = with_lora(model) if lora else model
    assert_logprobs(model, RolloutEngine(model, fallback="error").generate(prompts(5, 70), PARAMS), atol)


@pytest.mark.parametrize("layer", [Bytes, subclass])
def test_adapters_on_a_quantised_base_are_trained_on_its_rollouts(layer, monkeypatch):
    """QLoRA through the trainer, over several steps."""
    model = quantised_model(layer, head=False)
    monkeypatch.setattr(trl_models, "load", lambda *args, **options: model)
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    options = dict(max_steps=3, learning_rate=1e-2, rollout="engine", peft_config=adapters)
    trainer = trl_models.make_trainer("GRPO", flashpo.trl, **options)
    before = trl_models.weights(trainer.model)
    trainer.train()
    moved = {name for name, x in trl_models.weights(trainer.model).items() if not torch.equal(x, before[name])}
    assert moved
    assert all("lora" in name for name in moved)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 3
    assert max(row["rollout/mismatch/max"] for row in rows) < 1e-5
