"""Which token comes from which in a token tree, for layers that read the tokens before them in order.

Attention needs to know who sees whom. A convolution needs each token's last few ancestors, and a recurrence needs the
tokens in chunks, each behind the chunk that its state comes from.
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

_thread = threading.local()  # its `last`: a tree's mask and lineage


def is_tree(mask: Any) -> bool:
    """Whether that is a `TokenTree.mask`."""
    return isinstance(mask, Tensor) and mask.dtype == torch.int32


class Chunks(NamedTuple):
    """M stretches of up to C tokens, none of which branches inside. Those of depth d have d chunks before them."""

    token: Tensor  # (M, C) int64: flat index; N where a chunk is shorter
    place: Tensor  # (N,) int64: of each token in `token`, flattened
    before: Tensor  # (M,) int64: the chunk whose state this one starts from, counted within its depth; 0 at a root
    last: Tensor  # (S,) int64: of each segment
    sizes: Sequence[int]  # chunks of each depth, which lie one behind the other


class Waves(NamedTuple):
    """The N tokens by how many come before them in their sequences."""

    order: Tensor  # (N,) int64: those of depth 0, then those of depth 1, and so on
    place: Tensor  # (N,) int64: where each token is in `order`
    before: Tensor  # (N,) int64: the flat index of the token before; N where there is none
    parents: Sequence[Tensor]  # of each depth, where the tokens before are among those of the depth before
    sizes: list[int]  # tokens of each depth


class Lineage:
    """Of N tokens in S segments, each of which goes on from the end of its parent: what `tree_recurrence` and
    `tree_conv` need to know of a token tree. It keeps what they ask for: one lineage serves all layers.

    Args:
        segments: (S, 2 or more) int64 on the host: begin and end, one behind the other from 0 to N, none empty; those
            of a `TokenTree`, for example.
        parents: (S,) int64 on the host: an earlier segment, -1 for one that starts from nothing.
        device: of the layers' tensors.

    Raises:
        TypeError, ValueError: the message names the argument.

    Attributes:
        kept: None, or what layers leave here of each segment's end, by the kind of their state, in the layers' order.
    """

    kept: dict[str, list[Tensor]] | None = None

    def __init__(self, segments: Tensor, parents: Tensor, device: torch.device | str = "cpu"):
        _check(segments, parents)
        self.begin, self.stop = segments[:, 0].tolist(), segments[:, 1].tolist()
        self.parent = parents.tolist()
        self.tokens = self.stop[-1]
        self.device = torch.device(device)
        self.ancestors = functools.cache(self._ancestors)  # every layer asks for the same
        self.chunks = functools.cache(self._chunks)
        self.waves = functools.cache(self._waves)

    @classmethod
    def of_mask(cls, mask: Tensor) -> "Lineage":
        """Of a `TokenTree.mask`; asked again for the same one, as each layer does, it is the same lineage."""
        known, lineage = getattr(_thread, "last", (lambda: None, None))
        if lineage is None or known() is not mask:
            end, position = mask[0, 0].cpu().long().unbind(0)
            begin = F.pad(end.diff().nonzero()[:, 0] + 1, (1, 0))  # every segment has an end of its own
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
        """(S, ...): of a layer; None where nothing is kept."""
        if self.kept is not None and states is not None:
            self.kept.setdefault(kind, []).append(states)

    def _before(self) -> Tensor:
        """(N,) int64 on the host: the token before each one; N where there is none."""
        before = torch.arange(-1, self.tokens - 1, device="cpu")
        for begin, parent in zip(self.begin, self.parent):
            before[begin] = self.tokens if parent < 0 else self.stop[parent] - 1
        return before

    def _ancestors(self, count: int) -> Tensor:
        """(count, N) int64: each token's parent, grandparent and so on; N where there is none."""
        before = F.pad(self._before(), (0, 1), value=self.tokens)  # the last of these N + 1 is the ancestor of no token
        found = [before[:-1]]
        while len(found) < count:
            found.append(before[found[-1]])
        return torch.stack(found)[:count].to(self.device)

    def _chunks(self, size: int) -> Chunks:
        depths: list[list[tuple[int, int, int]]] = []  # of each depth its chunks: begin, end, place of the one before
        last: list[tuple[int, int]] = []  # of each segment, where its last chunk is: depth and place within it
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
        return Chunks(*there, tuple(map(len, depths)))  # type: ignore[call-arg, arg-type]  # tensors' number

    def _waves(self) -> Waves:
        depth = torch.arange(self.tokens, device="cpu")
        for begin, stop, parent in zip(self.begin, self.stop, self.parent):
            depth[begin:stop] -= begin
            if parent >= 0:
                depth[begin:stop] += depth[self.stop[parent] - 1] + 1
        order = depth.argsort(stable=True)
        place, sizes, before = order.argsort(), depth.bincount(), self._before()
        first = F.pad(sizes.cumsum(0), (2, 0))[depth]  # where the depth before begins
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
            f"segments must lie one behind the other from 0 on, none of them empty, got {segments.tolist()}"
        )
    if ((parents < -1) | (parents >= torch.arange(len(parents), device="cpu"))).any():
        raise ValueError(f"parents must be earlier segments, or -1, got {parents.tolist()}")


def check_lineage(lineage: Lineage, name: str, x: Tensor) -> None:
    """`lineage` is of the tokens of `x`, on its device."""
    if not isinstance(lineage, Lineage):
        raise TypeError(f"lineage must be a flashpo.Lineage, got {type(lineage).__name__}")
    if lineage.tokens != x.shape[0]:
        raise ValueError(f"lineage has {lineage.tokens} tokens, {name} has {x.shape[0]}")
    if lineage.device.type != x.device.type or lineage.device.index not in (None, x.device.index):
        raise ValueError(f"lineage is on {lineage.device}, {name} on {x.device}")
