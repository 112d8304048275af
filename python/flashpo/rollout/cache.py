"""The KV cache: keys and values in blocks of 64 tokens from one pool.

A block id means the same block in every layer, so that one allocator serves all layers. Keys are stored transposed: one
head of a block is a (head_dim, 64) tile, because decode attention reads them in this layout.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flashpo._huge_pages import HugePages
from flashpo._memory import available_bytes, out_of_memory
from flashpo.ops import kv_append
from flashpo.rollout.support import Layer

BLOCK = 64  # tokens


class Run(NamedTuple):
    """Consecutive tokens in the cache: they fill the first `length` slots of `blocks`."""

    blocks: Sequence[int]
    length: int

    def slots(self, begin: int, end: int) -> list[int]:
        """The slots of tokens [begin, end) of the run: block * 64 + offset."""
        return [self.blocks[i // BLOCK] * BLOCK + i % BLOCK for i in range(begin, end)]


def block_bytes(layers: Sequence[Layer], dtype: torch.dtype) -> int:
    return sum(x.kv_heads * (x.head_dim + x.value_dim) for x in layers) * BLOCK * dtype.itemsize


class KVCache:
    """Keys (blocks, Hkv, D, 64) and values (blocks, Hkv, 64, Dv) of every layer. Block 0 is never given out."""

    def __init__(self, layers: Sequence[Layer], blocks: int, dtype: torch.dtype, device: torch.device):
        self.blocks, self.dtype, self.device = blocks, dtype, device
        self.layers = {layer.index: layer for layer in layers}
        self.keys, self.values, memory = {}, {}, HugePages()
        for x in layers:
            self.keys[x.index] = memory.empty((blocks, x.kv_heads, x.head_dim, BLOCK), dtype, device)
            self.values[x.index] = memory.empty((blocks, x.kv_heads, BLOCK, x.value_dim), dtype, device)
        self.bytes = blocks * block_bytes(layers, dtype)

    def append(self, layer: int, key: Tensor, value: Tensor, slot: Tensor) -> None:
        """Writes key (N, Hkv, D) and value (N, Hkv, Dv) to the slots `slot` (N,). Negative slots are skipped."""
        kv_append(key, value, self.keys[layer], self.values[layer], slot)

    def gather(self, layer: int, slot: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (N, Hkv, D) and values (N, Hkv, Dv) from the slots `slot` (N,)."""
        block, offset = slot // BLOCK, slot % BLOCK
        return self.keys[layer][block, :, :, offset], self.values[layer][block, :, offset]

    def read(self, layer: int, runs: Sequence[Run]) -> tuple[Tensor, Tensor]:
        """Keys (1, Hkv, T, D) and values (1, Hkv, T, Dv) of the T tokens of all runs, in their order."""
        keys, values = [], []
        for run in runs:
            blocks = torch.tensor(run.blocks[: -(-run.length // BLOCK)], device=self.device)
            keys.append(self.keys[layer][blocks].permute(1, 0, 3, 2).flatten(1, 2)[:, : run.length])
            values.append(self.values[layer][blocks].transpose(0, 1).flatten(1, 2)[:, : run.length])
        if len(runs) == 1:
            return keys[0][None], values[0][None]
        return torch.cat(keys, 1)[None], torch.cat(values, 1)[None]


def allocate(layers: Sequence[Layer], blocks: int, at_least: int, dtype: torch.dtype, device: torch.device) -> KVCache:
    """A cache of `blocks` blocks, or of fewer, but not below `at_least`, if the device has no memory for them."""
    while True:
        try:
            return KVCache(layers, blocks, dtype, device)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or blocks == at_least:
                raise
            blocks = max(blocks // 2, at_least)


def free_bytes(device: torch.device) -> int:
    """The bytes of device memory that can be allocated now. On a GPU they include what torch holds in reserve."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    return available_bytes()
