"""The self-check of token trees against the model itself: it finds what differs and accepts what agrees."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
import transformers
from packing_models import CONFIGS, make
from peft import LoraConfig, get_peft_model
from torch import nn
from two_processes import needs_gloo

import flashpo
from flashpo import pack, packable, score
from flashpo._causal_lm import Unsupported
from flashpo.bench.tiny_models import tiny_config, tiny_model
from flashpo.packing import attention
from flashpo.packing.parity import parity, why_wrong
from flashpo.packing.scoring import prepare


def llama(dtype: torch.dtype = torch.float32):
    return make("llama", dtype)


class TokenShift(nn.Module):
    """Mixes neighbouring tokens, as RWKV does, which no configuration tells."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x + 0.5 * nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])


class OtherGradient(torch.autograd.Function):
    """x, whose gradient is that of the next token: the forward tells nothing."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, d):
        return nn.functional.pad(d, (0, 0, 0, 1))[:, 1:]


class WrongBackward(TokenShift):
    def forward(self, x):
        return self.inner(OtherGradient.apply(x))


class BatchMean(TokenShift):
    """Rows of a batch meet."""

    def forward(self, x):
        return self.inner(x + x.mean(0, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [TokenShift, WrongBackward, BatchMean])
def test_a_wrong_block_is_found(wrong, dtype, monkeypatch):
    monkeypatch.setattr("flashpo.packing.parity._answers", {})
    model = llama(dtype)
    assert packable(model, check=True).ok  # whose answer must not be that of the model below
    model.model.layers[1].mlp = wrong(model.model.layers[1].mlp)
    assert packable(model).ok
    ok, reason = packable(model, check=True)
    assert not ok
    assert ("gradients" if wrong is WrongBackward else "log-probs") in reason
    assert "of a token tree differ from those of padded rows" in reason
    tree = pack(*(torch.tensor([[x, 1, 1]]) for x in (1, 1, 0)))
    with pytest.raises(Unsupported, match=r"llama: .* of a token tree differ"):
        score(model, tree)


class ShiftedLlama(transformers.LlamaForCausalLM):
    """A class with code of its own: its small twin shows it, too."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = WrongBackward(layer.mlp)


def test_a_class_of_ones_own_is_found_by_its_twin():
    reason = why_wrong(ShiftedLlama(CONFIGS["llama"]()))
    assert reason.startswith("llama: in a small ShiftedLlama of the same config gradients")


WRONG_TREES = {
    "a window of one more": ("qwen2 window", dict(window=lambda w: w and w + 1)),
    "a window of one less": ("mistral", dict(window=lambda w: w and w - 1)),
    "a mask that is off by one": (
        "llama",
        dict(end=lambda end: (end - 1).maximum(torch.arange(len(end), dtype=torch.int32) + 1)),
    ),
    "a scale that is off by 1 %": ("llama", dict(scale=lambda scale: 1.01 * scale)),
    "sinks left out": ("gpt_oss", dict(sinks=lambda sinks: None)),
    "no softcap": ("gemma2", dict(softcap=lambda cap: 0.0)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mistake", WRONG_TREES)
def test_a_wrong_attention_is_found(mistake, dtype, monkeypatch):
    kind, changes = WRONG_TREES[mistake]
    names = ("q", "k", "v", "sinks", "end", "position", "scale", "window", "softcap")
    right = attention.attend

    def wrong(*args):
        given = dict(zip(names, args))
        return right(*(changes.get(name, lambda x: x)(x) for name, x in given.items()))

    monkeypatch.setattr(attention, "attend", wrong)
    assert "of a token tree differ" in why_wrong(make(kind, dtype))


RIGHT = [(kind, torch.float32) for kind in CONFIGS]
RIGHT += [(kind, torch.bfloat16) for kind in ("llama", "qwen3_moe", "gemma2", "phimoe", "gpt_oss")]


@pytest.mark.parametrize(("kind", "dtype"), RIGHT)
def test_what_is_right_is_not_refused(kind, dtype, monkeypatch):
    if dtype != torch.float32:
        monkeypatch.setattr("flashpo.packing.parity._twin_differs", lambda *_: "")  # the same as for fp32
    assert why_wrong(make(kind, dtype)) == ""


def test_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert why_wrong(llama()) == ""


@pytest.mark.parametrize("family", ["doge", "modernbert-decoder"])
def test_families_that_only_a_trial_finds(family):
    model = tiny_model(family)
    assert packable(model).ok
    assert not packable(model, check=True).ok


@pytest.mark.parametrize("family", ["gpt2", "opt", "biogpt", "seed_oss"])
def test_dropout_in_attention_under_any_name(family, monkeypatch):
    """By published defaults, and switched on by whatever the family calls it: such a model trains segment by segment,
    which is compared with padded rows, too."""
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout")
    (name,) = [name for name in names if name in tiny_config(family).to_dict()]
    assert why_wrong(tiny_model(family, **{name: 0.25})) == ""
    right = attention.along_paths
    monkeypatch.setattr(attention, "along_paths", lambda *args, **options: 1.01 * right(*args, **options))
    assert "of a token tree differ" in why_wrong(tiny_model(family, **{name: 0.25}))
    assert why_wrong(tiny_model(family, **{name: 0.0})) == ""


def state(model) -> tuple:
    modules = list(model.modules())
    flags = [(m.training, vars(m).get("forward"), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]
    plain = [{k: x for k, x in vars(m).items() if isinstance(x, bool | int | float | str)} for m in modules]
    names = [c._attn_implementation for c in (getattr(m, "config", None) for m in modules) if c is not None]
    tensors = [(id(x), x._version) for x in (*model.parameters(), *model.buffers())]
    values = [x.clone() for x in model.buffers()]
    return (flags, plain, names, tensors), values, [p.grad for p in model.parameters()], torch.get_rng_state()


@pytest.mark.parametrize("how", ["as it is", "LoRA", "checkpointing", "dropout", "wrong", "prepared", "longrope"])
def test_the_model_is_left_as_it_was(how):
    model = tiny_model("gpt2") if how == "dropout" else llama()
    if how == "longrope":
        rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
        config = transformers.LlamaConfig(**CONFIGS["llama"]().to_dict() | {"max_position_embeddings": 30})
        config.rope_parameters = rope
        model = transformers.AutoModelForCausalLM.from_config(config)
        model(input_ids=torch.ones(1, 40, dtype=torch.int64))
        assert model.model.rotary_emb.max_seq_len_cached == 40
    if how == "LoRA":
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1))
    if how == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
    if how == "wrong":
        model.model.layers[0].mlp = TokenShift(model.model.layers[0].mlp)
    if how == "prepared":
        prepare(model)
    model.train()
    model.get_input_embeddings().eval()
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    gradients = [p.grad for p in model.parameters()]
    flashpo.stats(reset=True)
    before = state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bool(why_wrong(model)) == (how == "wrong")
    after = state(model)
    assert after[0] == before[0]
    assert all(torch.equal(a, b) for a, b in zip(after[1], before[1]))
    assert all(a is b for a, b in zip(after[2], gradients))
    assert all(x is None or (x == 1).all() for x in gradients)
    assert torch.equal(after[3], before[3])
    assert not flashpo.stats()


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@needs_gloo
@pytest.mark.parametrize("wrapper", ["FSDP2", "DDP", "FSDP1"])
def test_a_wrapped_model_is_left_as_it_was_and_refused_each_time(wrapper, group, monkeypatch):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    monkeypatch.setattr("flashpo.packing.parity._answers", {})
    model = llama()
    model.model.layers[0].mlp = TokenShift(model.model.layers[0].mlp)
    if wrapper == "FSDP2":
        mesh = dist.init_device_mesh("cpu", (1,))
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh)
    elif wrapper == "DDP":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    model.train()
    model.get_submodule("model.layers.1" if wrapper == "FSDP2" else "module.model.layers.1").eval()
    before = [(m.training, vars(m).get("forward")) for m in model.modules()]
    tree = pack(*(torch.tensor([[x, 1, 1]]) for x in (1, 1, 0)))
    for _ in range(2):
        with pytest.raises(Unsupported, match="of a token tree differ"):
            score(model, tree)
        assert [(m.training, vars(m).get("forward")) for m in model.modules()] == before


