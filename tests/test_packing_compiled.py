"""Decoder layers under torch.compile: one graph for all trees, the same numbers, and a reason where there is none."""

import copy

import pytest
import torch
from packing_models import Batch, backward, batch, make, packed, padded
from peft import LoraConfig, get_peft_model
from test_packing_distributed import WRAPPERS
from test_packing_models import assert_same_gradients
from torch._dynamo.testing import CompileCounterWithBackend
from trl_models import SMALL, assert_same, make_trainer, train
from two_processes import in_two_processes, needs_gloo

import flashpo.trl
from flashpo import packable
from flashpo._causal_lm import CausalLM
from flashpo.bench.tiny_models import tiny_model
from flashpo.packing import compiled
from flashpo.packing.compiled import compile_layers
from flashpo.packing.scoring import prepare
from flashpo.rollout.fused import _does_something_else

TEMPERATURE = 0.9


class Graphs(CompileCounterWithBackend):
    """Counts what is compiled; `eager` keeps a compiler out of it."""

    @property
    def count(self) -> int:
        return self.frame_count


@pytest.fixture
def graphs(monkeypatch):
    counter = Graphs("eager")
    monkeypatch.setattr(compiled, "BACKEND", counter)
    return counter


def let_compile(model) -> list[str]:
    """Returns where it will say what runs uncompiled."""
    said: list[str] = []
    prepare(model)
    compile_layers(CausalLM.of(model).backbone, said.append)
    return said


def layers_of(model):
    return CausalLM.of(model).text.layers


def trees() -> list[Batch]:
    """Of four sizes, the first of which is the number of the model's features, too."""

    def words(n: int) -> list[int]:
        return torch.randint(2, SMALL["vocab_size"], (n,)).tolist()

    torch.manual_seed(2)
    prompts = [words(n) for n in (SMALL["hidden_size"] - 8, 17, 21, 40)]
    found = [Batch.of([prompt + words(5), prompt + words(5)], [5, 5]) for prompt in prompts]
    for b in found:
        b.completion_mask[:, -6:-1] = 1
    return found


def assert_as_uncompiled(model, plain, b: Batch, tolerance: float = 0.0) -> None:
    """With gradients and without; and as padded rows, but for rounding."""
    results = packed(model, b, TEMPERATURE)
    expected = packed(plain, b, TEMPERATURE)
    torch.testing.assert_close(results[:2], expected[:2], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(results[:2], padded(plain, b, TEMPERATURE)[:2], rtol=1e-4, atol=1e-4)
    ours, theirs = backward(model, b, results), backward(plain, b, expected)
    assert any(x is not None and x.any() for x in ours.values())
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        assert torch.equal(packed(model, b, TEMPERATURE)[0], results[0])


def test_two_graphs_a_kind_serve_all_trees(graphs):
    model, plain = (make("gemma3", torch.float32) for _ in range(2))
    said = let_compile(model)
    for b in trees():
        assert_as_uncompiled(model, plain, b)
    assert len({layer._flashpo_kind for layer in layers_of(model)}) == 2
    assert (graphs.count, said) == (4, [])


def test_reentrant_checkpointing_with_autocast_and_lora(graphs):
    """Its forward runs without gradients, and once more with them."""

    def adapted():
        model = get_peft_model(make("qwen3", torch.float32), LoraConfig(target_modules=["q_proj", "down_proj"])).train()
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        return model

    model, plain = adapted(), adapted()
    said = let_compile(model)
    for b in trees()[1:]:
        with torch.autocast("cpu", torch.bfloat16):
            results, expected = (packed(m, b, TEMPERATURE) for m in (model, plain))
        assert torch.equal(results[0], expected[0])
        ours, theirs = backward(model, b, results), backward(plain, b, expected)
        assert all(torch.equal(x, theirs[name]) for name, x in ours.items() if x is not None)
        assert any("lora_B" in name and x.any() for name, x in ours.items() if x is not None)
    assert (graphs.count, said) == (2, [])


def test_without_a_tree_nothing_is_compiled(graphs):
    model, b = make("qwen3", torch.float32), batch()
    let_compile(model)
    padded(model, b, TEMPERATURE)
    model.generate(b.input_ids[:1, -5:], max_new_tokens=3, do_sample=False)
    assert packable(copy.deepcopy(model), check=True).ok
    assert flashpo.packing.parity.why_wrong(model) == ""
    assert graphs.count == 0
    assert all("forward" in vars(layer) and not _does_something_else(layer) for layer in layers_of(model))


def hook(model):
    layers_of(model)[1].mlp.register_forward_hook(lambda *args: None)


def offload(model):
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(layers_of(model)[0].mlp, ModelHook())


def own_forward(model):
    layers_of(model)[0].forward = layers_of(model)[0].forward


def compile_a_layer(model):
    layers_of(model)[0].compile(backend="eager")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook, "mlp has hooks"),
        (offload, "mlp is offloaded or dispatched by accelerate"),
        (own_forward, "Qwen3DecoderLayer has a forward of its own"),
        (compile_a_layer, "Qwen3DecoderLayer is compiled already"),
    ],
)
def test_what_is_refused(graphs, change, reason):
    model = make("qwen3", torch.float32)
    prepare(model)
    change(model)
    assert let_compile(model) == [f"Qwen3Model: {reason}"]
    packed(model, batch(), TEMPERATURE)
    assert graphs.count == 0


