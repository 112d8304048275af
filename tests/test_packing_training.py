"""Token trees with everything that training wraps around a model, and what must not run on token trees."""

import copy

import pytest
import torch
from accuracy import assert_as_accurate
from packing_models import Batch, alone, backward, batch, loss_of, make, packed, padded
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from test_packing_models import TEMPERATURE, assert_same, assert_same_gradients
from transformers import AttentionMaskInterface, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head
from trl_models import SMALL

import flashpo
from flashpo import pack, packable, score
from flashpo._causal_lm import Unsupported
from flashpo.bench.tiny_models import tiny_model

LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing(reentrant, lora):
    model, b = make("qwen3"), batch()
    if lora:
        model = get_peft_model(model, LORA)
    expected = backward(model, b, padded(model, b, TEMPERATURE))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    flashpo.stats(reset=True)
    ours = backward(model.train(), b, packed(model, b, TEMPERATURE))
    assert (
        sum(flashpo.stats()["tree_attention_fwd"].values()) == 2 * model.config.num_hidden_layers
    )  # again in backward
    assert_same_gradients(ours, expected)


def test_lora():
    model = get_peft_model(make("llama"), LORA)
    assert_same(model, batch())
    b = batch()
    with torch.no_grad(), model.disable_adapter():
        ours, stock = packed(model, b, TEMPERATURE), padded(model, b, TEMPERATURE)
    torch.testing.assert_close(ours[0], stock[0], rtol=1e-9, atol=1e-9)
    assert (ours[0] - packed(model, b, TEMPERATURE)[0]).abs().max() > 0.1


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compile(fullgraph):
    model, b = make("llama"), batch()
    expected = padded(model, b, TEMPERATURE)
    flashpo.packing.prepare(model)
    compiled = torch.compile(model, fullgraph=fullgraph, dynamic=True, backend="aot_eager")
    ours = packed(compiled, b, TEMPERATURE)
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-9, atol=1e-9)
    assert_same_gradients(backward(model, b, ours), backward(model, b, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "gpt_oss"])
def test_noise_of_the_dtype(kind, dtype):
    """Against the same weights in fp64, we err no more than the padded batch does. Gradients as a whole, and that which
    is off most for its size: how far a single number is off hangs on which way a few roundings in the forward fall."""
    model, b = make(kind, dtype), batch()
    exact_model = make(kind)
    exact_model.load_state_dict(model.state_dict())
    exact = alone(exact_model, b, TEMPERATURE)
    stock, ours = padded(model, b, TEMPERATURE), packed(model, b, TEMPERATURE)
    for i in range(2):
        assert_as_accurate(ours[i], exact[i], stock[i])
    gradients = [backward(m, b, x) for m, x in ((model, ours), (exact_model, exact), (model, stock))]
    ours, exact, stock = (list(g.values()) for g in gradients)
    sizes = torch.stack([x.norm() for x in exact])
    error, allowed = (torch.stack([(a - b).norm() for a, b in zip(x, exact)]) for x in (ours, stock))
    assert error.norm() <= 2 * allowed.norm() + 1e-6 * sizes.norm()
    live = sizes > 1e-6 * sizes.norm()
    assert (error / sizes)[live].max() <= 2 * (allowed / sizes)[live].max() + 1e-6


def test_autocast():
    model, b = make("llama", torch.float32), batch()
    with torch.autocast("cpu", torch.bfloat16):
        stock, ours = padded(model, b, TEMPERATURE), packed(model, b, TEMPERATURE)
        wide = packed(model, b, TEMPERATURE, fp32_head=True)
    exact_model = make("llama")
    exact_model.load_state_dict(model.state_dict())
    exact = alone(exact_model, b, TEMPERATURE)
    assert_as_accurate(ours[0], exact[0], stock[0])
    assert_as_accurate(wide[0], exact[0], stock[0])
    assert not torch.equal(wide[0], ours[0])


def test_no_mask_is_built(monkeypatch):
    model, b = make("mistral"), batch()
    packed(model, b, TEMPERATURE)
    name = model.config._attn_implementation
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, lambda **_: pytest.fail("a mask was built"))
    packed(model, b, TEMPERATURE)
    with pytest.raises(pytest.fail.Exception):
        padded(model, b, TEMPERATURE)


def test_a_prepared_model_is_what_it_was(tmp_path):
    model, b = make("gemma3"), batch()
    ids = b.input_ids[:1, -4:].clamp(min=2)
    before = padded(model, b, TEMPERATURE)[0], model.generate(ids, max_new_tokens=9, do_sample=False)
    packed(model, b, TEMPERATURE)
    clone = copy.deepcopy(model)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # `clone` must not go back to the model that it was copied from
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    named = AutoModelForCausalLM.from_pretrained(  # as TRL loads the reference model
        tmp_path, attn_implementation=model.config._attn_implementation
    )
    assert loaded.config._attn_implementation == "sdpa"
    for other in (clone, loaded, named):
        assert torch.equal(padded(other, b, TEMPERATURE)[0], before[0])
        assert torch.equal(other.generate(ids, max_new_tokens=9, do_sample=False), before[1])
        torch.testing.assert_close(packed(other, b, TEMPERATURE)[0], before[0], rtol=1e-9, atol=1e-9)


