"""tree_attention on groups of completions against torch's attention, on padded rows and under a dense mask.

"flash, equal work" is the rate to reach: torch's FlashAttention on plain causal rows that together have as many pairs
of a query and a key as the tree.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from flashpo import tree_attention
from flashpo.bench.timing import Clock, Device, KernelTable


class Shape(NamedTuple):
    prompts: int
    prompt: int  # tokens; 0 means that nothing is shared
    completions: int  # per prompt
    longest: int  # the longest of ragged completions
    heads: int
    kv_heads: int
    dim: int


SHAPES = {
    "cpu": [Shape(2, 256, 8, 128, 8, 4, 64), Shape(2, 1024, 8, 128, 8, 4, 64), Shape(16, 0, 1, 512, 8, 4, 64)],
    "cuda": [
        Shape(4, 2048, 8, 512, 16, 8, 128),
        Shape(2, 8192, 16, 1024, 32, 8, 128),
        Shape(32, 0, 1, 2048, 16, 8, 128),
    ],
}
EQUAL, PADDED, DENSE, FLEX = "flash, equal work", "SDPA, padded rows", "SDPA, dense mask", "flex_attention"
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}


class Groups(NamedTuple):
    end: Tensor  # (N,)
    position: Tensor  # (N,)
    rows: Tensor  # (B, T): flat index of every token, 0 on padding
    real: Tensor  # (B, T)


def groups(shape: Shape, device: str) -> Groups:
    """The tokens in flat order: a prompt, then its completions, then the next prompt, and so on."""
    generator = torch.Generator().manual_seed(0)
    end: list[int] = []
    position: list[int] = []
    rows = []
    for _ in range(shape.prompts):
        lengths = torch.randint(
            shape.longest // 8, shape.longest + 1, (shape.completions,), generator=generator
        ).tolist()
        begin = len(end)
        prompt = list(range(begin, begin + shape.prompt))
        end += [begin + shape.prompt + sum(lengths)] * shape.prompt
        position += range(shape.prompt)
        for length in lengths:
            rows.append([*prompt, *range(len(end), len(end) + length)])
            end += [len(end) + length] * length
            position += range(shape.prompt, shape.prompt + length)
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    real = torch.arange(padded.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    tree = (torch.tensor(x, dtype=torch.int32) for x in (end, position))
    return Groups(*(x.to(device) for x in (*tree, padded, real)))


def systems(tree: Groups, with_peers: bool) -> dict:
    """name -> (attention, whether it takes padded rows). attention(q, k, v) -> out, of (N, heads, D) or (B, heads, T,
    D)."""
    found = {
        "FlashPO": (lambda q, k, v: tree_attention(q, k, v, tree.end, tree.position), False),
        PADDED: (lambda *x: F.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True), True),
    }
    if not with_peers:
        return found
    i = torch.arange(len(tree.end), device=tree.end.device)[:, None]
    mask = (i.t() <= i) & (i < tree.end)

    def dense(q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    found[DENSE] = dense, False
    if tree.end.is_cuda:  # it has no backward on CPUs
        N = len(tree.end)
        blocks = create_block_mask(lambda b, h, q, k: (k <= q) & (q < tree.end[k]), None, None, N, N, device="cuda")
        compiled = torch.compile(flex_attention)

        def flex(q, k, v):
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            return compiled(q, k, v, block_mask=blocks, enable_gqa=True)[0].transpose(0, 1)

        found[FLEX] = flex, False
    return found


def equal_work(shape: Shape, pairs: int, device: str, dtype: torch.dtype) -> tuple[dict, int]:
    """Forward and step on plain causal rows as long as the tree is deep, and the number of their pairs."""
    length = shape.prompt + shape.longest
    of_row = length * (length + 1) // 2
    rows = max(round(pairs / of_row), 1)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    inputs = [torch.randn(rows, h, length, shape.dim, device=device).to(dtype).requires_grad_() for h in heads]
    d_out = torch.randn_like(inputs[0])

    def attention():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)

    def step():
        torch.autograd.grad(attention(), inputs, d_out)

    return {f"{EQUAL} forward": torch.no_grad()(attention), f"{EQUAL} step": step}, rows * of_row


def records(device: Device, shape: Shape, dtype: torch.dtype, clock: Clock, with_peers: bool) -> Iterator[dict]:
    tree = groups(shape, device.name)
    N, heads = len(tree.end), (shape.heads, shape.kv_heads, shape.kv_heads)
    flat = [torch.randn(N, h, shape.dim, device=device.name).to(dtype) for h in heads]
    padded = [x[tree.rows].transpose(1, 2).contiguous() for x in flat]
    upstream = torch.randn(N, shape.heads, shape.dim, device=device.name).to(dtype)
    share = upstream[tree.rows].transpose(1, 2).contiguous()
    variants, errors = {}, {}
    exact = None
    for name, (attention, takes_rows) in systems(tree, with_peers).items():
        inputs = [x.requires_grad_() for x in (padded if takes_rows else flat)]
        d_out = share if takes_rows else upstream

        def forward(attention=attention, inputs=inputs):
            with torch.no_grad():
                return attention(*inputs)

        def step(attention=attention, inputs=inputs, d_out=d_out):
            torch.autograd.grad(attention(*inputs), inputs, d_out)

        if exact is None:  # in float64, for the first rows' queries of the first key head
            wide = (x[:2, : x.shape[1] // shape.kv_heads].double() for x in padded)
            exact = F.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True).transpose(1, 2)[
                tree.real[:2]
            ]
        out = forward().transpose(1, 2)[:2] if takes_rows else forward()[tree.rows[:2]]
        out = out[tree.real[:2]][:, : exact.shape[1]]
        errors[name] = (out.double() - exact).abs().max().item()
        variants[f"{name} forward"], variants[f"{name} step"] = forward, step
    if errors["FlashPO"] > 2 * errors[PADDED] + 1e-6:
        raise AssertionError(f"tree_attention is off by {errors['FlashPO']}")

    pairs = (tree.position + 1).sum().item()  # pairs of a query and a key that it sees
    plain, plain_pairs = equal_work(shape, pairs, device.name, dtype)
    variants |= plain
    size = 1024 if device.name == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device.name).to(dtype) for _ in range(2))
    c = torch.empty_like(a)
    seconds = clock(variants | {"GEMM": lambda: torch.mm(a, b, out=c)})
    gemm = 2 * size**3 / seconds["GEMM"]
    yield {"variant": "GEMM", "ms": seconds["GEMM"] * 1e3, "gflop_per_s": gemm / 1e9}
    for name, f in variants.items():
        system, _, phase = name.rpartition(" ")
        own = plain_pairs if system == EQUAL else pairs  # the pairs that a tree needs, whatever else a variant computes
        flops = own * shape.heads * shape.dim * (4 if phase == "forward" else 14)
        yield {
            "variant": name,
            "ms": seconds[name] * 1e3,
            "times_flashpo": seconds[name] / seconds[f"FlashPO {phase}"],
            "gflop_per_s": flops / seconds[name] / 1e9,
            "share_of_gemm": flops / seconds[name] / gemm,
            "share_of_flash": own / seconds[name] / (plain_pairs / seconds[f"{EQUAL} {phase}"]),
            "extra_mb": device.peak_bytes(f) / 2**20,
            "error": errors.get(system),
        }


def tables(device: Device, quick: bool) -> Iterator[KernelTable]:
    variants = ("GEMM", *(f"{name} {phase}" for name in ("FlashPO", PADDED, EQUAL) for phase in ("forward", "step")))
    others = (DENSE, FLEX) if device.cuda else (DENSE,)
    peers = tuple(f"{name} {phase}" for name in others for phase in ("forward", "step"))
    for shape in SHAPES[device.name][: 1 if quick else None]:
        for dtype in DTYPES[device.name]:
            tokens = "{} x ({} + {} of up to {})".format(*shape[:4])
            title = (
                f"tree_attention {tokens} tokens, {shape.heads}/{shape.kv_heads} heads of {shape.dim} {str(dtype)[6:]}"
            )
            yield KernelTable(title, variants, peers, partial(records, device, shape, dtype))
