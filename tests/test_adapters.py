"""PEFT adapters: rollouts, token trees and heads do what `PeftModel.forward` does, or refuse an adapter by name."""

import pathlib

import pytest

pytest.importorskip("trl")
pytest.importorskip("peft")
import peft
import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraModel

from flashpo._hosts import peft as _peft
from flashpo.bench import adapters, models
from flashpo.bench.tiny_models import tiny_model
from flashpo.packing import packable
from flashpo.rollout import RolloutEngine, SamplingParams, support

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "models.md").read_text()


@pytest.mark.parametrize("name", adapters.NAMES)
def test_every_kind_is_right_or_refused(name):
    """Of what the installed PEFT has, with or without an entry of ours."""
    try:
        row = adapters.try_adapter(name)
    except adapters.Untried as reason:
        pytest.skip(str(reason))
    assert not [cell for cell in row if "differ" in cell or "gradients of" in cell], row
    if peft.__version__ in PAGE:
        assert f"| {' | '.join(map(models.cell, row))} |" in PAGE, (
            "docs/models.md: python -m flashpo.bench.models --adapters"
        )


def with_lora(**options):
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **{"target_modules": ["q_proj"]} | options)
    torch.manual_seed(0)
    return peft.get_peft_model(tiny_model("llama"), config).eval()


def hooks(model):
    return [(*module._forward_pre_hooks, *module._forward_hooks, *module._backward_hooks) for module in model.modules()]


def hooked(self, *args, **given):
    """A tuner's forward that acts on layers by hooks which nobody has seen before."""
    handle = self.model.model.norm.register_forward_hook(lambda module, inputs, out: 2 * out)
    try:
        return self.model(*args, **given)
    finally:
        handle.remove()


def embedded(self, input_ids, **given):
    return self.model(**given | {"inputs_embeds": 2 * self.model.get_input_embeddings()(input_ids)})


def shifted(self, input_ids, **given):
    return self.model(input_ids=(input_ids + 1) % adapters.VOCABULARY, **given)


def switched(self, *args, **given):
    self.model.model.layers[0].self_attn.q_proj._disable_adapters = True
    return self.model(*args, **given)


def averaged(self, x, *args, **given):
    return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x).softmax(-1)).mean(-2, keepdim=True)


@pytest.mark.parametrize(
    ("where", "forward", "reason"),
    [
        (LoraModel, hooked, "acts outside of the model's layers: it puts hooks on LlamaRMSNorm"),
        (LoraModel, embedded, "acts outside of the model's layers: it gives the model inputs_embeds"),
        (LoraModel, shifted, "acts outside of the model's layers: it gives the model other tokens"),
        (LoraModel, switched, "acts outside of the model's layers: it switches adapters"),
        (LoraLinear, averaged, "mix the tokens of a batch in their Linear layers"),
    ],
)
def test_an_adapter_that_nobody_knows_is_refused(where, forward, reason, monkeypatch):
    """PEFT's LoRA made into something else stands for adapters to come."""
    monkeypatch.setattr(_peft, "_mixing", {})
    assert support(with_lora()).ok
    assert packable(with_lora()).ok
    monkeypatch.setattr(where, "forward", forward)
    monkeypatch.setattr(_peft, "_mixing", {})
    assert reason in support(with_lora()).reason
    assert reason in packable(with_lora()).reason


def test_looking_leaves_no_trace():
    """Under gradient checkpointing PEFT's hooks for an activated adapter stay until the next backward."""
    model = with_lora(alora_invocation_tokens=adapters.INVOCATION)
    model.gradient_checkpointing_enable()
    model.train()
    before = hooks(model)
    for _ in range(2):
        assert not packable(model).ok
        assert not support(model).ok
    assert hooks(model) == before
    model(input_ids=adapters.rows(), labels=adapters.rows()).loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("named", [True, False])
def test_an_adapter_that_comes_to_answer_later(named, caplog):
    """An engine that was made under plain LoRA answers by transformers' generate under an activated adapter."""
    model = with_lora()
    options = {"task_type": "CAUSAL_LM", "init_lora_weights": False, "alora_invocation_tokens": adapters.INVOCATION}
    model.add_adapter("activated", peft.LoraConfig(target_modules=["v_proj"], **options))
    engine = RolloutEngine(model, check=False)
    prompt = adapters.rows()[0, :8].tolist()
    greedily = SamplingParams(temperature=0, max_new_tokens=4)
    assert engine.generate([prompt], greedily).stats.steps, "the engine answers under plain LoRA"
    assert not caplog.text
    if not named:
        model.set_adapter("activated")
    rollouts = engine.generate([prompt], greedily, adapters=["activated"] if named else None)
    assert "it puts hooks on Linear" in caplog.text
    assert model.active_adapter == ("default" if named else "activated")
    model.set_adapter("activated")
    ids = torch.tensor([prompt + rollouts.completion_ids[0]])
    with torch.no_grad():
        exact = (
            model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(1, ids[0, len(prompt) :, None])
        )
    torch.testing.assert_close(torch.tensor(rollouts.logprobs[0]), exact[:, 0], atol=1e-4, rtol=0)


def test_adapted_parameters_where_memory_is_short(caplog):
    """PEFT swaps such a parameter for its sum with the adapter in every forward: the weights have not changed."""
    model = adapters.make("LORA, target_parameters")
    prompt = adapters.rows()[0].tolist()
    greedily = SamplingParams(temperature=0, max_new_tokens=4)
    plainly = RolloutEngine(model, kv_memory=1, check=False).generate([prompt], greedily)
    assert "transformers' generate" in caplog.text
    assert plainly.completion_ids == RolloutEngine(model, fallback="error").generate([prompt], greedily).completion_ids
