"""One decode step, from the tokens sampled last to the next ones: with a CUDA graph, and with kernels launched one by
one.

The floor is the slower of two things that are measured in the same run: copying as many bytes as the step must move
(every weight and every distinct key and value are read once, the recurrent states of a hybrid model are read and
written), and the step's products at the rate of a large matrix product.
Steps are timed in runs of as many steps as the engine makes before the host looks at the results: one on a CPU, sixteen
on a GPU.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from flashpo import _recurrent
from flashpo._causal_lm import CausalLM
from flashpo.bench.shapes import random_model
from flashpo.bench.timing import Device, Tables, compare, dtype_name
from flashpo.rollout import SamplingParams
from flashpo.rollout.cache import BLOCK, KVCache
from flashpo.rollout.fused import fused_backbone
from flashpo.rollout.hybrid import State, States, cache_keyword, is_hybrid
from flashpo.rollout.prefix_tree import blocks_for
from flashpo.rollout.runner import Draw, Runner, Step
from flashpo.rollout.scheduler import Scheduler
from flashpo.rollout.seam import rollout_mode
from flashpo.rollout.support import support
from flashpo.rollout.weights import WeightView

COPY, GEMM = "copy of as many bytes", "as many FLOPs in a large product"
GEMM_SIZE = {"cpu": 1024, "cuda": 8192}


class Case(NamedTuple):
    model: str  # a name in SHAPES
    dtype: torch.dtype
    prompts: int
    prompt: int  # tokens
    group: int = 8  # rows per prompt
    own: int = 96  # tokens that each row has sampled
    masters: torch.dtype | None = None  # dtype of the weights, if `dtype` is autocast's

    @property
    def title(self) -> str:
        name = f"{self.model} {dtype_name(self.dtype)}" + (" by autocast" if self.masters else "")
        return f"decode step {name} batch={self.prompts * self.group} prompt={self.prompt} own={self.own}"


CASES = {
    "cpu": [
        *(Case("42M", dtype, 4, prompt) for dtype in (torch.float32, torch.bfloat16) for prompt in (256, 1024)),
        Case("42M", torch.bfloat16, 4, 256, masters=torch.float32),
        *(Case("35M hybrid", torch.float32, 4, prompt) for prompt in (256, 1024)),
    ],
    "cuda": [
        Case(model, torch.bfloat16, prompts, prompt)
        for model in ("1.7B", "0.6B", "4B")
        for prompts, prompt in ((8, 512), (8, 2048), (32, 512))
    ],
}


def loaded(runner: Runner, case: Case, vocabulary: int, state: State | None) -> tuple[Step, Callable]:
    """A step whose tables contain the case's rows, each with a copy of `state`, and a function that advances it. The
    cache's content does not matter."""
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
    return runner.load(scheduler.rows, scheduler.shared, draws, state and [state] * rows)


def state_of(model: torch.nn.Module) -> State | None:
    """The recurrent state of a hybrid model after one token; None for other models."""
    if not is_hybrid(model.config):
        return None
    _recurrent.install(CausalLM.of(model).text)  # as the engine does
    states, backbone = States(model.config, [None]), CausalLM.of(model).backbone
    backbone(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), **{cache_keyword(backbone): states})
    return states.take(0)


@torch.no_grad()
def records(device: Device, case: Case) -> Iterator[dict]:
    model = random_model(case.model, case.masters or case.dtype, device.name)
    parts, layers = CausalLM.of(model), support(model).layers
    blocks = 1 + case.prompts * (blocks_for(case.prompt) + case.group * blocks_for(2 * case.own))
    cache = KVCache(layers, blocks, case.dtype, torch.device(device.name))
    for tensor in (*cache.keys.values(), *cache.values.values()):
        tensor.normal_()
    autocast, state = case.dtype if case.masters else None, state_of(model)
    runner, views = Runner(parts, cache), {"FlashPO": WeightView(model, dtype=autocast)}
    if device.cuda:
        views["FlashPO, weights='shadow'"] = WeightView(model, "shadow", dtype=autocast)
    variants: dict[str, Callable] = {}
    for name, view in views.items():
        with rollout_mode(model), view:
            runner.fused = fused_backbone(parts.backbone, case.dtype)
            runner.use(name, None)
            step, advance = loaded(runner, case, model.config.vocab_size, state)
        variants[name] = run_of_steps(step, advance, runner.check_every)
        variants[name]()
        if not step.logprobs.isfinite().all():
            raise AssertionError("the step draws nothing")
    parameters, rows = sum(p.numel() for p in model.parameters()), case.prompts * case.group
    tokens = case.prompts * (case.prompt + case.group * case.own)
    moved = parameters * case.dtype.itemsize + tokens * (cache.bytes // (blocks * BLOCK))
    moved += 2 * rows * sum(x.nbytes for x in (state or {}).values())
    source = torch.zeros(moved // 2, dtype=torch.uint8, device=device.name)
    target = torch.empty_like(source)
    size = GEMM_SIZE[device.name]
    square = torch.randn(size, size, device=device.name).to(case.dtype)
    with rollout_mode(model), views["FlashPO"]:
        if device.cuda:
            variants["kernel by kernel"] = run_of_steps(step, step, runner.check_every)
        measured = {COPY: lambda: target.copy_(source), GEMM: lambda: square @ square, **variants}
        seconds = compare(device, measured)
    seconds[GEMM] *= _flops(model, case) / (2 * size**3)
    floor = max(seconds[COPY], seconds[GEMM])
    for name, time in seconds.items():
        time /= runner.check_every if name in variants else 1
        yield {
            "variant": name,
            "ms": time * 1e3,
            "times_floor": time / floor,
            "tokens_per_s": rows / time if name in variants else None,
            "gb_per_s": moved / time / 1e9,
        }


def _flops(model: torch.nn.Module, case: Case) -> int:
    """The operations of a step's matrix products: for each row, with all weights except embeddings, and with its
    context."""
    embeddings = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    weights = sum(p.numel() for p in model.parameters() if p is not embeddings or p is head)
    attended = sum(layer.kv_heads for layer in support(model).layers) * (case.prompt + case.own)
    config = model.config
    groups = config.num_attention_heads // config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * case.prompts * case.group * (weights + 2 * attended * groups * head_dim)


def run_of_steps(step: Step, move: Callable, steps: int) -> Callable[[], None]:
    """Make as many steps as the engine makes before the host looks; then put the rows back to where they were."""
    own, position = step.own_length.clone(), step.position.clone()

    def run() -> None:
        step.own_length.copy_(own)
        step.position.copy_(position)
        step.at.zero_()
        for _ in range(steps):
            move()

    return run


def tables(device: Device, with_peers: bool, quick: bool) -> Tables:
    for case in CASES[device.name][: 1 if quick else None]:
        torch.manual_seed(0)
        yield case.title, partial(records, device, case)
        device.collect()