def test_a_judgement_leaves_no_trace_and_hooks_that_come_later_are_called(graphs):
    model, b, calls = make("qwen3", torch.float32), batch(), []
    said = let_compile(model)
    random = torch.get_rng_state()
    flashpo.stats(reset=True)
    before = packed(model, b, TEMPERATURE)[0]
    assert sum(flashpo.stats()["tree_attention_fwd"].values()) == len(layers_of(model))
    assert "tree_attention_bwd" not in flashpo.stats()
    assert torch.equal(torch.get_rng_state(), random)
    layers_of(model)[1].mlp.register_forward_hook(lambda *args: calls.append(1))
    assert torch.equal(packed(model, b, TEMPERATURE)[0], before)
    assert (calls, said) == ([1], ["Qwen3DecoderLayer: mlp has hooks"])


def test_a_layer_that_reads_tokens_in_order_runs_beside_compiled_ones(graphs):
    model, plain = (tiny_model("lfm2", num_hidden_layers=2, layer_types=["conv", "full_attention"]) for _ in range(2))
    said = let_compile(model)
    for b in trees()[1:]:
        assert torch.equal(packed(model, b, TEMPERATURE)[0], packed(plain, b, TEMPERATURE)[0])
    assert graphs.count == 1
    assert said == ["Lfm2DecoderLayer: a layer that reads tokens in order needs the tree on the host"]


def fails(graph, inputs):
    raise RuntimeError("there is no compiler\nwith a long story")


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, upstream):
        raise RuntimeError("there is no compiler")


def fails_in_backward(graph, inputs):
    return lambda *args: [Broken.apply(x) for x in graph(*args)]


def forgets(graph, inputs):
    return lambda *args: [x * 1.01 for x in graph(*args)]


@pytest.mark.parametrize(
    ("backend", "reason", "checkpointing"),
    [
        (fails, "RuntimeError: there is no compiler", False),
        (fails_in_backward, "RuntimeError: there is no compiler", True),
        (forgets, "compiled it is off by", False),
    ],
)
def test_what_fails_or_is_wrong_runs_uncompiled(monkeypatch, backend, reason, checkpointing):
    monkeypatch.setattr(compiled, "BACKEND", backend)
    model, plain = (make("qwen3", torch.float32) for _ in range(2))
    if checkpointing:
        for m in (model, plain):
            m.train().gradient_checkpointing_enable({"use_reentrant": False})
    said = let_compile(model)
    for b in trees()[1:]:
        assert_as_uncompiled(model, plain, b)
    assert len(said) == 1
    assert reason in said[0]
    assert "long story" not in said[0]


def test_a_later_compilation_that_fails(graphs, monkeypatch):
    model, b = make("qwen3", torch.float32), batch()
    said = let_compile(model)
    expected = packed(model, b, TEMPERATURE)[0]
    kind = layers_of(model)[0]._flashpo_kind

    def fail(*args, **keywords):
        raise torch._dynamo.exc.BackendCompilerFailed(fails, RuntimeError("no more"), None)

    monkeypatch.setattr(kind, "compiled", fail)
    assert torch.equal(packed(model, b, TEMPERATURE)[0], expected)
    assert len(said) == 1


def check(rank: int, wrapper: str) -> None:
    compiled.BACKEND = graphs = Graphs("eager")
    plain, model = (make("qwen3") for _ in range(2))
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    wrapped = WRAPPERS[wrapper](model)
    said = let_compile(wrapped)
    for b in trees()[1 + rank : 3 + rank]:
        ours = backward(wrapped, b, packed(wrapped, b, TEMPERATURE))
        expected = backward(plain, b, padded(plain, b, TEMPERATURE))
        for gradient in expected.values():
            torch.distributed.all_reduce(gradient)
            gradient /= 2
        ours = {n.removeprefix("module."): g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in ours.items()}
        assert_same_gradients(ours, expected)
    assert (graphs.count, said) == (1, [])


@needs_gloo
def test_two_processes():
    in_two_processes((check, "ddp"), (check, "fsdp2"))


@pytest.mark.parametrize("name", ["GRPO", "SFT", "DPO"])
def test_trainers(graphs, name):
    """Steps with and without it are the same, and the time it takes is told."""
    options = {"model": "qwen3", "max_steps": 2}
    usual = train(make_trainer(name, flashpo.trl, **options))
    assert graphs.count == 0
    trainer = make_trainer(name, flashpo.trl, **options, compile_layers=True)
    assert_same(usual, train(trainer))
    assert graphs.count > 0
    assert trainer._why_not_parts()["compiled layers"] == ""
    assert trainer._phases.seconds["compiling"] > 0
    assert "flashpo/seconds/compiling" in trainer.state.log_history[0]


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ({"compile_layers": "auto"}, "compile_layers must be True or False, got 'auto'"),
        (
            {"compile_layers": True, "share_prefix": False},
            "compile_layers=True and share_prefix=False exclude each other",
        ),
        (
            {"compile_layers": True, "torch_compile": True},
            "compile_layers=True and torch_compile=True exclude each other",
        ),
    ],
)
def test_options(option, error, tmp_path):
    with pytest.raises((TypeError, ValueError), match=error):
        flashpo.trl.SFTConfig(tmp_path, use_cpu=True, bf16=False, **option)
