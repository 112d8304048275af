"""Benchmark of a training pass on token trees (model forward, log-probs of the completions, backward) against TRL's
padded pass on the same samples with the same weights.
"""

import copy
import dataclasses
import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from flashpo import TokenTree, pack, score
from flashpo.bench.shapes import SHAPES, USUAL, causal_lm
from flashpo.bench.timing import Device, Tables, compare, dtype_name

TEMPERATURE = 0.9


@dataclasses.dataclass(frozen=True)
class Workload:
    """`groups` prompts, each with `size` completions of up to `completion` tokens; of random lengths if `ragged`."""

    title: str
    groups: int
    size: int
    prompt: int
    completion: int
    ragged: bool = True


WORKLOADS = {
    "cpu": [
        Workload("GRPO, prompt 256", 2, 8, 256, 128),
        Workload("GRPO, prompt 1024", 2, 8, 1024, 128),
        Workload("DPO, prompt 512", 4, 2, 512, 128, ragged=False),
        Workload("nothing shared, no padding", 8, 1, 256, 128, ragged=False),
    ],
    "cuda": [
        Workload("GRPO, prompt 2048", 1, 8, 2048, 512),
        Workload("DPO, prompt 2048", 4, 2, 2048, 512, ragged=False),
        Workload("nothing shared, no padding", 8, 1, 1024, 512, ragged=False),
    ],
}
HYBRID = "35M hybrid"
HYBRID_WORKLOADS = [
    Workload("prompt 256", 1, 8, 256, 64),
    Workload("prompt 1024", 1, 8, 1024, 64),
    Workload("nothing shared, no padding", 8, 1, 256, 64, ragged=False),
]
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}


class Samples:
    """Prompts padded on the left and completions padded on the right, as in TRL."""

    def __init__(self, workload: Workload, vocab: int, device: str):
        rows, prompt, completion = workload.groups * workload.size, workload.prompt, workload.completion
        prompts = torch.randint(vocab, (workload.groups, prompt)).repeat_interleave(workload.size, 0)
        lengths = torch.randint(completion // 8, completion + 1, (rows, 1))
        lengths[0] = completion
        mask = (torch.arange(completion) < (lengths if workload.ragged else completion)).long().expand(rows, -1)
        self.input_ids = torch.cat([prompts, torch.randint(vocab, (rows, completion))], 1).to(device)
        self.attention_mask = torch.cat([torch.ones_like(prompts), mask], 1).to(device)
        self.completion_mask = mask.to(device)
        self.upstream = (torch.randn(rows, completion) * mask).to(device)

    def padded(self, model) -> Tensor:
        """The pass as in TRL's `_get_per_token_logps_and_entropies`."""
        labels = self.input_ids.masked_fill(self.attention_mask == 0, -100)
        labels[:, : -self.completion_mask.shape[1]] = -100
        out = model(input_ids=self.input_ids, attention_mask=self.attention_mask, labels=labels, fused_lm_head=True)
        return out.log_probs[:, -self.completion_mask.shape[1] :]

    def tree(self) -> TokenTree:
        return pack(self.input_ids, self.attention_mask, self.completion_mask)

    def packed(self, model) -> Tensor:
        return score(model, self.tree(), temperature=TEMPERATURE).logprob

    def train(self, log_probs: Callable, model) -> None:
        """Forward and backward, where forward is `packed`, `padded` or another function with the same interface."""
        model.zero_grad(set_to_none=True)
        (log_probs(model) * self.upstream).sum().backward()


def make_models(device: Device, dtype: torch.dtype, hybrid: bool = False) -> tuple:
    """A model for FlashPO, whose attention and norms are changed permanently, and an equal one for TRL."""
    from trl.trainer.utils import add_fused_lm_head

    peaked = {} if device.cuda else {"initializer_range": 0.1}
    model = causal_lm(SHAPES[HYBRID if hybrid else USUAL[device.name]], device.name, dtype=dtype, **peaked)
    if device.cuda:  # as TRL does by default; without it, TRL's padded pass does not fit into memory
        model.gradient_checkpointing_enable()
    add_fused_lm_head(model, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    return model.train(), copy.deepcopy(model)


def table(device: Device, workload: Workload, models: tuple, with_peers: bool) -> list[dict]:
    from flashpo.trl.patch import patched

    model, stock = models
    samples = Samples(workload, model.config.vocab_size, device.name)

    def padded_with_our_head(model) -> Tensor:
        with patched():
            return samples.padded(model)

    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]

    def packed_with_all_activations(model) -> Tensor:
        for module in checkpointed:
            module.gradient_checkpointing = False
        try:
            return samples.packed(model)
        finally:
            for module in checkpointed:
                module.gradient_checkpointing = True

    ways = {"FlashPO": (samples.packed, model), "padded, FlashPO's head": (padded_with_our_head, stock)}
    if with_peers:
        ways["TRL, padded"] = samples.padded, stock
    evaluations = {name: torch.no_grad()(partial(*way)) for name, way in ways.items()}
    if checkpointed:  # the tree has fewer tokens, so it may fit without
        ways["FlashPO without checkpointing"] = packed_with_all_activations, model
    exact = torch.no_grad()(samples.padded)(stock)
    errors = {
        name: ((evaluate() - exact) * samples.completion_mask).abs().max().item()
        for name, evaluate in evaluations.items()
    }
    if not errors["FlashPO"] < (1e-3 if model.dtype == torch.float32 else 0.5):
        raise AssertionError(f"{workload.title}: off by {errors['FlashPO']} nats")
    variants = {f"{name} pass": partial(samples.train, *way) for name, way in ways.items()}
    variants |= {f"{name} scoring": evaluate for name, evaluate in evaluations.items()}
    seconds = compare(device, variants, budget=0.0, rounds=3)  # a pass takes seconds to minutes
    tree = samples.tree()
    records = []
    for variant in variants:
        name, phase = variant.rsplit(" ", 1)
        record = {
            "variant": variant,
            "ms": seconds[variant] * 1e3,
            "times_flashpo": seconds[variant] / seconds[f"FlashPO {phase}"],
            "peak_mb": device.peak_bytes(variants[variant]) / 2**20,
            "tokens": len(tree.tokens) if name.startswith("FlashPO") else samples.input_ids.numel(),
            "off_by_nats": errors.get(name),
        }
        records.append(record)
    return records


def tables(device: Device, with_peers: bool, quick: bool) -> Tables:
    first, *others = DTYPES[device.name]
    models = make_models(device, first)
    workloads = WORKLOADS[device.name][: 1 if quick else None]
    for workload in workloads:
        yield f"training pass, {workload.title}", partial(table, device, workload, models, with_peers)
    for dtype in others if not quick else ():
        narrow = make_models(device, dtype)
        for workload in workloads[:2]:
            title = f"training pass, {workload.title}, {dtype_name(dtype)}"
            yield title, partial(table, device, workload, narrow, with_peers)
    if device.cuda and with_peers and importlib.util.find_spec("liger_kernel"):
        yield (
            f"training pass, {workloads[0].title}, with Liger's layers",
            partial(ligers_layers, device, workloads[0], models),
        )
    if not quick:
        models = make_models(device, first, hybrid=True)
        for workload in HYBRID_WORKLOADS:
            yield f"training pass of a hybrid, {workload.title}", partial(table, device, workload, models, with_peers)


def ligers_layers(device: Device, workload: Workload, models: tuple) -> list[dict]:
    """Use Liger's layers as TRL's use_liger_kernel does. The models keep them."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    for model in models:
        _apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=False)
    return table(device, workload, models, with_peers=True)
