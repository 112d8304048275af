"""A pool of cache blocks and the tree of token sequences that lie in it.

A segment is a run of tokens at consecutive positions that begins in a block of its own: token i of it lies in slot
`blocks[i // BLOCK] * BLOCK + i % BLOCK`. The cache of a sequence is a chain of segments, from the top of the tree down.
Since each begins in a new block, whatever its position, it may follow one that ends within a block: nothing is copied.
"""

import itertools
from collections.abc import Collection, Hashable, Sequence
from typing import Any

BLOCK = 64  # tokens


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK)


class BlockAllocator:
    """Gives out blocks 1 to blocks - 1; block 0 is the waste block, which parked rows write to."""

    def __init__(self, blocks: int):
        if blocks < 2:
            raise ValueError(f"blocks must be at least 2 (block 0 is never given out), not {blocks}")
        self.capacity = blocks - 1  # blocks that can be owned
        self.clear()

    def clear(self) -> None:
        self._free = list(range(self.capacity, 0, -1))
        self._owned: set[int] = set()
        self.peak = 0  # most blocks owned at once; whoever reports it may start it anew

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return len(self._owned)

    def take(self, count: int) -> list[int]:
        """Raises MemoryError when fewer than `count` are free."""
        if count > self.free:
            raise MemoryError(f"{count} blocks are wanted, {self.free} are free")
        blocks = [self._free.pop() for _ in range(count)]
        self._owned.update(blocks)
        self.peak = max(self.peak, self.used)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Raises ValueError for a block that nobody owns."""
        for block in blocks:
            if block not in self._owned:
                raise ValueError(f"block {block} is released, but nobody owns it")
            self._owned.remove(block)
            self._free.append(block)


class Segment:
    """Tokens at positions start, start + 1, ... in blocks of their own; `blocks` is empty while it is not cached."""

    parent: "Node"  # what it continues: at the top the tree's root, which is empty
    start: int  # position of its first token
    tokens: Sequence[int]  # its own
    blocks: list[int]

    def __init__(self, parent: "Node | None", tokens: Sequence[int]):
        self.parent = parent  # type: ignore[assignment]  # None: the root, which only the tree's own code meets
        self.start = parent.end if parent else 0
        self.tokens = tokens
        self.blocks = []

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def ancestors(self) -> "list[Node]":
        """The nodes before it, from the top down: they hold the tokens at positions 0 to start - 1."""
        nodes = []
        node = self.parent
        while node.parent:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class Node(Segment):
    """A segment that several rows read.

    running, waiting: rows here or further down that run now, and that will.
    ends: a prompt ends here, so that the logits after the last token are wanted when the node is prefilled and kept
        with it. An engine that drops them while no row waits clears `ends`; when a prompt ends here again, its last
        tokens are computed anew.
    payload: the engine's own (those logits, states of linear-attention layers); None once the node loses its blocks.
    """

    tokens: tuple[int, ...]

    def __init__(self, parent: "Node | None", tokens: tuple[int, ...], order: int):
        super().__init__(parent, tokens)
        self.order = order  # among siblings
        self.children: dict[tuple[int, ...], list[Node]] = {}  # by their first block of tokens
        self.running = 0
        self.waiting = 0
        self.last_used = 0  # when a row last stopped here or below: never before that of its children
        self.ends = False
        self.payload: Any = None

    @property
    def path(self) -> "list[Node]":
        """Its ancestors and itself, from the top down."""
        return [*self.ancestors, self] if self.parent else []


class PrefixTree:
    """Nodes by tokens, one tree for each `space` (an adapter: its keys and values serve no other).

    A prompt uses every node all of whose tokens it begins with. Where it parts from a node, the node is split at the
    last block boundary before, if there is one; the tokens between, fewer than BLOCK, are computed again. With
    `whole_nodes_only` a cached node is never split: the states of hybrid models exist only at its end.

    A node that no row runs or waits for is freed at once, or, while `keep` is set, when its blocks are needed. Nodes
    whose rows all wait can be freed as well, after those, and are prefilled again when a row starts.
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
        self._idle: dict[Node, None] = {}  # cached nodes that no row runs at or below

    def insert(self, tokens: tuple[int, ...], space: Hashable, rows: int, max_blocks: int) -> Node:
        """The node at which `tokens` end, for `rows` rows that wait; its path takes at most `max_blocks` blocks."""
        root = node = self._roots.setdefault(space, Node(None, (), 0))
        rest = tokens
        while match := self._longest_match(node, rest):
            node, shared = match
            if shared < len(node.tokens):
                node = self._split(node, shared)
            rest = rest[shared:]
        if sum(blocks_for(len(x.tokens)) for x in node.path) + blocks_for(len(rest)) > max_blocks:
            node, rest = root, tokens  # too many partly filled blocks on this path: a node of its own
        if rest:
            node = self._attach(node, rest)
        node.ends = True
        for x in node.path:
            x.waiting += rows
        return node

    def start(self, leaf: Node) -> list[Node]:
        """One of the rows waiting at `leaf` runs from now on. Returns the nodes that got blocks for it, to prefill."""
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
        """One of the rows running at `leaf` has ended, or `waits` to run again."""
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
        """A node that is cached already, in `blocks`, below a node with running rows."""
        node = self._attach(parent, tokens)
        node.blocks = blocks
        node.last_used = next(self._clock)
        self._idle[node] = None
        return node

    def make_room(self, blocks: int, spare: Collection[Node] = ()) -> bool:
        """Frees idle nodes other than `spare` until `blocks` blocks are free. Frees none if all would not do."""
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
        """The child of `node` that serves most of the first tokens of `rest`, and how many."""
        for size in range(min(BLOCK, len(rest)), 0, -1):
            matches = [(child, self._shared(child, rest)) for child in node.children.get(rest[:size], ())]
            if any(shared for _, shared in matches):
                return max(matches, key=lambda match: match[1])
        return None

    def _shared(self, node: Node, rest: tuple[int, ...]) -> int:
        """How many of the first tokens of `rest` the node serves: all of its own, or whole blocks.

        A prompt that ends in a cached node without logits there has to compute its last token at least.
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
        """Cuts `node` at a block boundary. It stays the lower part, with its rows and logits; returns the upper."""
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
        """Takes the node's blocks; removes it unless rows wait for it."""
        self._idle.pop(node, None)
        self.allocator.release(node.blocks)
        node.blocks, node.payload = [], None
        if not node.waiting:
            self._detach(node)
