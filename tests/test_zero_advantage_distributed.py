"""Two gloo processes, of which one has nothing to train on or cannot use a tree: their forwards match in number, and
the gradients are those of all rows.
"""

import pytest
import torch
from test_packing_distributed import WRAPPERS
from trl_models import model_path
from two_processes import in_two_processes, needs_gloo

import flashpo.trl

pytestmark = needs_gloo


def check(rank: int, folder: str, wrapper: str) -> None:
    from test_zero_advantage import Watch, generated, halves
    from trl_models import Step, assert_same, make_trainer

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
    check_padded_on_one(rank, trainer, wrapped, inputs)


def check_padded_on_one(rank: int, trainer, wrapped, inputs: dict) -> None:
    """Rank 0 has a tree with idle rows, rank 1 a batch that has to be padded: no rank waits for a forward that the
    other does not make, and the numbers are those of padded rows on both."""
    from trl_models import Step, assert_same

    keep, found = trainer._packed._images.of, []

    def refused(*args):
        raise ValueError("the batch has images that are none")

    def score(refuses: bool) -> tuple[Step, torch.Tensor]:
        trainer._packed._images.of = refused if refuses else keep
        wrapped.zero_grad(set_to_none=True)
        with torch.no_grad():  # in parts: one row in each, or as many tokens
            logprob = trainer._score(trainer.model, inputs, batch_size=1)[0]
        loss = trainer.compute_loss(wrapped, inputs)
        loss.backward()
        gradients = {n: p.grad for n, p in wrapped.named_parameters()}
        whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for n, g in gradients.items()}
        return Step(loss.item(), {}, whole), logprob

    trainer.args.skip_zero_advantage = True
    with flashpo.trl.patched():
        for refuses in (True, rank == 1):
            found.append(score(refuses))
    trainer._packed._images.of = keep
    assert_same([found[0][0]], [found[1][0]])
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_process_without_advantages(wrapper):
    in_two_processes((check, model_path(), wrapper))
