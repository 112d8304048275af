"""The keys and values of every token that is still needed, in blocks of 64 tokens out of one pool.

A block id means the same place in every layer, so one allocator serves them all. Keys are stored transposed: a block
of one head is a (head_dim, 64) tile, which is how decoding reads it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flashpo._huge_pages import HugePages
from flashpo._memory import available_bytes
from flashpo.ops import kv_append
from flashpo.rollout.support import Layer

BLOCK = 64  # tokens


class Run(NamedTuple):
    """Consecutive tokens in the cache: the first `length` places of `blocks`."""

    blocks: Sequence[int]
    length: int

    def slots(self, begin: int, end: int) -> list[int]:
        """Where tokens [begin, end) of the run are: block * 64 + offset."""
        return [self.blocks[i // BLOCK] * BLOCK + i % BLOCK for i in range(begin, end)]


def block_bytes(layers: Sequence[Layer], dtype: torch.dtype) -> int:
    return sum(x.kv_heads * (x.head_dim + x.value_dim) for x in layers) * BLOCK * dtype.itemsize


class KVCache:
    """Keys (blocks, Hkv, D, 64) and values (blocks, Hkv, 64, Dv) of every layer. Block 0 belongs to nobody."""

    def __init__(self, layers: Sequence[Layer], blocks: int, dtype: torch.dtype, device: torch.device):
        self.blocks, self.dtype, self.device = blocks, dtype, device
        self.layers = {layer.index: layer for layer in layers}
        self.keys, self.values, memory = {}, {}, HugePages()
        for x in layers:
            self.keys[x.index] = memory.empty((blocks, x.kv_heads, x.head_dim, BLOCK), dtype, device)
            self.values[x.index] = memory.empty((blocks, x.kv_heads, BLOCK, x.value_dim), dtype, device)
        self.bytes = blocks * block_bytes(layers, dtype)

    def append(self, layer: int, key: Tensor, value: Tensor, slot: Tensor) -> None:
        """key (N, Hkv, D), value (N, Hkv, Dv) go to the places `slot` (N,); negative ones are skipped."""
        kv_append(key, value, self.keys[layer], self.values[layer], slot)

    def gather(self, layer: int, slot: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (N, Hkv, D) and values (N, Hkv, Dv) from the places `slot` (N,)."""
        block, offset = slot // BLOCK, slot % BLOCK
        return self.keys[layer][block, :, :, offset], self.values[layer][block, :, offset]

    def read(self, layer: int, runs: Sequence[Run]) -> tuple[Tensor, Tensor]:
        """Keys (1, Hkv, T, D) and values (1, Hkv, T, Dv) of the runs' T tokens."""
        keys, values = [], []
        for run in runs:
            blocks = torch.tensor(run.blocks[: -(-run.length // BLOCK)], device=self.device)
            keys.append(self.keys[layer][blocks].permute(1, 0, 3, 2).flatten(1, 2)[:, : run.length])
            values.append(self.values[layer][blocks].transpose(0, 1).flatten(1, 2)[:, : run.length])
        if len(runs) == 1:
            return keys[0][None], values[0][None]
        return torch.cat(keys, 1)[None], torch.cat(values, 1)[None]


def allocate(layers: Sequence[Layer], blocks: int, at_least: int, dtype: torch.dtype, device: torch.device) -> KVCache:
    """A cache of `blocks` blocks, or of fewer if the device has no memory for them."""
    while True:
        try:
            return KVCache(layers, blocks, dtype, device)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or blocks == at_least:
                raise
            blocks = max(blocks // 2, at_least)


def free_bytes(device: torch.device) -> int:
    """Memory of the device that can be had now: on a GPU what torch holds in reserve included."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    return available_bytes()


def out_of_memory(error: BaseException) -> bool:
    """CUDA's, Python's, and that of torch's CPU allocator, which is a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
