"""tree_recurrence and tree_conv on groups of completions, against their torch references, and against transformers'
chunked computation on padded rows.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import flashpo
from flashpo import Lineage, tree_conv, tree_recurrence
from flashpo.bench.timing import Clock, Device, KernelTable


class Shape(NamedTuple):
    name: str
    key_heads: int
    heads: int
    features: int
    values: int
    per_feature: bool = False
    delta: bool = True


class Group(NamedTuple):
    prompt: int  # 0 means that nothing is shared
    completions: int
    longest: int  # the longest of ragged completions


SHAPES = {
    "cpu": [
        Shape("gated delta rule", 4, 8, 64, 64),
        Shape("Kimi delta attention", 8, 8, 64, 64, per_feature=True),
        Shape("Mamba-2", 1, 16, 64, 64, delta=False),
    ],
    "cuda": [
        Shape("gated delta rule", 16, 32, 128, 128),
        Shape("Kimi delta attention", 32, 32, 128, 128, per_feature=True),
        Shape("Mamba-2", 1, 48, 128, 64, delta=False),
    ],
}
GROUPS = {
    "cpu": [Group(256, 8, 64), Group(1024, 8, 64), Group(0, 8, 320)],
    "cuda": [Group(2048, 8, 512), Group(0, 8, 2560)],
}
PADDED, PHASES = "transformers, padded rows", ("forward", "step")


def lineage_of(group: Group, device: str) -> tuple[Lineage, Tensor]:
    """The lineage, and the flat index of every token in the padded rows, 0 on padding."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(group.longest // 8, group.longest + 1, (group.completions,), generator=generator)
    shared = [group.prompt] if group.prompt else []
    stops = torch.tensor([*shared, *lengths.tolist()]).cumsum(0)
    parents = torch.tensor([-1] * len(shared) + [0 if shared else -1] * group.completions)
    segments = torch.stack([F.pad(stops[:-1], (1, 0)), stops], 1)
    rows = [torch.cat([torch.arange(group.prompt), torch.arange(*x)]) for x in segments[len(shared) :].tolist()]
    return Lineage(segments, parents, device), torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)


def on(backend: str | None, f: Callable) -> Callable:
    def run(*args: Any) -> Any:
        with flashpo.backend(backend):
            return f(*args)

    return run


def padded_delta_rule(rows: Tensor) -> Callable:
    """The delta rule as Qwen3.5 computes it without `fla`: q and k are repeated for each head, and rows are whole."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    def run(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
        q, k = (x.repeat_interleave(v.shape[1] // q.shape[1], 1) for x in (q, k))
        q, k, v, decay, beta = (x[rows] for x in (q, k, v, decay, beta))
        return torch_chunk_gated_delta_rule(q, k, v, g=decay, beta=beta)[0]

    return run


def measured(device: Device, functions: dict[str, Callable], inputs: list[Tensor], clock: Clock) -> Iterator[dict]:
    """Measure forward alone, and forward with backward."""
    leaves = [x.requires_grad_() for x in inputs]
    variants = {}
    for name, f in functions.items():
        upstream = torch.randn_like(torch.no_grad()(f)(*leaves))

        def step(f=f, upstream=upstream) -> None:
            torch.autograd.grad(f(*leaves), leaves, upstream)

        backend = "torch" if name == "reference" else None  # for the backward pass, too
        variants[f"{name} forward"] = on(backend, torch.no_grad()(partial(f, *leaves)))
        variants[f"{name} step"] = on(backend, step)
    reference = on("torch", torch.no_grad()(functions["reference"]))
    exact, baseline = reference(*(x.double() for x in leaves)), reference(*leaves)
    error = (variants["FlashPO forward"]().double() - exact).abs().max().item()
    baseline = (baseline.double() - exact).abs().max().item()
    if not error <= 2 * baseline + 1e-6 * exact.abs().max().item():
        raise AssertionError(f"off by {error}")
    seconds = clock(variants)
    for name, f in variants.items():
        phase = name.rpartition(" ")[2]
        yield {
            "variant": name,
            "ms": seconds[name] * 1e3,
            "times_flashpo": seconds[name] / seconds[f"FlashPO {phase}"],
            "extra_mb": device.peak_bytes(f) / 2**20,
        }


def recurrence_records(device: Device, shape: Shape, group: Group, clock: Clock, with_peers: bool) -> Iterator[dict]:
    lineage, rows = lineage_of(group, device.name)
    N, scale = lineage.tokens, shape.features**-0.5
    q, k = torch.randn(2, N, shape.key_heads, shape.features, device=device.name)
    v = torch.randn(N, shape.heads, shape.values, device=device.name)
    each = [shape.features] if shape.per_feature else []
    decay = -torch.rand(N, shape.heads, *each, device=device.name)
    inputs = [q, F.normalize(k, dim=-1), v, decay]
    inputs += [torch.rand(N, shape.heads, device=device.name)] if shape.delta else []

    def ours(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None = None) -> Tensor:
        return tree_recurrence(q, k, v, decay, beta, lineage, scale=scale)[0]

    functions = {"FlashPO": ours, "reference": ours}
    if with_peers and peers_of(shape):
        functions[PADDED] = padded_delta_rule(rows)
    yield from measured(device, functions, inputs, clock)


def convolution_records(device: Device, features: int, group: Group, clock: Clock, with_peers: bool) -> Iterator[dict]:
    lineage, _ = lineage_of(group, device.name)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return tree_conv(x, weight, None, lineage)

    inputs = [torch.randn(lineage.tokens, features, device=device.name), torch.randn(features, 4, device=device.name)]
    yield from measured(device, {"FlashPO": ours, "reference": ours}, inputs, clock)


def peers_of(shape: Shape) -> tuple[str, ...]:
    """The peers; transformers has the delta rule with one decay per head."""
    return tuple(f"{PADDED} {phase}" for phase in PHASES) if shape.delta and not shape.per_feature else ()


def tables(device: Device, quick: bool) -> Iterator[KernelTable]:
    variants = tuple(f"{name} {phase}" for name in ("FlashPO", "reference") for phase in PHASES)
    for group in GROUPS[device.name][: 1 if quick else None]:
        tokens = "{} + {} of up to {} tokens".format(*group)
        for shape in SHAPES[device.name]:
            heads = f"{shape.key_heads}/{shape.heads} heads of {shape.features}/{shape.values}"
            title = f"tree_recurrence {shape.name} {tokens}, {heads}"
            yield KernelTable(title, variants, peers_of(shape), partial(recurrence_records, device, shape, group))
        features = 1024 if device.name == "cpu" else 8192
        measure = partial(convolution_records, device, features, group)
        yield KernelTable(f"tree_conv {tokens}, {features} features", variants, (), measure)
