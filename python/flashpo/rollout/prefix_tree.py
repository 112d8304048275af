"""A pool of cache blocks and the tree of token sequences that lie in it.

A segment is a run of tokens at consecutive positions that begins in a block of its own: token i of it lies in slot
`blocks[i // BLOCK] * BLOCK + i % BLOCK`. A sequence's cache is a chain of segments, the nodes of the tree from the top
down. Since every segment begins in a new block, whatever its position, a segment may follow another that ends within a
block, and nothing is ever copied.
"""

from collections.abc import Hashable, Sequence
from typing import Any

BLOCK = 64  # tokens


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK)


class BlockAllocator:
    """Blocks 1 ... blocks - 1; block 0 is the waste block, which parked rows write to, and is never given out."""

    def __init__(self, blocks: int): ...

    capacity: int  # blocks that can be owned
    free: int  # blocks that nobody owns
    peak: int  # most blocks owned at once

    def take(self, count: int) -> list[int]:
        """Raises MemoryError when fewer than `count` are free."""
        raise NotImplementedError

    def release(self, blocks: Sequence[int]) -> None:
        """Raises ValueError for a block that nobody owns."""
        raise NotImplementedError


class Segment:
    """Tokens at positions start, start + 1, ... in blocks of their own; `blocks` is empty while it is not cached."""

    parent: "Node"  # what it continues
    tokens: Sequence[int]  # its own
    blocks: list[int]

    @property
    def start(self) -> int:
        """Position of its first token."""
        raise NotImplementedError

    @property
    def ancestors(self) -> "list[Node]":
        """The nodes before it, from the top down: together they hold the tokens of positions 0 to start - 1."""
        raise NotImplementedError


class Node(Segment):
    """A segment that several rows read.

    running, waiting: rows at this node or below it that run now, and that will.
    ends: some prompt ends here, so that the logits after the last token are wanted when the node is prefilled, and kept
        with it. An engine that drops them earlier clears `ends`; a prompt that ends here again is then computed anew
        from the last block boundary.
    payload: the engine's own (these logits; the states of linear-attention layers); None again once the node has lost
        its blocks.
    """

    running: int
    waiting: int
    ends: bool
    payload: Any


class PrefixTree:
    """Nodes by tokens, one tree for each `space` (an adapter: its keys and values fit no other).

    `insert` finds or makes the nodes of a prompt. A node all of whose tokens the prompt begins with is used as it is.
    Otherwise it is split at the last block boundary before they part, if at least one block is equal: what lies between
    the boundary and that point, fewer than BLOCK tokens, is computed again. With `whole_nodes_only` a node that is
    cached is never split: the states of hybrid models exist only at its end.

    Nodes that nobody runs or waits for are freed at once, or, while `keep` is set, stay until their blocks are needed:
    least recently used first, children before parents. Nodes that rows only wait for are given up after those, and are
    prefilled again when their turn comes.
    """

    def __init__(self, allocator: BlockAllocator, *, whole_nodes_only: bool = False): ...

    keep: bool

    def insert(self, tokens: Sequence[int], space: Hashable, max_blocks: int) -> Node:
        """The node that `tokens` end at, with a path of at most `max_blocks` blocks."""
        raise NotImplementedError
