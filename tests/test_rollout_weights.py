"""WeightView: what it computes, what it leaves unchanged, and when the weights must be copied again."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")
import peft
from accuracy import assert_as_accurate
from transformers import AutoModelForCausalLM
from trl_models import CONFIGS, VOCAB
from two_processes import in_two_processes, needs_gloo

from flashpo._huge_pages import HugePages
from flashpo.ops.packed_linear import packs
from flashpo.rollout.adapters import lora_linear, vanilla_lora
from flashpo.rollout.packed_linear import packed_linear
from flashpo.rollout.weights import PACK_NUMEL, WeightView

IDS = torch.arange(24).view(2, 12) % VOCAB


def tiny(kind="qwen3", dtype=torch.float32):
    return AutoModelForCausalLM.from_config(CONFIGS[kind]()).to(dtype).eval()


def with_lora(model, **options):
    """Two adapters of which each moves the logits by far more than rounding."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.1, **options)
    model = peft.get_peft_model(model, config)
    model.add_adapter("other", config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def swapped(model):
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


def assert_close(out, expected, dtype=torch.float32):
    spread = expected.float().std()
    assert (out.float() - expected.float()).abs().max() < spread * (1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 5, 32, 33, 100, 500])
def test_packed_linear(dtype, bias, rows):
    linear = nn.Linear(192, 321, bias=bias, dtype=dtype)
    packed = packed_linear(linear.weight.detach(), linear.bias.detach() if bias else None, linear, HugePages().empty)
    if packed is None:
        pytest.skip(f"no packed {dtype} on this machine")
    x = torch.randn(rows, 2, 192, dtype=dtype)[:, 1:]  # not dense
    expected = linear(x)
    out = packed(x)
    assert out.shape == expected.shape
    assert out.dtype == dtype
    exact = F.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    error, allowed = ((y.double() - exact).abs().max().item() if rows else 0 for y in (out, expected))
    assert error <= 2 * allowed + 1e-6


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_tied", "gemma2", "phi", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shadow_computes_the_same(kind, dtype):
    model = tiny(kind, dtype)
    before = copy.deepcopy(model.state_dict())
    expected = logits(model)
    linears = {name: x for name, x in model.named_modules() if type(x) is nn.Linear}
    packed = [name for name, x in linears.items() if packed_linear(x.weight.detach(), None, x, HugePages().empty)]
    with WeightView(model, "shadow"):
        assert len(linears) >= 9
        assert swapped(model) == packed, "in the dtype of a parameter only a packed copy is of use"
        assert_close(logits(model), expected, dtype)
    assert not swapped(model)
    for name, value in model.state_dict().items():
        assert value.dtype == dtype
        assert torch.equal(value, before[name])
    assert torch.equal(logits(model), expected)


def test_auto_packs_only_what_pays():
    model = nn.Sequential(nn.Linear(512, PACK_NUMEL // 512), nn.Linear(PACK_NUMEL // 512, 8))
    with WeightView(model):
        assert swapped(model) == ["0"]
    with WeightView(model, "alias"):
        assert not swapped(model)


def test_sees_an_update_that_leaves_no_trace():
    model = tiny()
    view = WeightView(model, "shadow")
    with view:
        first = logits(model)
    before = view.fingerprint()
    for parameter in model.parameters():
        parameter.data.mul_(1.1)  # its own version counter
    assert view.fingerprint() == before
    with view:
        second = logits(model)
    assert (first - second).abs().max() > 0.1
    assert_close(second, logits(model))


def test_weights_that_change_in_the_middle():
    model = tiny()
    view = WeightView(model)
    with pytest.raises(RuntimeError, match="changed during the rollout"), view, torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    assert not swapped(model)
    with view:  # usable again
        pass


def test_restored_after_an_exception():
    model = with_lora(tiny())
    hook = model.base_model.model.lm_head.register_forward_hook(lambda *_: None)
    wrapped = model.base_model.model.model.layers[0].mlp.down_proj
    wrapped.forward = own = types.MethodType(type(wrapped).forward, wrapped)  # as a library's hook would
    with pytest.raises(KeyError, match="mid-rollout"), WeightView(model, "shadow"):
        raise KeyError(f"mid-rollout: {len(swapped(model))}")
    assert swapped(model) == ["base_model.model.model.layers.0.mlp.down_proj"]
    assert wrapped.forward is own
    assert hook.id in model.base_model.model.lm_head._forward_hooks


def test_somebody_elses_forward_is_kept():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].forward = lambda x: x + 1
    with WeightView(model, "shadow"):
        assert torch.equal(model(torch.zeros(1, 8)), torch.ones(1, 8))


def test_quantised_and_parametrised_layers_run_live():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    torch.nn.utils.parametrizations.weight_norm(model[0])
    with WeightView(model, "shadow"):
        assert swapped(model) == ["1"]


@pytest.mark.parametrize("mode", ["auto", "shadow"])
def test_fp32_weights_under_autocast(mode):
    model = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(model)
    with WeightView(model, mode, dtype=torch.bfloat16):
        assert model.lm_head(torch.zeros(1, 32)).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):  # a part that the model keeps in fp32
            assert model.lm_head(torch.zeros(1, 32)).dtype == torch.float32
        out = logits(model)
    assert_close(out, expected, torch.bfloat16)
    assert not torch.is_autocast_enabled("cpu")
    assert (logits(model) - out.float()).abs().max() > 1e-3, "nothing was cast"


