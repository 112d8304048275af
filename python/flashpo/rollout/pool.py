"""The memory of an engine: the size of its KV cache, how many completions run at once, and what a session keeps."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from flashpo._causal_lm import CausalLM
from flashpo.rollout.cache import BLOCK, allocate, block_bytes, free_bytes
from flashpo.rollout.call import Call
from flashpo.rollout.prefix_tree import blocks_for
from flashpo.rollout.runner import Runner
from flashpo.rollout.scheduler import Scheduler
from flashpo.rollout.support import Support

MEMORY_SHARE = 0.5  # the share of free memory that the cache may take where `kv_memory` is not given
SESSION_TURNS = 4  # a session's cache holds this many times what its first call needs, where memory allows


class Pool:
    """The KV cache of a model and the runner that computes on it. They stay for the next call until `drop`.

    The arguments are those of `RolloutEngine`.
    """

    def __init__(
        self, model: nn.Module, kv_memory: int | None, max_sequences: int | None, expected_tokens: float | None
    ):
        self.model: Any = model
        self.kv_memory, self.max_sequences, self.expected_tokens = kv_memory, max_sequences, expected_tokens
        self.runner: Runner | None = None
        self.scheduler: Scheduler | None = None  # of the open session
        self._session: contextlib.ExitStack | None = None

    @property
    def in_session(self) -> bool:
        return self._session is not None

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """The calls within it share one scheduler, which keeps what they have cached."""
        try:
            with contextlib.ExitStack() as self._session:
                yield
        finally:
            self._session = self.scheduler = None

    def drop(self) -> None:
        """Frees the cache and the CUDA graphs that read it."""
        self.runner = self.scheduler = None

    def admit(self, call: Call, support: Support, dtype: torch.dtype) -> tuple[Runner, Scheduler]:
        """A runner and a scheduler for the call: those of the session if its cache is large enough, else a new
        scheduler over a cache that is as large as the call can use and memory allows.

        Raises:
            MemoryError: There is no room for the call's largest prompt with its completion.
        """
        sizes = [
            (blocks_for(len(prompt)), blocks_for(group[0].draw.limit), len(group))
            for prompt, group in zip(call.prompts, call.groups)
        ]
        needed = 1 + max(prompt + own for prompt, own, _ in sizes)
        wanted = 1 + sum(prompt + own * n for prompt, own, n in sizes)
        rows = sum(n for _, _, n in sizes)
        rows = min(rows, self.max_sequences or rows)
        if self.runner is not None and self.scheduler is not None and self.runner.cache.blocks >= needed:
            self.scheduler.max_rows = rows
            return self.runner, self.scheduler
        runner = self._runner_of(needed, wanted * (SESSION_TURNS if self.in_session else 1), support, dtype)
        scheduler = Scheduler(
            runner.cache.blocks, rows, whole_nodes_only=support.hybrid, expected_tokens=self.expected_tokens
        )
        if self._session is not None:
            self.scheduler = scheduler
            self._session.enter_context(scheduler.keeping())
        return runner, scheduler

    def _runner_of(self, needed: int, wanted: int, support: Support, dtype: torch.dtype) -> Runner:
        """The last call's runner if its cache is large enough, else a new one with as many of the `wanted` blocks as
        memory allows, at least `needed`."""
        base: Any = CausalLM.of(self.model)
        have = 0
        if self.runner is not None and self.runner.cache.dtype == dtype:
            have = self.runner.cache.blocks
        per_block = block_bytes(support.layers, dtype)
        device = next(self.model.parameters()).device
        memory = self.kv_memory or int((free_bytes(device) + have * per_block) * MEMORY_SHARE)
        blocks = min(wanted, memory // per_block)
        if blocks < needed:
            limit = "kv_memory allows" if self.kv_memory else "half of the free memory is"
            raise MemoryError(
                f"a prompt with its max_new_tokens needs {needed * per_block} bytes of keys and values "
                f"({needed} blocks of {BLOCK} tokens), {limit} {memory} bytes"
            )
        if self.runner is None or have < blocks:
            self.runner = None  # free its memory before the new cache is allocated
            self.runner = Runner(base, allocate(support.layers, blocks, needed, dtype, device))
        return self.runner
