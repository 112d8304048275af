"""Which token follows which in a token tree, for layers that read the preceding tokens in order.

Attention needs to know which tokens see each other. A convolution needs the last few ancestors of each token. A
recurrence needs the tokens in chunks, ordered so that a chunk comes after the chunk whose final state it starts from.
"""

import functools
import itertools
import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashpo.ops._check import check_dtype

_thread = threading.local()  # `_thread.last`: the mask that was asked for last (a weak reference) and its lineage


def is_tree(mask: Any) -> bool:
    """Whether `mask` is the mask of a `TokenTree`."""
    return isinstance(mask, Tensor) and mask.dtype == torch.int32


class Chunks(NamedTuple):
    """M chunks of up to C tokens. A chunk has no branch inside. A chunk of depth d has d chunks before it."""

    token: Tensor  # (M, C) int64: flat index of each token; N fills up a shorter chunk
    place: Tensor  # (N,) int64: where each token is in `token`, flattened
    # (M,) int64: the chunk whose final state this one starts from, counted within its depth; 0 at a root
    before: Tensor
    last: Tensor  # (S,) int64: the last chunk of each segment
    sizes: Sequence[int]  # the number of chunks of each depth; the M chunks are sorted by depth


class Level(NamedTuple):
    """The segments of one depth, which is the number of segments before them in their sequences."""

    segment: Tensor  # (n,) int64: their indices
    token: Tensor  # int64: flat indices of their tokens, one segment behind the other
    cu_seqlens: Tensor  # (n + 1,) int64: where each segment begins among these, and the number of these
    parent: Tensor  # (n,) int64: where each segment's parent is in `segment` of the previous level; 0 at depth 0


class Levels(NamedTuple):
    """The segments by depth; all levels together are one order of the tokens and one of the segments."""

    levels: list[Level]
    token: Tensor  # (N,) int64: where each token is in this order
    segment: Tensor  # (S,) int64: where each segment is


class Waves(NamedTuple):
    """The N tokens sorted by depth, the number of tokens before them in their sequences."""

    order: Tensor  # (N,) int64: flat indices of the tokens of depth 0, then of depth 1, and so on
    place: Tensor  # (N,) int64: where each token is in `order`
    before: Tensor  # (N,) int64: the flat index of the preceding token; N where there is none
    parents: Sequence[Tensor]  # for each depth: where the preceding tokens are among those of the previous depth
    sizes: list[int]  # the number of tokens of each depth


