"""Two gloo processes with sharded weights, launched as users do, by real DeepSpeed and accelerate's FSDP.

They are compared with a run of stock TRL under DDP, which keeps the weights whole and lets torch reduce the gradients.
"""

import contextlib
import importlib.util
import os

import pytest
import torch
from safetensors.torch import load_file
from two_processes import in_two_processes, needs_gloo

pytest.importorskip("trl")
import trl
from image_processors import images_data, picture, qwen_processor
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel
from trl_models import SAMPLED_BY_TRL, assert_ran, make_trainer, model_path, reward, train

import flashpo.trl
from flashpo import _fallbacks
from flashpo._hosts.sharding import wraps_in_fsdp1
from flashpo.rollout.pool import Pool
from flashpo.rollout.runner import Step
from flashpo.trl.packed import Batch
from flashpo.trl.rollout import CannotGenerate

needs_deepspeed = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="deepspeed is not installed")
pytestmark = needs_gloo
COMMON = dict(ddp_backend="gloo", max_steps=2, optim="sgd", learning_rate=0.05, max_grad_norm=1.0)
OPTIONS = {
    "SFT": dict(per_device_train_batch_size=2, gradient_accumulation_steps=2),
    "GRPO": dict(per_device_train_batch_size=4, num_generations=4, beta=0.04),
    "Distillation": dict(per_device_train_batch_size=4, max_completion_length=8, beta=0.5),
}


