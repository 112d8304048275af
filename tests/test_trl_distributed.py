"""Two gloo processes under DDP and FSDP2: our gradients equal TRL's and are reduced over the processes."""

import itertools

import pytest
import torch
import torch.distributed as dist
from two_processes import in_two_processes, needs_gloo

pytest.importorskip("trl")
import trl
from image_processors import images_data, picture, qwen_processor
from trl_models import SAMPLED_BY_TRL, SPECIAL, VOCAB, assert_ran, assert_same, make_trainer, model_path, reward, train

import flashpo.trl

pytestmark = needs_gloo
RL = dict(per_device_train_batch_size=4, num_generations=4, beta=0.04)
OPTIONS = {
    "SFT": dict(gradient_accumulation_steps=2),
    "DPO": {},
    "KTO": {},
    "GRPO": RL | dict(entropy_coef=0.01),
    "RLOO": RL,
    "Distillation": dict(max_completion_length=8),
}


def check_ddp(rank: int, folder: str, name: str, teacher: str) -> None:
    flashpo.stats(reset=True)
    options = OPTIONS[name] | dict(model=folder, ddp_backend="gloo", ddp_find_unused_parameters=False, max_steps=2)
    if name == "Distillation":
        options |= {"teacher_model": teacher}
    stock_trainer = make_trainer(name, trl, **options)
    stock = train(stock_trainer)
    assert isinstance(stock_trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    assert not flashpo.stats()
    ours_trainer = make_trainer(name, flashpo.trl, **options, **SAMPLED_BY_TRL.get(name, {}))
    ours = train(ours_trainer)
    head = "linear_divergence" if name == "Distillation" else "linear_logprob"
    assert_ran(f"{head}_partial", f"{head}_bwd", "tree_attention_fwd")
    flashpo.trl.verify(ours_trainer, steps=1)  # of the wrapped model
    if rank:  # only the first process logs; gradients count on both
        for step in (*stock, *ours):
            step.loss, step.metrics = 0.0, {}
    assert_same(stock, ours)
    for step in ours:
        for parameter, gradient in step.gradients.items():
            both = [torch.empty_like(gradient) for _ in range(2)]
            dist.all_gather(both, gradient)
            assert torch.equal(*both), f"{parameter} was not reduced"


def check_images(rank: int, folder: str) -> None:
    """Rank 1 has rewards that train nothing, and a tower all the same."""
    options = dict(
        model=folder, ddp_backend="gloo", ddp_find_unused_parameters=False, max_steps=2,
        train_dataset=images_data("GRPO", [[picture(10)], [picture(80)]]), processing_class=qwen_processor(),
        reward_funcs=equal_rewards if rank else reward,
    )  # fmt: skip
    stock = train(make_trainer("GRPO", trl, **options))
    flashpo.stats(reset=True)
    ours = train(make_trainer("GRPO", flashpo.trl, **options, rollout="generate"))
    assert_ran("tree_attention_fwd")
    for step in (*stock, *ours):  # only the first process logs; gradients count on both
        step.loss, step.metrics = (step.loss, step.metrics) if rank == 0 else (0.0, {})
    assert_same(stock, ours)


def equal_rewards(completions, **kwargs) -> list[float]:
    return [1.0] * len(completions)


def check_fsdp2(rank: int, folder: str, head_alone: bool, trees: bool, one_pads: bool = False) -> None:
    """`head_alone`: the head is a unit of its own, whose hooks never fire: TRL gets a sharded DTensor from it.
    `trees`: the head takes them. `one_pads`: but not the batch of rank 1, so that both ranks run padded rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    from flashpo.trl.patch import patched, stock
    from flashpo.trl.sharing import Sharing
    from flashpo.trl.tree_head import take_trees
    from flashpo.trl.verify import Step

    mesh = init_device_mesh("cpu", (2,))

    def sharded(head_alone: bool):
        model = AutoModelForCausalLM.from_pretrained(folder)
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        if trees:
            sharing = Sharing(None)
            if one_pads and rank == 1:
                sharing.pays = lambda *args: False
            take_trees(model, sharing, temperature=1.0, fp32_head=False, outputs=("log_probs", "entropy"))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        if head_alone:
            fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert isinstance(model.lm_head.weight, DTensor)
        return model

    generator = torch.Generator().manual_seed(rank)  # each process its own sequences, one with none to score
    ids = torch.randint(len(SPECIAL), VOCAB, (2, 9), generator=generator)
    labels = ids.masked_fill(torch.rand(2, 9, generator=generator) > 0.6 * rank, -100)
    mask, weights = torch.ones_like(ids), torch.randn(2, 2, 8, generator=generator)

    def step(model, code) -> Step:
        model.zero_grad(set_to_none=True)
        with code():
            out = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
            loss = (weights[0] * out.log_probs + weights[1] * out.entropy).sum()
            loss.backward()
        return Step(loss.item(), {}, {n: p.grad.full_tensor() for n, p in model.named_parameters()})

    # TRL does not sum the gradient of a head that is a unit of its own over the processes
    on_trees = trees and not one_pads
    expected = step(sharded(head_alone and not on_trees), stock)
    flashpo.stats(reset=True)
    actual = step(sharded(head_alone), patched)
    assert_ran("linear_logprob_partial", "linear_logprob_bwd")
    assert bool(flashpo.stats().get("tree_attention_fwd")) == on_trees
    assert_same([expected], [actual])


def check_dynamic_sampling(rank: int, folder: str) -> None:
    """Rank 1 alone has a group of equal rewards: both generate a group, one rank takes it, and both count the same."""
    trainer = make_trainer("GRPO", flashpo.trl, model=folder, dynamic_sampling=2, loss="dapo")
    calls = iter([[0.9 if rank else 1.0, 0.9, 0.9, 0.9], [1.0, 2.0, 3.0, 4.0]])
    trainer.reward_funcs = [lambda completions, **kwargs: next(calls)]
    trainer.model.train()
    rows = [dict(trainer.train_dataset[rank]) for _ in range(4)]
    with flashpo.trl.patched():
        batch = trainer._generate_and_score_completions(rows)
    assert next(calls, None) is None
    first, last = (batch["advantages"][i].item() for i in (0, 3))
    assert (first < 0 < last) if rank else (last < 0 < first)  # rank 0 keeps its own group
    counts = {n.removeprefix("dynamic_sampling/"): v for n, v in trainer._metrics["train"].items() if "dynamic" in n}
    assert counts == {"degenerate": [1.0], "generated": [2.0], "replaced": [1.0], "left": [0.0]}
    tokens = batch["completion_mask"].sum()
    dist.all_reduce(tokens)
    assert batch["num_items_in_batch"] == tokens


def check_rollout(rank: int, folder: str, lora: bool) -> None:
    """Each rank generates its own rows, which here cut a group in two, by a seed of its own."""
    from peft import LoraConfig

    from flashpo.rollout import RolloutEngine

    asked, generate = [], RolloutEngine.generate

    def watched(self, prompts, params, **kwargs):
        asked.append((params[0].seed, [p.n for p in params]))
        return generate(self, prompts, params, **kwargs)

    RolloutEngine.generate = watched
    trainer = make_trainer(
        "GRPO", flashpo.trl, model=folder, ddp_backend="gloo", ddp_find_unused_parameters=False, max_steps=2,
        per_device_train_batch_size=3, num_generations=2, learning_rate=1e-2, rollout="engine",
        rollout_options={"check": False}, **({"peft_config": LoraConfig(target_modules="all-linear")} if lora else {}),
    )  # fmt: skip
    steps = train(trainer)
    RolloutEngine.generate = generate
    assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    assert [sorted(group) for _, group in asked] == [[1, 2]] * 2
    everybodys: list = [None, None]
    dist.all_gather_object(everybodys, [seed for seed, _ in asked])
    assert len({*everybodys[0], *everybodys[1]}) == 4
    for log in trainer.state.log_history[:2] if rank == 0 else ():
        assert log["rollout/mismatch/max"] < 1e-5
        assert log["rollout/mismatch/effective_sample_size"] == pytest.approx(1)
    for step in steps:
        for parameter, gradient in step.gradients.items():
            both = [torch.empty_like(gradient) for _ in range(2)]
            dist.all_gather(both, gradient)
            assert torch.equal(*both), f"{parameter} was not reduced"


def test_ddp():
    checks = [(check_ddp, model_path(), name, model_path("gemma2")) for name in OPTIONS]
    in_two_processes(*checks, (check_images, model_path("qwen3_vl")))


def test_dynamic_sampling():
    in_two_processes((check_dynamic_sampling, model_path()))


def test_fsdp2():
    folder = model_path()
    how = [*itertools.product((False, True), repeat=2), (False, True, True), (True, True, True)]
    in_two_processes(*[(check_fsdp2, folder, *each) for each in how])


def test_rollouts():
    folder = model_path()
    in_two_processes((check_rollout, folder, False), (check_rollout, folder, True))