@pytest.mark.parametrize("made", [False, True])
def test_in_inference_mode(made, monkeypatch):
    """Also of weights that were made in it, which have no gradients to compare."""
    monkeypatch.setattr("flashpo.packing.parity._answers", {})
    with torch.inference_mode(made):
        good, bad = llama(), llama()
    bad.model.layers[0].mlp = TokenShift(bad.model.layers[0].mlp)
    with torch.inference_mode():
        assert packable(good, check=True) == (True, "")
        assert "log-probs of a token tree differ" in packable(bad, check=True).reason
    assert packable(llama(), check=True).ok


def test_one_rank_without_memory_tells_the_others(monkeypatch):
    """And none of them keeps that for an answer."""
    answers = {}
    monkeypatch.setattr("flashpo.packing.parity._answers", answers)
    model = llama()

    def exhausted(*args, **options):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[0].mlp, "forward", exhausted)
        patch.setattr("flashpo.packing.parity._kind", lambda model: "llama")
        told = []
        assert "no memory" in parity(model, agree=lambda x: told.append(x) or x * 2)
        assert len(told) == 2
        assert not packable(model, check=True).ok
        assert "no memory" in parity(
            llama(), agree=lambda x: x if x == [False] else [*x, ("there is no memory", False)]
        )
        assert not answers
        assert parity(llama(), agree=lambda x: x if x == [False] else [*x, ("wrong", True)]) == "wrong"
        answers.clear()
        patch.setattr("flashpo._hosts.sharding.meets", lambda model: True)
        told.clear()
        with pytest.raises(torch.OutOfMemoryError):  # the others are in a forward that this rank has left
            parity(model, agree=lambda x: told.append(x) or x * 2)
        assert told == [[False]]
    assert packable(model, check=True).ok


def test_asked_once(monkeypatch):
    """Of models that are alike; adapters, dtypes and other code make another model."""
    asked = []
    monkeypatch.setattr("flashpo.packing.parity._answers", {})
    monkeypatch.setattr("flashpo.packing.parity.why_wrong", lambda model, head: asked.append(model) or "")
    base = llama()
    others = [
        get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM")),
        llama(torch.bfloat16),
        make("llama", torch.float32, "eager"),
    ]
    others.append(copy.deepcopy(base))
    others[-1].model.layers[0].self_attn.forward = lambda *args, **kwargs: None
    for model in (base, *others):
        for twice in (model, copy.deepcopy(model)):
            assert packable(twice, check=True).ok
            if twice is model and model is not others[-1]:
                prepare(twice)
    assert asked == [base, *others]


def test_a_model_that_fails_is_refused():
    model = llama()
    model.model.layers[0].mlp.forward = lambda x: x[:, :, :5]
    assert "RuntimeError on a few short rows" in packable(model, check=True).reason


def test_short_contexts():
    assert why_wrong(tiny_model("gpt2", n_positions=6, attn_pdrop=0.0)) == ""