class Lineage:
    """The order of N tokens in S segments, where each segment continues the end of its parent segment.

    This is what `tree_recurrence` and `tree_conv` need to know of a token tree. A lineage caches what it computes, so
    one object serves all layers.

    Args:
        segments: (S, 2 or more) int64 on the host: begin and end of each segment in its first two columns. The segments
            cover 0 to N in order without gaps, and none is empty. `TokenTree` gives such a tensor.
        parents: (S,) int64 on the host: the parent of each segment, which is an earlier segment, or -1 for none.
        device: the device of the layers' tensors.

    Raises:
        TypeError, ValueError: the message names the argument.

    Attributes:
        kept: None, or a dict to which each layer appends its states at the segments' ends, keyed by the kind of state.
    """

    kept: dict[str, list[Tensor]] | None = None

    def __init__(self, segments: Tensor, parents: Tensor, device: torch.device | str = "cpu"):
        _check(segments, parents)
        self.begin, self.stop = segments[:, 0].tolist(), segments[:, 1].tolist()
        self.parent = parents.tolist()
        self.tokens = self.stop[-1]
        self.device = torch.device(device)
        self.ancestors = functools.cache(self._ancestors)  # cached, because every layer asks for the same
        self.chunks = functools.cache(self._chunks)
        self.levels = functools.cache(self._levels)
        self.waves = functools.cache(self._waves)

    @classmethod
    def of_mask(cls, mask: Tensor) -> "Lineage":
        """The lineage of the token tree whose mask this is. Asked again for the same mask, it returns the same
        object."""
        known, lineage = getattr(_thread, "last", (lambda: None, None))
        if lineage is None or known() is not mask:
            end, position = mask[0, 0].cpu().long().unbind(0)
            begin = F.pad(end.diff().nonzero()[:, 0] + 1, (1, 0))  # every segment has its own value of `end`
            segments = torch.stack([begin, F.pad(begin[1:], (0, 1), value=len(end))], 1)
            before = [(position[:b] == position[b] - 1).nonzero()[-1:] for b in begin.tolist()]
            parents = [int(torch.searchsorted(begin, at[0, 0], right=True)) - 1 if len(at) else -1 for at in before]
            lineage = cls(segments, torch.tensor(parents, device="cpu"), mask.device)
            _thread.last = weakref.ref(mask), lineage
        return lineage

    def ends(self) -> Tensor:
        """(S,) int64: each segment's last token."""
        return torch.tensor(self.stop, device="cpu").to(self.device) - 1

    @property
    def keeps(self) -> bool:
        return self.kept is not None

    def keep(self, kind: str, states: Tensor | None) -> None:
        """Append a layer's states (S, ...) at the segments' ends, if states are kept and the layer has some."""
        if self.kept is not None and states is not None:
            self.kept.setdefault(kind, []).append(states)

    def _before(self) -> Tensor:
        """(N,) int64 on the host: the flat index of the token before each token; N where there is none."""
        before = torch.arange(-1, self.tokens - 1, device="cpu")
        for begin, parent in zip(self.begin, self.parent):
            before[begin] = self.tokens if parent < 0 else self.stop[parent] - 1
        return before

    def _ancestors(self, count: int) -> Tensor:
        """(count, N) int64: the parent, the grandparent and so on of each token; N where there is none."""
        # Entry N stands for "none", and its ancestor is N again
        before = F.pad(self._before(), (0, 1), value=self.tokens)
        found = [before[:-1]]
        while len(found) < count:
            found.append(before[found[-1]])
        return torch.stack(found)[:count].to(self.device)

    def _chunks(self, size: int) -> Chunks:
        # For each depth its chunks: begin, end, index of the preceding chunk
        depths: list[list[tuple[int, int, int]]] = []
        last: list[tuple[int, int]] = []  # for each segment its last chunk: depth and index within that depth
        for begin, stop, parent in zip(self.begin, self.stop, self.parent):
            depth, before = last[parent] if parent >= 0 else (-1, 0)
            for at in range(begin, stop, size):
                depth += 1
                if depth == len(depths):
                    depths.append([])
                depths[depth].append((at, min(at + size, stop), before))
                before = len(depths[depth]) - 1
            last.append((depth, before))
        bounds = torch.tensor([chunk for chunks in depths for chunk in chunks], device="cpu")
        token = bounds[:, :1] + torch.arange(size, device="cpu")
        live = token < bounds[:, 1:2]
        place = torch.empty(self.tokens, dtype=torch.int64, device="cpu")
        place[token[live]] = live.flatten().nonzero()[:, 0]
        token = token.masked_fill(~live, self.tokens)
        first = [0, *itertools.accumulate(map(len, depths))]
        lasts = torch.tensor([first[depth] + at for depth, at in last], device="cpu")
        there = (x.to(self.device) for x in (token, place, bounds[:, 2].contiguous(), lasts))
        # Mypy does not know the number of tensors
        return Chunks(*there, tuple(map(len, depths)))  # type: ignore[call-arg, arg-type]

    def _levels(self) -> Levels:
        depths: list[list[int]] = []
        of: list[tuple[int, int]] = []  # for each segment its depth and its index within that depth
        for segment, parent in enumerate(self.parent):
            depth = of[parent][0] + 1 if parent >= 0 else 0
            if depth == len(depths):
                depths.append([])
            of.append((depth, len(depths[depth])))
            depths[depth].append(segment)
        levels = []
        for segments in depths:
            token = [t for s in segments for t in range(self.begin[s], self.stop[s])]
            lengths = itertools.accumulate((self.stop[s] - self.begin[s] for s in segments), initial=0)
            parents = [of[self.parent[s]][1] if self.parent[s] >= 0 else 0 for s in segments]
            there = (torch.tensor(x, device="cpu").to(self.device) for x in (segments, token, list(lengths), parents))
            levels.append(Level(*there))
        orders = torch.cat([level.token for level in levels]), torch.cat([level.segment for level in levels])
        return Levels(levels, orders[0].argsort(), orders[1].argsort())

    def _waves(self) -> Waves:
        depth = torch.arange(self.tokens, device="cpu")
        for begin, stop, parent in zip(self.begin, self.stop, self.parent):
            depth[begin:stop] -= begin
            if parent >= 0:
                depth[begin:stop] += depth[self.stop[parent] - 1] + 1
        order = depth.argsort(stable=True)
        place, sizes, before = order.argsort(), depth.bincount(), self._before()
        first = F.pad(sizes.cumsum(0), (2, 0))[depth]  # where the previous depth begins in `order`
        parents = (F.pad(place, (0, 1))[before] - first)[order]
        there = (x.to(self.device) for x in (order, place, before, parents))
        order, place, before, parents = there
        return Waves(order, place, before, parents.split(sizes.tolist()), sizes.tolist())


def _check(segments: Tensor, parents: Tensor) -> None:
    for name, x in (("segments", segments), ("parents", parents)):
        check_dtype(name, x, torch.int64)
        if x.device.type != "cpu":
            raise ValueError(f"{name} must be on the host, got a tensor on {x.device}")
    if segments.dim() != 2 or segments.shape[0] == 0 or segments.shape[1] < 2:
        raise ValueError(f"segments must be (segments, 2 or more) with at least one, got {tuple(segments.shape)}")
    if parents.shape != segments.shape[:1]:
        raise ValueError(f"parents must be one number for each of {len(segments)} segments, got {tuple(parents.shape)}")
    begin, stop = segments[:, 0], segments[:, 1]
    if begin[0] != 0 or (begin >= stop).any() or (begin[1:] != stop[:-1]).any():
        raise ValueError(
            f"segments must follow each other from token 0 on, none of them empty, got {segments.tolist()}"
        )
    if ((parents < -1) | (parents >= torch.arange(len(parents), device="cpu"))).any():
        raise ValueError(f"parents must be earlier segments, or -1, got {parents.tolist()}")


def check_lineage(lineage: Lineage, name: str, x: Tensor) -> None:
    """Check that `lineage` has as many tokens as `x` and is on its device."""
    if not isinstance(lineage, Lineage):
        raise TypeError(f"lineage must be a flashpo.Lineage, got {type(lineage).__name__}")
    if lineage.tokens != x.shape[0]:
        raise ValueError(f"lineage has {lineage.tokens} tokens, {name} has {x.shape[0]}")
    if lineage.device.type != x.device.type or lineage.device.index not in (None, x.device.index):
        raise ValueError(f"lineage is on {lineage.device}, {name} on {x.device}")