@contextlib.contextmanager
def launched():
    """accelerate has DeepSpeed and FSDP for GPUs alone: it is told of GPUs, which are the CPU."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    before, prepare = dict(os.environ), PartialState._prepare_backend
    os.environ["ACCELERATE_TORCH_DEVICE"] = os.environ["DS_ACCELERATOR"] = "cpu"
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    pins = CPUOffloadPolicy.__init__.__defaults__
    CPUOffloadPolicy.__init__.__defaults__ = (False,)  # pin_memory, which needs a GPU
    try:
        yield
    finally:
        CPUOffloadPolicy.__init__.__defaults__ = pins
        PartialState._prepare_backend = prepare
        os.environ.clear()
        os.environ.update(before)
        unset_hf_deepspeed_config()  # else models of later trainers would be loaded sharded


def zero(stage: int) -> dict:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled; there is gloo, too
    # the threshold: else weights as small as these are never sharded
    optimization = {"stage": stage, "stage3_param_persistence_threshold": 0}
    config = dict(
        zero_optimization=optimization, zero_allow_untested_optimizer=True, zero_force_ds_cpu_optimizer=False,
        train_micro_batch_size_per_gpu="auto", gradient_accumulation_steps="auto", train_batch_size="auto",
    )  # fmt: skip
    return dict(deepspeed=config)


def fsdp(version: int, **config) -> dict:
    layers = {"transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"], "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    return dict(fsdp="full_shard auto_wrap", fsdp_config={"fsdp_version": version} | layers | config)


SHARDINGS = {
    "zero2": lambda: zero(2),
    "zero3": lambda: zero(3),
    "fsdp2": lambda: fsdp(2, reshard_after_forward=True),
    "fsdp2_images": lambda: fsdp(
        2, reshard_after_forward=True, transformer_layer_cls_to_wrap=["Qwen3VLTextDecoderLayer", "Qwen3VLVisionBlock"]
    ),
    "fsdp2_offload": lambda: fsdp(2, reshard_after_forward=True, cpu_offload=True),
    "fsdp1": lambda: fsdp(1, sync_module_states=False, cpu_ram_efficient_loading=False),
}


def trained(name: str, package, **options) -> tuple[dict, dict]:
    """Logs and whole weights after `max_steps`."""
    trainer = make_trainer(name, package, **COMMON | OPTIONS[name] | options)
    steps = train(trainer)
    return [step.loss for step in steps], whole(trainer)


def whole(trainer) -> dict[str, torch.Tensor]:
    if wraps_in_fsdp1(trainer.model_wrapped):  # whose state_dict ends the process on a CPU
        with FullyShardedDataParallel.summon_full_params(trainer.model_wrapped, writeback=False):
            named = trainer.model_wrapped.named_parameters()
            return {n.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for n, p in named}
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    if hasattr(next(model.parameters()), "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters(model.parameters()):
            return {n: p.detach().clone() for n, p in model.named_parameters()}
    return {n: v.float().cpu() for n, v in trainer.accelerator.get_state_dict(trainer.model_wrapped).items()}


def check_same_training(rank: int, folder: str, name: str, sharding: str, teacher: str) -> None:
    options = {"model": folder} | ({"teacher_model": teacher} if name == "Distillation" else {})
    options |= with_images(name, rank) if sharding == "fsdp2_images" else {}
    losses, weights = trained(name, trl, ddp_find_unused_parameters=False, **options)
    start = make_trainer(name, trl, **COMMON | OPTIONS[name] | options).model.state_dict()
    with launched():
        how = SHARDINGS[sharding]() | dict(use_cpu=False)
        flashpo.stats(reset=True)
        sampled = {} if sharding == "fsdp1" else SAMPLED_BY_TRL.get(name, {})
        our_losses, ours = trained(name, flashpo.trl, **how, **sampled, **options)
    head = "linear_divergence" if name == "Distillation" else "linear_logprob"
    assert_ran(f"{head}_partial", f"{head}_bwd", "tree_attention_fwd")
    refused = [reason for reason in _fallbacks.said if "rollout engine" in reason]
    assert len(refused) == (name == "GRPO" and sharding == "fsdp1")
    assert all("FSDP1 shards the weights: use FSDP2" in reason for reason in refused)
    assert sharding == "fsdp1" or not _fallbacks.said
    _fallbacks.said.clear()
    if rank == 0:
        torch.testing.assert_close(our_losses, losses, rtol=1e-4, atol=1e-5)
        for n, w in weights.items():
            step = (w - start[n]).norm()
            assert step > 0, f"{n} was not trained: nothing is compared"
            assert (ours[n] - w).norm() <= 1e-3 * step, f"{n}: {(ours[n] - w).norm() / step}"


def with_images(name: str, rank: int) -> dict:
    """Options for a step on rows with one image or two; in GRPO, one process has equal rewards."""
    images = [[picture(10)], [picture(60), picture(80)], [picture(20), picture(30)], [picture(10)]]
    options = dict(train_dataset=images_data(name, images), processing_class=qwen_processor(), max_steps=1)
    return options | ({"max_length": None} if name == "SFT" else {"reward_funcs": equal_rewards if rank else reward})


def check_rollouts_of_images(rank: int, folder: str) -> None:
    """The engine generates if both processes have images, and TRL if only one of them has."""
    with launched():
        how = SHARDINGS["fsdp2_images"]() | dict(use_cpu=False)
        options = COMMON | OPTIONS["GRPO"] | with_images("GRPO", rank) | how
        trainer = make_trainer("GRPO", flashpo.trl, model=folder, **options)
        train(trainer)
        assert_ran("decode_attention_fwd", "tree_attention_fwd")
        assert trainer._rollouts.generated
        assert not _fallbacks.said
        if rank == 0:
            assert trainer.state.log_history[0]["rollout/mismatch/max"] < 1e-4
        trainer._rollouts._all_show(True)
        with pytest.raises(CannotGenerate, match="only some processes have prompts with images"):
            trainer._rollouts._all_show(rank == 0)
        agreed = trainer._packed.sharing.agreed
        assert [agreed(True, [trainer.model], shows) for shows in (True, False, rank == 0)] == [True, True, False]
        _fallbacks.said.clear()


def equal_rewards(completions, **kwargs) -> list[float]:
    return [1.0] * len(completions)


def check_ranks_meet(rank: int, folder: str, sharding: str) -> None:
    """What one rank finds against the engine, memory that it lacks, and how many parts its batch is scored in hold for
    both."""
    with launched():
        how = SHARDINGS[sharding]() | dict(use_cpu=False)
        options = COMMON | OPTIONS["GRPO"] | dict(old_logprobs="rollout", rollout_options={"check": False}, max_steps=4)
        trainer = make_trainer("GRPO", flashpo.trl, model=folder, **options, **how)
        rollouts, by_engine = trainer._rollouts, []
        check = rollouts._prepare

        def prepare(*args):
            batch = len(by_engine)
            if rank == 1 and batch == 1:
                raise CannotGenerate("its prompts are too long")
            params = check(*args)
            if rank == 1:  # before its pool, and while it decodes
                Pool.admit = admit if batch != 2 else no_memory
                Step.__call__ = step if batch != 3 else no_memory
            return params

        def no_memory(*args):
            raise torch.OutOfMemoryError("no memory")

        admit, step = Pool.admit, Step.__call__
        rollouts._prepare = prepare
        keep = trainer._generate_and_score_completions

        def generate(inputs):
            batch = keep(inputs)
            by_engine.append(rollouts.generated)
            return batch

        trainer._generate_and_score_completions = generate
        trainer.train()
        assert by_engine == [True, False, False, False]
        if rank == 0:
            log = trainer.state.log_history[0]
            assert log["rollout/gather_bytes"] == sum(
                x.nbytes for x in load_file(f"{folder}/model.safetensors").values()
            )
            assert log["rollout/gather_seconds"] > 0
            assert "rollout/gather_bytes" not in trainer.state.log_history[1]

        ids = torch.arange(5, 29).view(4, 6)
        ids = ids if rank else ids[:1].expand(4, 6).contiguous()
        mask, forwards = torch.ones_like(ids), []
        scored = mask[:, -5:]
        hook = trainer.model.get_input_embeddings().register_forward_hook(lambda *args: forwards.append(len(args[1])))
        for graph in (torch.no_grad, torch.enable_grad):
            with graph():
                whole_batch = trainer._packed.score(trainer.model, Batch(ids, mask), scored)[0]
                forwards.clear()
                parts = trainer._packed.score(trainer.model, Batch(ids, mask), scored, batch_size=1)[0]
            assert len(forwards) == 4
            torch.testing.assert_close(parts, whole_batch, rtol=1e-4, atol=1e-5)
        hook.remove()
        trainer.accelerator.backward(parts.sum())


def test_fsdp():
    folder = model_path()
    same = [(check_same_training, folder, name, "fsdp2", model_path("qwen3_tied")) for name in OPTIONS]
    others = [(check_same_training, folder, *how, "") for how in (("SFT", "fsdp2_offload"), ("GRPO", "fsdp1"))]
    shows = model_path("qwen3_vl")
    images = [(check_same_training, shows, name, "fsdp2_images", "") for name in ("SFT", "GRPO")]
    images += [(check_rollouts_of_images, shows)]
    in_two_processes(*same, *others, *images, (check_ranks_meet, folder, "fsdp2"))


@needs_deepspeed
def test_zero2():
    in_two_processes(*[(check_same_training, model_path(), name, "zero2", "") for name in ("SFT", "GRPO")])


@needs_deepspeed
def test_zero3():
    folder = model_path()
    same = [(check_same_training, folder, name, "zero3", model_path("qwen3_tied")) for name in OPTIONS]
    in_two_processes(*same, (check_ranks_meet, folder, "zero3"))
