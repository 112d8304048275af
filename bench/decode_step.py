"""One step of decoding, from the tokens drawn last to the next ones: under a CUDA graph, and launched kernel by kernel.

The floor is a copy of as many bytes as the step has to read: every weight, and every distinct key and value once. All
rows stand still at one length, so that each call does the same.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from flashpo._causal_lm import CausalLM
from flashpo.bench.shapes import random_model
from flashpo.bench.timing import Device, Tables, compare, dtype_name
from flashpo.rollout import SamplingParams
from flashpo.rollout.cache import BLOCK, KVCache
from flashpo.rollout.fused import fused_backbone
from flashpo.rollout.prefix_tree import blocks_for
from flashpo.rollout.runner import Draw, Runner, Step
from flashpo.rollout.scheduler import Scheduler
from flashpo.rollout.seam import rollout_mode
from flashpo.rollout.support import support
from flashpo.rollout.weights import WeightView


class Case(NamedTuple):
    model: str  # of SHAPES
    dtype: torch.dtype
    prompts: int
    prompt: int  # tokens
    group: int = 8  # rows of each prompt
    own: int = 96  # tokens that each row has drawn

    @property
    def title(self) -> str:
        name = f"{self.model} {dtype_name(self.dtype)}"
        return f"decode step {name} batch={self.prompts * self.group} prompt={self.prompt} own={self.own}"


CASES = {
    "cpu": [Case("42M", dtype, 4, prompt) for dtype in (torch.float32, torch.bfloat16) for prompt in (256, 1024)],
    "cuda": [
        Case(model, torch.bfloat16, prompts, prompt)
        for model in ("1.7B", "0.6B", "4B")
        for prompts, prompt in ((8, 512), (8, 2048), (32, 512))
    ],
}


def loaded(runner: Runner, case: Case, vocabulary: int) -> tuple[Step, Callable]:
    """A step whose tables hold the case's rows, and what moves it on; what the cache holds does not matter."""
    rows = case.prompts * case.group
    scheduler = Scheduler(runner.cache.blocks, rows)
    for i in range(case.prompts):
        prompt = torch.randint(vocabulary, (case.prompt,)).tolist()
        scheduler.add(prompt, prompt_index=i, n=case.group, max_new_tokens=2 * case.own)
    scheduler.plan()
    for row in scheduler.rows:
        row.tokens.extend(torch.randint(vocabulary, (case.own,)).tolist())
    params = SamplingParams(n=case.group, max_new_tokens=2 * case.own)
    draws = [Draw.of(params, row.prompt_index, row.index) for row in scheduler.rows]
    return runner.load(scheduler.rows, scheduler.shared, draws)


@torch.no_grad()
def records(device: Device, case: Case) -> Iterator[dict]:
    model = random_model(case.model, case.dtype, device.name)
    parts, layers = CausalLM.of(model), support(model).layers
    blocks = 1 + case.prompts * (blocks_for(case.prompt) + case.group * blocks_for(2 * case.own))
    cache = KVCache(layers, blocks, case.dtype, torch.device(device.name))
    for tensor in (*cache.keys.values(), *cache.values.values()):
        tensor.normal_()
    runner = Runner(parts, cache)
    with rollout_mode(model), WeightView(model):
        runner.fused = fused_backbone(parts.backbone, case.dtype)
        step, advance = loaded(runner, case, model.config.vocab_size)
        still = [x.clone() for x in (step.own_length, step.position)]

        def standing(move: Callable) -> None:
            for numbers, before in zip((step.own_length, step.position), still):
                numbers.copy_(before)
            step.at.zero_()
            move()

        variants = {"FlashPO": lambda: standing(advance)}
        if advance is not step:
            variants["kernel by kernel"] = lambda: standing(step)
        standing(advance)
        if not step.logprobs[0].isfinite().all():
            raise AssertionError("the step draws nothing")
        weights = sum(p.numel() for p in model.parameters()) * case.dtype.itemsize
        tokens = case.prompts * (case.prompt + case.group * case.own)
        moved = weights + tokens * (cache.bytes // (blocks * BLOCK))
        source = torch.zeros(moved // 2, dtype=torch.uint8, device=device.name)
        target = torch.empty_like(source)
        seconds = compare(device, {"copy of as many bytes": lambda: target.copy_(source), **variants})
    for name, time in seconds.items():
        yield {
            "variant": name,
            "ms": time * 1e3,
            "times_floor": time / seconds["copy of as many bytes"],
            "tokens_per_s": case.prompts * case.group / time if name != "copy of as many bytes" else None,
            "gb_per_s": moved / time / 1e9,
        }


def tables(device: Device, with_peers: bool, quick: bool) -> Tables:
    for case in CASES[device.name][: 1 if quick else None]:
        torch.manual_seed(0)
        yield case.title, partial(records, device, case)
        device.collect()