@pytest.mark.parametrize("lora", ["live", "merged", "auto"])
@pytest.mark.parametrize("mode", ["auto", "shadow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora(lora, mode, dtype):
    model = with_lora(tiny(dtype=dtype))  # PEFT keeps the adapters in fp32
    before = copy.deepcopy(model.state_dict())
    expected = logits(model)
    with model.disable_adapter():
        assert (logits(model) - expected).abs().max() > 0.3
    with WeightView(model, mode, lora=lora):
        out = logits(model)
    assert_as_accurate(out, logits(copy.deepcopy(model).double()), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_early_adapter_survives_in_16_bit():
    """In bf16 W + s B A is mostly W while B is small: a merged copy would be the base model."""
    model = with_lora(tiny(dtype=torch.bfloat16))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(1e-3)
    layer = model.base_model.model.model.layers[0].mlp.gate_proj
    change = layer.get_delta_weight("default")
    kept = (layer.base_layer.weight + change).bfloat16() != layer.base_layer.weight
    assert kept.float().mean() < 0.2, "the premise"
    with WeightView(model, "shadow"):
        a, b, s = vanilla_lora(layer)[0]
        assert layer.forward.func is lora_linear
        assert layer.forward.args == (layer.base_layer, [(a, b, s)])


@pytest.mark.parametrize("lora", ["live", "merged"])
def test_another_adapter(lora):
    model = with_lora(tiny())
    model.set_adapter("other")
    other = logits(model)
    model.set_adapter("default")
    expected = logits(model)
    trains = [p.requires_grad for p in model.parameters()]
    with WeightView(model, lora=lora) as view:
        assert_close(logits(model), expected)
        with view.adapter("other"):
            assert_close(logits(model), other)
        assert_close(logits(model), expected)
        with pytest.raises(ValueError, match=r"no adapter 'third' .* \['default', 'other'\]"), view.adapter("third"):
            pass
    assert [p.requires_grad for p in model.parameters()] == trains
    assert model.active_adapters == ["default"]
    assert (expected - other).abs().max() > 0.3


def test_disabled_adapters():
    model = with_lora(tiny())
    with model.disable_adapter():
        expected = logits(model)
        with WeightView(model, "shadow"):
            assert_close(logits(model), expected)


@pytest.mark.parametrize("options", [dict(use_dora=True), dict(lora_bias=True)])
def test_adapters_that_are_more_than_lora(options):
    model = with_lora(tiny(), **options)
    expected = logits(model)
    with WeightView(model, "shadow"):
        assert_close(logits(model), expected)
    with pytest.raises(ValueError, match="no merged form"), WeightView(model, lora="merged"):
        pass
    assert not swapped(model)


def test_packed_weights_keep_their_place():
    """The pages stay at hand from one rollout to the next; the weights in them are the live ones."""
    linear = nn.Linear(192, 96)
    if not packs(linear.weight):
        pytest.skip("no kernel for packed weights")
    view, x, places = WeightView(linear, "shadow"), torch.randn(3, 192), []
    for _ in range(2):
        with torch.no_grad():
            linear.weight.mul_(2)
        with view:
            places.append(linear.forward.packed.data_ptr())
            torch.testing.assert_close(linear(x), F.linear(x, linear.weight, linear.bias))
    assert places[0] == places[1]
    view.release()
    assert not view._packed


def test_refusals():
    with pytest.raises(ValueError, match="mode must be one of"):
        WeightView(tiny(), "copy")
    with pytest.raises(ValueError, match="lora must be one of"):
        WeightView(tiny(), lora="no")
    with pytest.raises(ValueError, match="alias"):
        WeightView(tiny(), "alias", lora="merged")
    with pytest.raises(ValueError, match="meta device"), WeightView(nn.Linear(2, 2, device="meta")):
        pass
    sharded = nn.Linear(2, 2)
    sharded.weight.ds_status = types.SimpleNamespace(name="NOT_AVAILABLE")
    with pytest.raises(ValueError, match="ZeRO-3"), WeightView(sharded):
        pass
    view = WeightView(nn.Linear(2, 2))
    with view:
        with pytest.raises(RuntimeError, match="open"), view:
            pass
        with pytest.raises(RuntimeError, match="open"):
            view.release()


def check_fsdp2(rank: int, policy_dtype: torch.dtype | None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor

    torch.manual_seed(0)
    model = tiny("qwen3_tied")
    mesh, policy = init_device_mesh("cpu", (2,)), MixedPrecisionPolicy(param_dtype=policy_dtype)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    view = WeightView(model, "shadow")
    for _ in range(2):
        expected = logits(model)
        with view:
            fingerprint = view.fingerprint()
            assert not any(isinstance(p, DTensor) for p in model.parameters())
            alone = [torch.zeros(1), logits(model)][rank:]  # rank 1 decodes more often: no collective is left
            logits(model) if rank else None
            assert view.fingerprint() == fingerprint
        assert_close(alone[-1], expected, policy_dtype or torch.float32)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        assert model.lm_head.weight is model.model.embed_tokens.weight
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert (logits(model) - expected).abs().max() > 0.01, "the weights must move"


@needs_gloo
def test_fsdp2():
    in_two_processes((check_fsdp2, None), (check_fsdp2, torch.bfloat16))
