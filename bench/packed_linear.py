"""packed_linear over the weights of a whole model, which no cache can hold, against F.linear and a read of the
weights."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from flashpo.bench.timing import Clock, Device, KernelTable, dtype_name
from flashpo.ops.packed_linear import pack_linear, packed_linear, packs

COLUMNS, DEPTH, LAYERS = 1536, 512, 48  # 151 MB in float32
ROWS = (1, 8, 32, 128)
READ = "read of as many bytes"


def records(device: Device, dtype: torch.dtype, rows: int, clock: Clock, with_peers: bool) -> list[dict]:
    weights = [torch.randn(COLUMNS, DEPTH).to(dtype) for _ in range(LAYERS)]
    packed = [pack_linear(weight) for weight in weights]
    x = torch.randn(rows, DEPTH).to(dtype)
    exact = F.linear(x.double(), weights[0].double())
    error = (packed_linear(x, packed[0], columns=COLUMNS) - exact).abs().max().item()
    allowed = (F.linear(x, weights[0]) - exact).abs().max().item()
    if not error <= 4 * allowed:  # sums may be in another order
        raise AssertionError(f"packed_linear is off by {error}")
    moved = LAYERS * weights[0].nbytes
    source = torch.empty(moved, dtype=torch.uint8).zero_()
    variants = {
        READ: lambda: source.view(torch.int64).sum(),
        "FlashPO": lambda: [packed_linear(x, weight, columns=COLUMNS) for weight in packed],
    }
    if with_peers:
        variants["F.linear"] = lambda: [F.linear(x, weight) for weight in weights]
    seconds = clock(variants)
    return [
        {
            "variant": name,
            "ms": time * 1e3,
            "times_flashpo": time / seconds["FlashPO"],
            "gb_per_s": moved / time / 1e9,
            "gflops": 2 * rows * LAYERS * COLUMNS * DEPTH / time / 1e9 if name != READ else None,
        }
        for name, time in seconds.items()
    ]


def tables(device: Device, quick: bool) -> Iterator[KernelTable]:
    if device.name != "cpu":
        return
    for dtype in (torch.float32, torch.bfloat16):
        if not packs(torch.empty(COLUMNS, DEPTH, dtype=dtype)):
            continue
        for rows in ROWS[2:3] if quick else ROWS:
            title = f"packed_linear {LAYERS} x ({COLUMNS}, {DEPTH}), {rows} rows, {dtype_name(dtype)}"
            yield KernelTable(title, (READ, "FlashPO"), ("F.linear",), partial(records, device, dtype, rows))
