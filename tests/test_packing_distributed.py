"""Two gloo processes with token trees of their own: gradients are the mean over the processes of padded runs."""

import pytest
import torch
import torch.distributed as dist
from two_processes import in_two_processes, needs_gloo

pytestmark = needs_gloo
TEMPERATURE = 0.9


def check(rank: int, wrapper: str) -> None:
    """Rank 1 has fewer rows, and on the second turn nothing to score at all: it still joins every collective."""
    from packing_models import backward, batch, make, packed, padded
    from test_packing_models import assert_same_gradients

    plain, model = make("qwen3"), make("qwen3")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped = WRAPPERS[wrapper](model.train())
    for turn in range(2):
        b = batch()
        if rank:
            b.completion_mask[1 - turn :] = 0
        results = packed(wrapped, b, TEMPERATURE)
        torch.testing.assert_close(results[0], padded(plain, b, TEMPERATURE)[0], rtol=1e-9, atol=1e-9)
        ours = backward(wrapped, b, results)
        expected = backward(plain, b, padded(plain, b, TEMPERATURE))
        for gradient in expected.values():
            dist.all_reduce(gradient)
            gradient /= 2
        ours = {n.removeprefix("module."): g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in ours.items()}
        assert_same_gradients(ours, expected)


def ddp(model: torch.nn.Module) -> torch.nn.Module:
    return torch.nn.parallel.DistributedDataParallel(model)


def fsdp2(model) -> torch.nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


WRAPPERS = {"ddp": ddp, "fsdp2": fsdp2}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_gradients_are_reduced(wrapper):
    in_two_processes((check, wrapper))
