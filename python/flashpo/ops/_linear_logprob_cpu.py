"""linear_logprob on the CPU: torch's GEMM computes a tile of logits, and C++ folds or differentiates it in cache.

Tiles are (J, N), with a row per vocabulary entry, so that C++ has one token per SIMD lane. In bfloat16 the GEMM that
makes such a tile, and the GEMM dW = tile @ hidden, take half the time of their transposed forms. The GEMM for dH
prefers the other layout in 16 bits, so C++ writes 16-bit gradients in both layouts.

torch's 16-bit GEMMs round their output: the logits to the compute dtype, dH once per tile of the vocabulary before it
is added in fp32, and dW once per block of tokens. A CPU without instructions for the compute dtype multiplies the same
numbers several times faster in fp32, so on such a CPU the tiles are fp32.
"""

import functools
import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from flashpo._op import native
from flashpo.ops._check import check_range
from flashpo.ops._product import add_product
from flashpo.ops.token_stats import neutral_partial

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE_BYTES = 16 << 20  # so that two tiles and everything else that a pass needs stay below 64 MB
PRODUCT_BYTES = 8 << 20  # the size of a product in fp32 before it is added to a sum
MAX_TOKENS = 2048  # in a tile


_kept = threading.local()


def workspace(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory that this thread keeps between calls. Page faults of fresh memory would take a tenth of the pass."""
    size = math.prod(shape) * dtype.itemsize
    kept = getattr(_kept, name, None)
    if kept is None or kept.numel() < size:
        kept = torch.empty(size, dtype=torch.uint8, device="cpu")
        setattr(_kept, name, kept)
    return kept[:size].view(dtype).view(shape)


def takes(hidden: Tensor, dtype: torch.dtype) -> bool:
    return hidden.device.type == "cpu" and dtype in DTYPES


@functools.cache
def multiplied_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which this CPU should multiply matrices of `dtype`."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if dtype.itemsize == 4 or capabilities.get("architecture") != "x86_64":
        return dtype
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    return dtype if capabilities[f"avx512_{kind}"] or capabilities[f"amx_{kind}"] else torch.float32


class Tiles:
    """The tiles of a head: the vocabulary is cut into parts, the tokens that are not ignored into blocks.

    There is one tile for each pair of a part and a block; all tiles use the same buffer. `heads` is the number of heads
    that have a tile at the same time, and `buffer` names the workspace of this one.
    """

    def __init__(
        self,
        hidden,
        weight,
        target,
        bias,
        token_temperature,
        temperature,
        logit_scale,
        softcap,
        ignore_index,
        start,
        dtype,
        heads=1,
        buffer="tile",
    ):
        ignored = target == ignore_index
        self.live = (~ignored).nonzero()[:, 0] if ignored.any() else None
        self.dtype = multiplied_in(dtype)
        self.rounded_to = dtype
        self.hidden = self.pick(hidden).to(dtype).to(self.dtype)
        self.target = self.pick(target).contiguous()
        self.inv_temperature = None if token_temperature is None else self.pick(token_temperature).float().reciprocal()
        self.weight, self.start = weight, start
        self.bias = None if bias is None else bias.float().contiguous()
        self.scalars = 1 / temperature, logit_scale, softcap or 0.0
        self.tokens = max(min(len(self.hidden), MAX_TOKENS), 1)
        # The weight rows of a part, converted or summed up in fp32, may take the memory of at most two tiles, too.
        tile_bytes = TILE_BYTES // heads
        widest = min(tile_bytes // (self.dtype.itemsize * self.tokens), 2 * tile_bytes // (4 * weight.shape[1]))
        self.width = min(len(weight), max(widest, 256))
        self.buffer = workspace(buffer, (self.width * self.tokens,), self.dtype)
        cast = {weight.dtype, dtype} != {self.dtype}
        self.weight_buffer = weight.new_empty((self.width, weight.shape[1]), dtype=self.dtype) if cast else None

    def pick(self, x: Tensor) -> Tensor:
        """The rows of the live tokens."""
        return x if self.live is None else x[self.live]

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield each part of the vocabulary and its rows of the weight in the dtype of the GEMM."""
        for begin in range(0, len(self.weight), self.width):
            part = slice(begin, min(begin + self.width, len(self.weight)))
            rows = self.weight[part]
            if self.weight_buffer is not None:
                rows = self.weight_buffer[: len(rows)].copy_(rows.to(self.rounded_to))
            yield part, rows

    def blocks(self) -> list[slice]:
        n = len(self.hidden)
        return [slice(begin, min(begin + self.tokens, n)) for begin in range(0, n, self.tokens)]

    def buffer_of_products(self) -> Tensor:
        columns = self.weight.shape[1]
        rows = min(max(self.tokens, self.width), max(PRODUCT_BYTES // (4 * columns), 1))
        return workspace("product", (rows * columns,), torch.float32)

    def logits(self, rows: Tensor, block: slice) -> Tensor:
        tile = self.buffer[: len(rows) * (block.stop - block.start)].view(len(rows), -1)
        return torch.mm(rows, self.hidden[block].t(), out=tile)

    def bias_of(self, part: slice) -> Tensor | None:
        return None if self.bias is None else self.bias[part]

    def describe(self, part: slice, block: slice) -> tuple:
        """The arguments that C++ needs for a tile besides its values."""
        inv_temperature = None if self.inv_temperature is None else self.inv_temperature[block]
        return self.target[block], self.start + part.start, self.bias_of(part), inv_temperature, *self.scalars

    def rows_of_blocks(self, *of_tokens: Tensor | None) -> list[tuple[slice, list[Tensor | None]]]:
        """Each block with its dense part of the tensors (N,) or (R, N)."""
        picked = [None if x is None else self.pick(x.t()) for x in of_tokens]
        return [(block, [None if x is None else x[block].t().contiguous() for x in picked]) for block in self.blocks()]

    def spread(self, column: Tensor, block: slice, whole: Tensor) -> None:
        """Write the results of a block into the (R, N) results of all tokens."""
        whole[:, block if self.live is None else self.live[block]] = column


class Gradients:
    """The gradients of one head, summed up over tiles that hold gradients of its logits."""

    def __init__(self, tiles: Tiles, want_hidden: bool, want_weight: bool, want_bias: bool):
        self.tiles, self.wanted = tiles, (want_hidden, want_weight, want_bias)
        weight, blocks = tiles.weight, tiles.blocks()
        # The row length is 64 bytes more than the tile's width, so that the cache lines which C++ writes at the same
        # time fall into different cache sets. The padding is set to 0, because oneDNN multiplies what it reads behind
        # a row by 0, and NaN would survive that.
        two_layouts = want_hidden and tiles.dtype.itemsize == 2
        self.transposed = (
            workspace("transposed", (tiles.tokens, tiles.width + 32), tiles.dtype) if two_layouts else None
        )
        if self.transposed is not None:
            self.transposed[:, tiles.width :] = 0
        none = weight.new_empty(0)
        self.d_hidden = weight.new_zeros(tiles.hidden.shape, dtype=torch.float32) if want_hidden else none
        self.d_weight = (torch.empty_like if blocks else torch.zeros_like)(weight) if want_weight else none.clone()
        self.d_bias = weight.new_zeros(len(weight), dtype=torch.float32) if want_bias else none.clone()
        # Products in fp32, and sums over several blocks of tokens, are kept in fp32 and rounded once at the end.
        in_fp32 = want_weight and weight.dtype != torch.float32 and (tiles.dtype == torch.float32 or len(blocks) > 1)
        self.d_rows = weight.new_empty(tiles.width, weight.shape[1], dtype=torch.float32) if in_fp32 else None
        self.buffer = tiles.buffer_of_products() if tiles.dtype == torch.float32 else None

    def transposed_of(self, tile: Tensor) -> Tensor | None:
        """Where C++ writes the tile a second time, in the other layout; None if it is not wanted."""
        return None if self.transposed is None else self.transposed[: tile.shape[1], : len(tile)]

    def add(self, tile: Tensor, part: slice, rows: Tensor, block: slice) -> None:
        want_hidden, want_weight, want_bias = self.wanted
        flipped = self.transposed_of(tile)
        if want_hidden:
            add(self.d_hidden[block], tile.t() if flipped is None else flipped, rows, part.start == 0, self.buffer)
        if want_weight:
            d_part = self.d_weight[part] if self.d_rows is None else self.d_rows[: len(rows)]
            add(d_part, tile, self.tiles.hidden[block], block.start == 0, self.buffer)
            if self.d_rows is not None and block.stop == len(self.tiles.hidden):
                self.d_weight[part] = d_part
        if want_bias:
            self.d_bias[part] += tile.sum(1, dtype=torch.float32)

    def results(self, hidden: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of all tokens, in the dtypes of the arguments."""
        want_hidden, _, want_bias = self.wanted
        d_hidden = self.d_hidden.to(hidden.dtype)
        if want_hidden and self.tiles.live is not None:
            d_hidden = torch.zeros_like(hidden).index_copy_(0, self.tiles.live, d_hidden)
        return d_hidden, self.d_weight, self.d_bias.to(bias.dtype) if bias is not None and want_bias else self.d_bias


def partial(hidden, weight, target, *rest) -> Tensor:
    *head, vocab, side, dtype = rest
    *_, ignore_index, _ = head
    check_range("target", target, vocab, ignore_index)
    tiles = Tiles(hidden, weight, target, *(*head, dtype))
    threads, state_rows = torch.get_num_threads(), 12 if side else 6
    states = [
        (block, torch.empty(state_rows, block.stop - block.start, dtype=torch.float32, device="cpu"))
        for block in tiles.blocks()
    ]
    for part, rows in tiles.parts():
        for block, state in states:
            tile = tiles.logits(rows, block)
            native.linear_logprob_fold(tile, *tiles.describe(part, block), state, part.start == 0, threads)
    whole = neutral_partial(side, len(target), tiles.buffer)
    for block, state in states:
        column = state.new_empty(len(whole), state.shape[1])
        native.linear_logprob_finish(state, *tiles.describe(slice(0, 0), block)[2:], column)
        tiles.spread(column, block, whole)
    return whole


def backward(hidden, weight, target, bias, *rest) -> tuple[Tensor, Tensor, Tensor]:
    *head, results, d_logprob, d_entropy, want_hidden, want_weight, want_bias = rest
    tiles = Tiles(hidden, weight, target, bias, *head)
    of_blocks = tiles.rows_of_blocks(results, d_logprob, d_entropy)
    gradients = Gradients(tiles, want_hidden, want_weight, want_bias)
    for part, rows in tiles.parts():
        for block, of_block in of_blocks:
            tile = tiles.logits(rows, block)
            flipped = gradients.transposed_of(tile)
            native.linear_logprob_grad(tile, *tiles.describe(part, block), *of_block, flipped, torch.get_num_threads())
            gradients.add(tile, part, rows, block)
    return gradients.results(hidden, bias)


def add(total: Tensor, a: Tensor, b: Tensor, first: bool, buffer: Tensor | None) -> None:
    """total += a @ b, or total = a @ b if `first`. A product in 16 bits is rounded before it is added."""
    if a.dtype == torch.float32:
        add_product(total, a, b, first=first, buffer=buffer)
    elif total.dtype == a.dtype:  # this is the only product
        torch.mm(a, b, out=total)
    else:
        product = torch.mm(a, b)
        total.copy_(product) if first else total.add_(product)
