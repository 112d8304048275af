"""decode_attention in a step, against torch's attention over the whole context of each row, and a read of the cache."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from flashpo import decode_attention
from flashpo.bench.timing import Clock, Device, KernelTable, dtype_name

# groups, rows per group, query heads, key heads, features, tokens per prompt, tokens per row; and as many layers as are
# needed so that no processor cache holds what a step reads
SHAPES = {
    "cpu": [(4, 8, 8, 4, 64, 1024, 32, 8), (4, 8, 8, 4, 64, 256, 128, 8), (32, 1, 8, 4, 64, 256, 128, 8)],
    "cuda": [(8, 8, 16, 8, 128, 2048, 512, 8), (32, 8, 16, 8, 128, 512, 512, 4), (64, 1, 16, 8, 128, 1024, 512, 4)],
}
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
COPY, WHOLE = "copy of as many bytes", "torch, every row's context"
VARIANTS, PEERS = (COPY, "FlashPO"), (WHOLE,)


def tables_of(groups, rows, prompt, own):
    """(rows, start, length, blocks, position), and the number of blocks; block 0 stays empty."""
    batch, prompt_blocks, own_blocks = groups * rows, -(-prompt // 64), -(-own // 64)
    shared = torch.arange(groups)[:, None] * rows + torch.tensor([0, rows])
    ranges = torch.cat((shared, torch.arange(batch)[:, None] + torch.tensor([0, 1])))
    start = torch.tensor([0] * groups + [prompt] * batch)
    length = torch.tensor([prompt] * groups + [own] * batch)
    count = torch.tensor([prompt_blocks] * groups + [own_blocks] * batch)
    blocks = 1 + (count.cumsum(0) - count)[:, None] + torch.arange(max(prompt_blocks, own_blocks))
    position = torch.full((batch,), prompt + own - 1)
    return [x.int() for x in (ranges, start, length, blocks, position)], 1 + int(count.sum())


def gather(k_cache, v_cache, tables, row):
    """The keys and values of a row (heads, tokens, features), contiguous."""
    ranges, _, length, blocks, _ = tables
    k, v = [], []
    for (begin, end), n, ids in zip(ranges.tolist(), length.tolist(), blocks.long()):
        if begin <= row < end:
            used = ids[: -(-n // 64)].to(k_cache.device)
            k.append(k_cache[used].permute(1, 0, 3, 2).flatten(1, 2)[:, :n])
            v.append(v_cache[used].transpose(0, 1).flatten(1, 2)[:, :n])
    return torch.cat(k, 1), torch.cat(v, 1)


def records(device: Device, shape: tuple[int, ...], dtype: torch.dtype, clock: Clock, with_peers: bool) -> list[dict]:
    groups, rows, query_heads, heads, features, prompt, own, layers = shape
    batch, scale = groups * rows, features**-0.5
    tables, blocks = tables_of(groups, rows, prompt, own)
    q = torch.randn(batch, query_heads, features).to(device.name, dtype)
    caches = [
        (torch.randn(blocks, heads, features, 64), torch.randn(blocks, heads, 64, features)) for _ in range(layers)
    ]
    caches = [(k.to(device.name, dtype), v.to(device.name, dtype)) for k, v in caches]
    on_device = [x.to(device.name) for x in tables]
    dense = [[torch.stack(x) for x in zip(*(gather(k, v, tables, row) for row in range(batch)))] for k, v in caches]

    def ours():
        return [decode_attention(q, k, v, *on_device, scale=scale)[0] for k, v in caches]

    def torch_attention():
        query = q[:, :, None]
        return [F.scaled_dot_product_attention(query, k, v, scale=scale, enable_gqa=True)[:, :, 0] for k, v in dense]

    k, v = (x.double().repeat_interleave(query_heads // heads, 1) for x in dense[0])
    exact = F.scaled_dot_product_attention(q.double()[:, :, None], k, v, scale=scale)[:, :, 0]
    variants = {"FlashPO": ours, WHOLE: torch_attention}
    errors = {name: (f()[0] - exact).abs().max().item() for name, f in variants.items()}
    if not errors["FlashPO"] <= 2 * errors[WHOLE] + 1e-6:
        raise AssertionError(f"decode_attention is off by {errors['FlashPO']}")
    moved = layers * (groups * prompt + batch * own) * heads * 2 * features * dtype.itemsize
    source = torch.empty(moved // 2, dtype=torch.uint8, device=device.name).zero_()
    target = torch.empty_like(source)
    variants[COPY] = lambda: target.copy_(source)
    seconds = clock({name: variants[name] for name in (VARIANTS + PEERS if with_peers else VARIANTS)})
    return [
        {
            "variant": name,
            "ms": time * 1e3,
            "times_flashpo": time / seconds["FlashPO"],
            "gb_per_s": moved / time / 1e9 if name == "FlashPO" else None,
            "max_error": errors.get(name),
        }
        for name, time in seconds.items()
    ]


def tables(device: Device, quick: bool) -> Iterator[KernelTable]:
    for shape in SHAPES[device.name][: 1 if quick else None]:
        for dtype in DTYPES[device.name]:
            groups, rows, query_heads, heads, features, prompt, own, layers = shape
            title = f"decode_attention {groups}x{rows} rows, {query_heads}/{heads} heads of {features}, "
            title += f"{prompt} shared and {own} own tokens, {layers} layers, {dtype_name(dtype)}"
            yield KernelTable(title, VARIANTS, PEERS, partial(records, device, shape, dtype))
