"""Two gloo processes with different token trees: the gradients are the mean of the processes' padded runs."""

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3Config
from trl_models import SMALL
from two_processes import in_two_processes, needs_gloo

from flashpo._causal_lm import CausalLM

pytestmark = needs_gloo
TEMPERATURE = 0.9


def check(rank: int, wrapper: str, multimodal: bool) -> None:
    """Rank 1 has fewer rows, and on the second turn nothing to score at all: it still joins every collective. The tower
    of a multimodal model has no gradient from text."""
    from packing_models import backward, batch, make, packed, padded
    from test_packing_models import assert_same_gradients

    from flashpo.bench.tiny_models import tiny_multimodal
    from flashpo.trl._text_only import zeros_change_nothing

    plain, model = (tiny_multimodal("qwen3_vl").double() if multimodal else make("qwen3") for _ in range(2))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped = WRAPPERS[wrapper](model.train())
    assert not multimodal or zeros_change_nothing(wrapped, "mm_token_type_ids")
    for turn in range(2):
        b = batch()
        if rank:
            b.completion_mask[1 - turn :] = 0
        results = packed(wrapped, b, TEMPERATURE)
        torch.testing.assert_close(results[0], padded(plain, b, TEMPERATURE)[0], rtol=1e-9, atol=1e-9)
        ours = backward(wrapped, b, results)
        expected = backward(plain, b, padded(plain, b, TEMPERATURE))
        expected = {name: x for name, x in expected.items() if x is not None}
        for gradient in expected.values():
            dist.all_reduce(gradient)
            gradient /= 2
        ours = {n.removeprefix("module."): g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in ours.items()}
        unused = [x for name, x in ours.items() if name not in expected and x is not None]
        assert not any(x.any() for x in unused)
        assert_same_gradients({name: ours[name] for name in expected}, expected)


def check_tensor_parallel(rank: int, folder: str) -> None:
    """transformers splits layers and head over the processes, which all have the same batch."""
    from packing_models import backward, batch, packed, padded
    from test_packing_models import assert_same_gradients

    from flashpo._hosts.sharding import is_dtensor
    from flashpo.rollout import support

    plain = AutoModelForCausalLM.from_pretrained(folder)
    split = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    assert is_dtensor(split.lm_head.weight)
    assert is_dtensor(split.model.layers[0].mlp.up_proj.weight)
    results, expected = packed(split, batch(), TEMPERATURE), padded(plain, batch(), TEMPERATURE)
    torch.testing.assert_close(results[0], expected[0], rtol=1e-4, atol=1e-5)
    ours, expected = backward(split, batch(), results), backward(plain, batch(), expected)
    whole = {n: g.full_tensor() if is_dtensor(g) else g for n, g in ours.items()}
    assert_same_gradients(whole, expected, tolerance=1e-4)
    assert support(split).reason == "weights are DTensors, but not of FSDP2 (tensor parallelism)"


def ddp(model: torch.nn.Module) -> torch.nn.Module:
    return torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=hasattr(model.model, "visual"))


def fsdp2(model) -> torch.nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for block in CausalLM.of(model).text.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


WRAPPERS = {"ddp": ddp, "fsdp2": fsdp2}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_gradients_are_reduced(wrapper):
    in_two_processes((check, wrapper, False), (check, wrapper, True))


def test_tensor_parallelism(tmp_path):
    for tied in (False, True):
        config = Qwen3Config(
            **SMALL | {"num_key_value_heads": 2, "vocab_size": 98}, head_dim=16, tie_word_embeddings=tied
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / str(tied))
    in_two_processes(*((check_tensor_parallel, str(tmp_path / str(tied))) for tied in (False, True)))
