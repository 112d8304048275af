"""A pool of cache blocks, and the prefix tree of the token sequences that are stored in it.

A segment has tokens at consecutive positions and begins in a new block: its token i is in slot
`blocks[i // BLOCK] * BLOCK + i % BLOCK`. The cache of a sequence is a chain of segments from the top of the tree down.
A segment may follow one that ends in the middle of a block, because it begins in a new block in any case. Therefore
nothing has to be copied.
"""

import itertools
from collections.abc import Collection, Hashable, Sequence
from typing import Any

BLOCK = 64  # tokens


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK)


class BlockAllocator:
    """Gives out the blocks 1 to blocks - 1. Block 0 is the waste block: no segment has it, and it pads block tables."""

    def __init__(self, blocks: int):
        if blocks < 2:
            raise ValueError(f"blocks must be at least 2 (block 0 is never given out), not {blocks}")
        self.capacity = blocks - 1  # blocks that can be owned
        self.clear()

    def clear(self) -> None:
        self._free = list(range(self.capacity, 0, -1))
        self._owned: set[int] = set()
        self.peak = 0  # the largest number of blocks owned at once; a caller that reports it may reset it

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return len(self._owned)

    def take(self, count: int) -> list[int]:
        """Gives out `count` blocks.

        Raises:
            MemoryError: Fewer are free.
        """
        if count > self.free:
            raise MemoryError(f"{count} blocks are wanted, {self.free} are free")
        blocks = [self._free.pop() for _ in range(count)]
        self._owned.update(blocks)
        self.peak = max(self.peak, self.used)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Takes blocks back.

        Raises:
            ValueError: A block is free already.
        """
        for block in blocks:
            if block not in self._owned:
                raise ValueError(f"block {block} is released, but nobody owns it")
            self._owned.remove(block)
            self._free.append(block)


class Segment:
    """Tokens at the positions start, start + 1, ..., in blocks that no other segment uses.

    `blocks` is empty while the segment is not cached.
    """

    parent: "Node"  # the node that this segment continues; at the top it is the tree's root, which is empty
    start: int  # position of its first token
    tokens: Sequence[int]  # without those of its ancestors
    blocks: list[int]

    def __init__(self, parent: "Node | None", tokens: Sequence[int]):
        self.parent = parent  # type: ignore[assignment]  # None for the root, which only code of this file sees
        self.start = parent.end if parent else 0
        self.tokens = tokens
        self.blocks = []

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def ancestors(self) -> "list[Node]":
        """The nodes above it, from the top down. They have the tokens at positions 0 to start - 1."""
        nodes = []
        node = self.parent
        while node.parent:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class Node(Segment):
    """A segment of a prompt or of a kept completion, which several rows may read.

    running, waiting: How many rows at this node or below it run, and how many wait.
    ends: Whether a prompt ends here. Then the logits after the last token are computed and kept when the node is
        prefilled. An engine that drops them while no row waits must clear `ends`; if another prompt ends here later,
        its last tokens are then computed again.
    payload: Whatever the engine keeps with the node (these logits, recurrent states). None once the node has lost its
        blocks.
    """

    tokens: tuple[int, ...]

    def __init__(self, parent: "Node | None", tokens: tuple[int, ...], order: int):
        super().__init__(parent, tokens)
        self.order = order  # siblings are sorted by it
        self.children: dict[tuple[int, ...], list[Node]] = {}  # by their first BLOCK tokens
        self.running = 0
        self.waiting = 0
        self.last_used = 0  # when a row last stopped at this node or below it; never earlier than for a child
        self.ends = False
        self.payload: Any = None

    @property
    def path(self) -> "list[Node]":
        """The ancestors of the node and the node itself, from the top down."""
        return [*self.ancestors, self] if self.parent else []


class PrefixTree:
    """Prefix trees of nodes, one tree for each `space`.

    A space stands for a set of active adapters: other adapters compute other keys and values for the same tokens.

    A prompt uses each node whose tokens it has in full. Where a prompt differs from a node in the middle, the node is
    split at the last block boundary before that place, if there is one. The tokens between the boundary and the place,
    fewer than BLOCK, are computed again. With `whole_nodes_only` a cached node is never split, because the recurrent
    state of a hybrid model is kept only for the end of a node.

    A node for which no row runs or waits is freed at once; while `keep` is set, it is freed when its blocks are needed.
    Nodes whose rows all wait may be freed too, but only after those without waiting rows. They are prefilled again
    when a row starts.
    """

    def __init__(self, allocator: BlockAllocator, *, whole_nodes_only: bool = False):
        self.allocator = allocator
        self.whole_nodes_only = whole_nodes_only
        self.keep = False
        self.clear()

    def clear(self) -> None:
        self.allocator.clear()
        self._order = itertools.count()
        self._roots: dict[Hashable, Node] = {}
        self._clock = itertools.count()
        self._idle: dict[Node, None] = {}  # cached nodes without a running row at the node or below it

    def insert(self, tokens: tuple[int, ...], space: Hashable, rows: int, max_blocks: int) -> Node:
        """Inserts a prompt for which `rows` rows wait, and returns the node at which it ends.

        The nodes from the top to this one take at most `max_blocks` blocks.
        """
        root = node = self._roots.setdefault(space, Node(None, (), 0))
        rest = tokens
        while match := self._longest_match(node, rest):
            node, shared = match
            if shared < len(node.tokens):
                node = self._split(node, shared)
            rest = rest[shared:]
        if sum(blocks_for(len(x.tokens)) for x in node.path) + blocks_for(len(rest)) > max_blocks:
            node, rest = root, tokens  # the path has too many partly filled blocks: put the whole prompt into one node
        if rest:
            node = self._attach(node, rest)
        node.ends = True
        for x in node.path:
            x.waiting += rows
        return node

    def start(self, leaf: Node) -> list[Node]:
        """Records that one of the rows waiting at `leaf` runs now. Returns the nodes that have just got blocks and so
        have to be prefilled."""
        missing = []
        for node in leaf.path:
            node.waiting -= 1
            node.running += 1
            self._idle.pop(node, None)
            if not node.blocks:
                node.blocks = self.allocator.take(blocks_for(len(node.tokens)))
                missing.append(node)
        return missing

    def stop(self, leaf: Node, *, waits: bool) -> None:
        """Records that one of the rows running at `leaf` has stopped: it has ended, or it `waits` to run again."""
        now = next(self._clock)
        for node in leaf.path:
            node.running -= 1
            node.waiting += waits
            node.last_used = now
            if node.running:
                continue
            if node.waiting or self.keep:
                self._idle[node] = None
            else:
                self._free(node)

    def adopt(self, parent: Node, tokens: tuple[int, ...], blocks: list[int]) -> Node:
        """Adds a node whose tokens are cached already, in `blocks`, below a node with running rows."""
        node = self._attach(parent, tokens)
        node.blocks = blocks
        node.last_used = next(self._clock)
        self._idle[node] = None
        return node

    def make_room(self, blocks: int, spare: Collection[Node] = ()) -> bool:
        """Frees idle nodes, except for `spare`, until `blocks` blocks are free, and returns whether it could.

        If freeing all of them would not be enough, none is freed.
        """
        victims = [node for node in self._idle if node not in spare] if blocks > self.allocator.free else []
        if blocks > self.allocator.free + sum(len(node.blocks) for node in victims):
            return False
        for node in sorted(victims, key=lambda node: (node.waiting > 0, node.last_used, -node.start)):
            if blocks <= self.allocator.free:
                break
            self._free(node)
        return True

    def free_unwanted(self) -> None:
        for node in [node for node in self._idle if not node.waiting]:
            self._free(node)

    def _longest_match(self, node: Node, rest: tuple[int, ...]) -> tuple[Node, int] | None:
        """The child of `node` that shares the most of the first tokens of `rest`, and how many it shares."""
        for size in range(min(BLOCK, len(rest)), 0, -1):
            matches = [(child, self._shared(child, rest)) for child in node.children.get(rest[:size], ())]
            if any(shared for _, shared in matches):
                return max(matches, key=lambda match: match[1])
        return None

    def _shared(self, node: Node, rest: tuple[int, ...]) -> int:
        """How many of the first tokens of `rest` the node can provide: all of its tokens, or a multiple of BLOCK.

        If a prompt ends in a cached node that has no logits there, at least the prompt's last token must be computed
        again.
        """
        size = len(node.tokens)
        if rest[:size] == node.tokens and (size < len(rest) or node.ends or not node.blocks):
            return size
        if node.blocks and self.whole_nodes_only:
            return 0
        last = min(size, len(rest) - 1 if node.blocks else len(rest))
        shared = 0
        while shared + BLOCK <= last and rest[shared : shared + BLOCK] == node.tokens[shared : shared + BLOCK]:
            shared += BLOCK
        return shared

    def _attach(self, parent: Node, tokens: tuple[int, ...]) -> Node:
        node = Node(parent, tokens, next(self._order))
        parent.children.setdefault(tokens[:BLOCK], []).append(node)
        return node

    def _detach(self, node: Node) -> None:
        siblings = node.parent.children[node.tokens[:BLOCK]]
        siblings.remove(node)
        if not siblings:
            del node.parent.children[node.tokens[:BLOCK]]

    def _split(self, node: Node, at: int) -> Node:
        """Splits `node` at a block boundary. `node` becomes the lower part and keeps its rows and logits. Returns the
        upper part."""
        self._detach(node)
        upper = self._attach(node.parent, node.tokens[:at])
        upper.running, upper.waiting, upper.last_used = node.running, node.waiting, node.last_used
        upper.blocks, node.blocks = node.blocks[: at // BLOCK], node.blocks[at // BLOCK :]
        node.parent, node.start, node.tokens = upper, upper.end, node.tokens[at:]
        upper.children[node.tokens[:BLOCK]] = [node]
        if node in self._idle:
            self._idle[upper] = None
        return upper

    def _free(self, node: Node) -> None:
        """Frees the node's blocks, and removes the node from the tree unless rows wait for it."""
        self._idle.pop(node, None)
        self.allocator.release(node.blocks)
        node.blocks, node.payload = [], None
        if not node.waiting:
            self._detach(node)