def test_beside_the_fused_head_of_trl():
    model, b = make("qwen3"), batch()
    add_fused_lm_head(model)
    assert_same(model, b)
    labels = b.input_ids.masked_fill(b.completion_mask == 0, -100)
    out = model(input_ids=b.input_ids, attention_mask=b.attention_mask, labels=labels, fused_lm_head=True)
    ours = packed(model, b, temperature=1.0)[0][:, 1:]
    torch.testing.assert_close(ours, out.log_probs.double(), rtol=1e-5, atol=1e-5)


def test_another_attention():
    """One that is set afterwards takes trees, too; without ours a tree is never taken for a mask that allows all."""
    model, b = make("llama"), batch()
    tree = pack(b.input_ids, b.attention_mask, b.completion_mask)
    with pytest.raises(RuntimeError, match="mask"):
        model.model(**tree.inputs())
    packed(model, b, TEMPERATURE)
    for name in ("sdpa", "eager"):  # whose softmax is fp32
        model.set_attn_implementation(name)
        assert_same(model, b, alone, tolerance=3e-7)


def test_nothing_to_score():
    """A rank without work: every parameter has a gradient of 0, so that collectives match."""
    model, b = make("qwen3"), batch()
    b.completion_mask.zero_()
    results = packed(model, b, TEMPERATURE)
    assert results[0].shape == b.completion_mask.shape
    assert (results[0] == 0).all()
    gradients = backward(model, b, results)
    assert all(x is not None and (x == 0).all() for x in gradients.values())


def test_tree_of_three_levels():
    """Tasks, turns of two agents on each, answers of different lengths to each turn, of which a tool wrote a part: it
    costs its distinct tokens, and loss and gradients are the sums of its leaves', run one by one."""
    torch.manual_seed(2)

    def words(n: int) -> list[int]:
        return torch.randint(2, SMALL["vocab_size"], (n,)).tolist()

    leaves, scored = [], []
    for task in (words(20), words(17)):
        for turn in (words(16), words(19)):
            for answer in (words(6), words(3), words(9)):
                leaves.append(task + turn + answer)
                scored.append(len(turn + answer))
    b = Batch.of(leaves, scored)
    # a leaf's tokens up to the one that predicts its last scored token
    needed = [leaf[: mask.nonzero()[-1] - mask.numel()] for leaf, mask in zip(leaves, b.completion_mask)]
    distinct = {tuple(leaf[:length]) for leaf in needed for length in range(1, len(leaf) + 1)}
    model, entered = make("llama"), []
    model.model.register_forward_pre_hook(
        lambda module, args, inputs: entered.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    stats = score(model, b.pack(), temperature=TEMPERATURE)
    ours = stats.logprob, stats.entropy, None
    assert entered == [len(distinct)]
    assert len(distinct) < sum(map(len, needed)) / 3

    loss, total = torch.zeros((), dtype=torch.float64), {}
    for i in range(len(leaves)):
        leaf = Batch(
            *(x[i : i + 1] for x in (b.input_ids, b.attention_mask, b.completion_mask)), b.upstream[:, i : i + 1]
        )
        results = alone(model, leaf, TEMPERATURE)
        loss = loss + loss_of(leaf, results).detach()
        for name, gradient in backward(model, leaf, results).items():
            total[name] = total.get(name, 0) + gradient
    torch.testing.assert_close(loss_of(b, ours), loss, rtol=1e-9, atol=0)
    assert_same_gradients(backward(model, b, ours), total)


REFUSED = {  # family -> (overrides of its tiny configuration, part of the reason)
    "bart": ({}, "takes no position_ids"),
    "bert": ({}, "not causal"),
    "inkling_text": ({}, "hybrid_sliding"),
    "gemma3_text": ({"use_bidirectional_attention": True}, "bidirectional"),
    "minimax": ({}, "linear_attention"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_refused_by_name(family):
    overrides, reason = REFUSED[family]
    model = tiny_model(family, **overrides)
    ok, why = packable(model)
    assert not ok
    assert why.startswith(f"{family}: ")
    assert reason in why
    with pytest.raises(Unsupported, match=f"{family}: "):
        score(model, pack(*(torch.tensor([[x, 1, 1]]) for x in (1, 1, 0))))


def test_refused_convolution():
    model = make("llama")
    model.model.layers[0].mix = torch.nn.Conv1d(32, 32, 3)
    assert packable(model).reason == "llama: LlamaDecoderLayer has convolutions over its tokens"


def test_refused_adapters():
    prompt = get_peft_model(make("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert "PROMPT_TUNING acts outside of the model's layers: it gives" in packable(prompt).reason
    head = get_peft_model(make("llama"), LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    assert "adapter on the language model head" in packable(head).reason
    assert "no model of transformers" in packable(torch.nn.Linear(2, 2)).reason
    assert "no language model head" in packable(make("llama").model).reason
