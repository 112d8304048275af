"""Two gloo processes with different token trees: the gradients are the mean of the processes' padded runs."""

import pytest
import torch
import torch.distributed as dist
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
