"""Families that run token trees with their own attention: with an N x N mask, segment by segment, or within chunks."""

import warnings

import pytest
import torch
from packing_models import backward, batch, make, packed, padded
from peft import LoraConfig, get_peft_model
from test_packing_hybrids import assert_as_near_as_padded, in_fp64
from test_packing_models import TEMPERATURE, assert_equal, assert_same_gradients
from trl_models import make_trainer

import flashpo.trl
from flashpo.bench.tiny_models import tiny_model
from flashpo.packing import attention, dense
from flashpo.packing.parity import why_wrong
from flashpo.packing.scoring import accept_trees

FALCON = {
    "falcon": {},
    "falcon, one key for all": dict(new_decoder_architecture=False, multi_query=True),
    "falcon, alibi": dict(alibi=True),
}
ALIBI = ("falcon, alibi", "bloom", "mpt")
METHODS = ("gpt_neo", "gpt_neox_japanese")
INDEXED = ("deepseek_v32", "axk2", "glm_moe_dsa", "hy_v4")
FAMILIES = (*FALCON, "bloom", "mpt", *METHODS, *INDEXED, "llama4_text")


def build(kind: str, **overrides):
    torch.manual_seed(0)
    return tiny_model(kind.split(",")[0], **FALCON.get(kind, {}), **overrides).eval()


@pytest.mark.parametrize("kind", FAMILIES)
def test_family(kind):
    assert_as_near_as_padded(build(kind), batch())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["falcon, alibi", "mpt", "gpt_neo", "llama4_text"])
def test_lora_with_checkpointing(kind, reentrant):
    names = ["q_proj", "k_proj", "o_proj"] if kind == "llama4_text" else "all-linear"  # its router is no usual Linear
    targets = LoraConfig(r=4, target_modules=names, init_lora_weights=False, task_type="CAUSAL_LM")
    model, b = get_peft_model(build(kind), targets), batch()
    stock = backward(model, b, padded(model, b, TEMPERATURE))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same_gradients(backward(model.train(), b, packed(model, b, TEMPERATURE)), stock, 1e-3)


@pytest.mark.parametrize("kind", [*ALIBI, "gpt_neo"])
def test_without_a_tree_a_family_is_what_it_was(kind):
    model, b = build(kind), batch()
    row = b.input_ids[:1, -5:]
    before = padded(model, b, TEMPERATURE)[0], model.generate(row, max_new_tokens=6, do_sample=False)
    accept_trees(model)
    accept_trees(model)
    assert torch.equal(padded(model, b, TEMPERATURE)[0], before[0])
    assert torch.equal(model.generate(row, max_new_tokens=6, do_sample=False), before[1])


# what is wrong is found


@pytest.mark.parametrize("kind", ALIBI)
def test_a_bias_by_the_place_in_the_tree_is_found(kind, monkeypatch):
    class Flat:
        depth = property(
            lambda self: self.flat, lambda self, x: setattr(self, "flat", None if x is None else torch.arange(len(x)))
        )

    model = build(kind)
    assert why_wrong(model) == ""
    monkeypatch.setattr(dense, "_thread", Flat())
    assert "log-probs of a token tree differ" in why_wrong(model)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_chunk_that_is_off_by_one_is_found(change, monkeypatch):
    right = attention._chunk
    monkeypatch.setattr(attention, "_chunk", lambda module: right(module) and right(module) + change)
    assert "of a token tree differ" in why_wrong(build("llama4_text"))


def test_queries_scaled_by_their_place_in_the_tree_are_found(monkeypatch):
    model = build("llama4_text", floor_scale=4, attn_temperature_tuning=True)
    assert why_wrong(model) == ""
    monkeypatch.setattr(attention, "_at_their_positions", lambda module, query, tree: query)
    assert "log-probs of a token tree differ" in why_wrong(model)


# segment by segment


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "qwen2 window", "gemma2", "gpt_oss", "phimoe", "llama4"])
def test_segments_are_the_whole_tree(kind, implementation):
    """Without dropout it makes no difference: windows, soft caps, sinks and chunks are all there."""
    if kind == "llama4":
        model = in_fp64(build("llama4_text", attn_implementation=implementation))
    else:
        model = make(kind, attention=implementation if kind not in ("gemma2", "gpt_oss") else "eager")
    accept_trees(model)
    b = batch()
    whole = packed(model, b, TEMPERATURE)
    d_whole = backward(model, b, whole)
    with attention.without_kernel():
        pieces = packed(model, b, TEMPERATURE)
        assert_same_gradients(backward(model, b, pieces), d_whole, 1e-5)
    assert_equal(pieces[:2], whole[:2], 1e-6)


def test_dropout_draws_for_every_query_and_key():
    """A layer's output is that without dropout on average; checkpointing draws the same again."""
    model, b = tiny_model("gpt2", attn_pdrop=0.25, resid_pdrop=0.0, embd_pdrop=0.0, n_layer=1), batch()
    accept_trees(model)
    found = []
    handle = model.transformer.h[0].attn.register_forward_hook(lambda module, args, out: found.append(out[0].detach()))
    with torch.no_grad():
        packed(model, b, TEMPERATURE)
        model.train()
        for _ in range(60):
            packed(model, b, TEMPERATURE)
    handle.remove()
    still, *moving = found
    moving = torch.stack(moving)
    error, spread = moving.mean(0) - still, moving.std(0) / len(moving) ** 0.5
    assert (moving[0] - moving[1]).abs().max() > 0.1
    assert (error.abs() / spread.clamp(min=1e-6)).square().mean().sqrt() < 1.3
    torch.manual_seed(3)
    expected = backward(model, b, packed(model, b, TEMPERATURE))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(3)
    assert_same_gradients(backward(model, b, packed(model, b, TEMPERATURE)), expected)


# in trainers


@pytest.mark.parametrize(("name", "options"), [("SFT", {}), ("GRPO", {"rollout": "generate"})])
def test_a_batch_whose_rows_share_little_is_padded(name, options, tmp_path):
    """A mask of N x N has more scores than padded rows then, but for who insists on trees."""
    build("bloom").save_pretrained(tmp_path)
    rows = []
    for sharing in ("auto", True):
        trainer = make_trainer(name, flashpo.trl, model=str(tmp_path), share_prefix=sharing, **options)
        trainer.model.transformer.h[0].register_forward_hook(
            lambda module, args, out, sharing=sharing: (
                rows.append((sharing, args[0].shape[0])) if torch.is_grad_enabled() else None
            )
        )
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.train()
        said = [
            str(w.message)
            for w in said
            if "scores some batches as padded rows: the attention of Bloom" in str(w.message)
        ]
        assert len(said) == (sharing == "auto")
    assert set(rows) == {("auto", 4), (True, 1)}
