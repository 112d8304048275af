"""Two gloo processes, one with nothing to train on: their forwards match, gradients are those of all rows."""

import pytest
import torch
from test_packing_distributed import WRAPPERS
from trl_models import model_path
from two_processes import in_two_processes, needs_gloo

pytestmark = needs_gloo


def check(rank: int, folder: str, wrapper: str) -> None:
    from test_zero_advantage import Watch, generated, halves
    from trl_models import Step, assert_same, make_trainer

    import flashpo.trl

    options = dict(per_device_train_batch_size=8, reward_funcs=halves, gradient_checkpointing=True)
    trainer = make_trainer("GRPO", flashpo.trl, model=folder, **options)
    inputs = generated(trainer)
    some, none = inputs["advantages"], torch.zeros(8)
    every = torch.where(some == 0, 1.0, some)
    watch = Watch(trainer)
    wrapped = WRAPPERS[wrapper](trainer.model)
    for both in ((some, none), (every, some), (every, none), (every, every), (none, none)):  # of rank 0 and rank 1
        advantages, idle = both[rank], any((x == 0).any() for x in both)
        found = []
        for skip in (False, True):
            trainer.args.skip_zero_advantage = skip
            trainer._metrics["train"].clear()
            watch.trained.clear()
            watch.scored.clear()
            wrapped.zero_grad(set_to_none=True)
            loss = trainer.compute_loss(wrapped, inputs | {"advantages": advantages})
            loss.backward()
            trainer.flush_metrics()
            metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
            gradients = {n: p.grad for n, p in wrapped.named_parameters()}
            whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for n, g in gradients.items()}
            found.append(Step(loss.item(), metrics, whole))
            assert len(watch.trained) == 1
            assert len(watch.scored) == (skip and idle)
        if any(x.any() for x in both):
            assert_same(found[:1], found[1:])
        else:
            assert all((g == 0).all() for g in found[1].gradients.values())


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_process_without_advantages(wrapper):
    in_two_processes((check, model_path(), wrapper))
