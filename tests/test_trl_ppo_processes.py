"""PPOTrainer on two processes, by DDP and FSDP2, and with models that are placed after its constructor."""

import os

import pytest
import torch

pytest.importorskip("trl")
from test_trl_ppo import by_hand, first_batch, make, scripted
from transformers import AutoModelForCausalLM
from trl_models import Recorder, assert_ran, assert_same, make_trainer, model_path, train
from two_processes import in_two_processes, needs_gloo

import flashpo.trl
from flashpo.packing import parity
from flashpo.trl import PPOTrainer
from flashpo.trl.patch import patched
from flashpo.trl.verify import Step


def two_steps(folder: str, critic: str, batch: int, **options):
    options |= dict(num_iterations=2, max_steps=2, model=folder, critic=critic, per_device_train_batch_size=batch)
    trainer = scripted(make_trainer("PPO", flashpo.trl, num_generations=1, shuffle_dataset=False, **options))
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    log = [
        {k: v for k, v in x.items() if "loss" in k or k in ("kl", "explained_variance")}
        for x in trainer.state.log_history
    ]
    return trainer, [Step(0.0, {}, gradients) for gradients in recorder.gradients], log


def check_ddp(rank: int, folder: str, critic: str) -> None:
    options = dict(ddp_backend="gloo", ddp_find_unused_parameters=False)
    trainer, steps, log = two_steps(folder, critic, batch=4, **options)
    assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    expected = torch.load(os.path.join(folder, f"one-process-{critic}.pt"), weights_only=False)
    assert_same(expected["steps"], steps)
    for a, b in zip(expected["log"][:-1], log[:-1]) if rank == 0 else ():
        assert b == pytest.approx(a, rel=1e-3, abs=1e-4)


@needs_gloo
def test_two_processes_take_the_step_of_one():
    folder = model_path("qwen3")
    for critic in ("shared", "separate"):
        _, steps, log = two_steps(folder, critic, batch=8)
        torch.save({"steps": steps, "log": log}, os.path.join(folder, f"one-process-{critic}.pt"))
    in_two_processes((check_ddp, folder, "shared"), (check_ddp, folder, "separate"))


def check_fsdp2(rank: int, folder: str, kind: str) -> None:
    """Actor and critic sharded over two processes: gradients are the mean of those of both processes' sequences."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from transformers import AutoModel
    from trl.trainer.utils import add_fused_lm_head

    from flashpo.trl.critic import attach_critic

    def actor_critic():
        model = AutoModelForCausalLM.from_pretrained(folder)
        add_fused_lm_head(model)
        critic = attach_critic(model, AutoModel.from_pretrained(folder) if kind == "separate" else None)
        generator = torch.Generator().manual_seed(3)
        critic.head.weight.data = torch.randn(critic.head.weight.shape, generator=generator)
        return model

    def loss(model, seed):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(5, 90, (2, 9), generator=generator)
        weights = torch.randn(2, 2, 8, generator=generator)
        with model.critic.asked():
            out = model(input_ids=ids, labels=ids, fused_lm_head=True)
        return (weights[0] * out.log_probs + weights[1] * out.state_values).sum()

    whole, sharded = actor_critic(), actor_critic()
    ((loss(whole, 0) + loss(whole, 1)) / 2).backward()
    mesh = init_device_mesh("cpu", (2,))
    for block in sharded.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert isinstance(sharded.critic.head.weight, DTensor)
    loss(sharded, rank).backward()
    expected = {n: p.grad for n, p in whole.named_parameters()}
    got = {n: p.grad.full_tensor() for n, p in sharded.named_parameters()}
    assert_same([Step(0.0, {}, expected)], [Step(0.0, {}, got)])


@needs_gloo
def test_fsdp2():
    folder = model_path("qwen3")
    in_two_processes((check_fsdp2, folder, "shared"), (check_fsdp2, folder, "separate"))


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_models_that_are_placed_later_are_compared_at_the_first_scoring(critic, monkeypatch):
    """FSDP and DeepSpeed place weights after the constructor; values come from token trees all the same."""
    asked = []

    def compared(model, head=True):
        asked.append((model, head))
        return why_wrong(model, head)

    why_wrong = parity.why_wrong
    monkeypatch.setattr(parity, "why_wrong", compared)
    monkeypatch.setattr(PPOTrainer, "_has_whole_models", property(lambda self: False))
    monkeypatch.setattr(parity, "_answers", {})
    trainer = make(critic=critic)
    assert not asked
    with patched():
        batch = first_batch(trainer)
    backbone = [] if critic == "shared" else [(trainer.critic.backbone, False)]
    assert asked[0] == (trainer.model, True)
    assert [(model, head) for model, head in asked if not head] == backbone
    times = len(asked)
    assert trainer._packed.prepare() == ""
    live = batch["completion_mask"].bool()
    torch.testing.assert_close(batch["old_values"][live], by_hand(trainer, batch)[2][live])
    flashpo.stats(reset=True)
    train(trainer)
    assert_ran("tree_attention_fwd")
    assert len(asked) == times
