"""Every distinct token of a batch once: rows that begin alike are paths of one tree, laid out flat and depth first.

    rows                       tokens      a b c d e f        c and its row end where the next row branches off:
    a b c d                    position    0 1 2 3 2 3        query i sees key j  <=>  j <= i < end[j]
    a b e f                    end         6 6 4 4 6 6

The rows are sorted as words are; row i then shares with row i - 1 all that it shares with any row before it, so that
the lengths of these shared beginnings tell the whole tree.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashpo.ops._check import check_device, check_flag, check_tensor
from flashpo.packing.images import Images, TreeImages

MIN_SAVED = 16


class TokenTree(NamedTuple):
    """N distinct tokens of a batch of B rows, in S segments, and M distinct pairs (token, what it has to predict).

    A segment is a stretch of tokens that the same rows pass through. `segments` and `parents` live on the host, all
    else on the batch's device.
    """

    tokens: Tensor  # (N,) int64
    position: Tensor  # (N,) int32: the token's place in its row, from 0
    end: Tensor  # (N,) int32: the flat index behind the last token that sees it
    copies: Tensor  # (N,) int64: how many rows hold it
    flat: Tensor  # (B, T) int64: the flat index of each token of the batch; -1 for padding and for what was pruned
    source: Tensor  # (M,) int64: the flat index of the token that predicts `target`; ascending
    target: Tensor  # (M,) int64
    pair: Tensor  # (B, C) int64: which pair scores this place; M where nothing does
    segments: Tensor  # (S, 3) int64: begin, end, and end of all that descends from it
    parents: Tensor  # (S,) int64: a segment's parent, -1 for a root
    pruned: bool
    width: int  # T: a forward of the padded batch has so many positions
    images: TreeImages | None = None

    @property
    def mask(self) -> Tensor:
        """(1, 1, 2, N) int32, end and position: what the tree is to attention, in the place of a mask."""
        return torch.stack([self.end, self.position])[None, None]

    def inputs(self, follows_width: bool = False) -> dict[str, Tensor]:
        """What a backbone takes.

        follows_width: its rotary frequencies depend on the last position of a forward. All positions then move, so that
        the last one is that of the padded batch; rotary embeddings tell only how far apart two tokens are.
        """
        position = self.position.long()
        if follows_width:
            position = position + (self.width - 1 - position.max())
        return {"input_ids": self.tokens[None], "attention_mask": self.mask, "position_ids": position[None]}

    def unpack(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Values of the pairs (M, ...) at the places that they score (B, C, ...), `fill` at the others."""
        nothing = values.new_full((1, *values.shape[1:]), fill)
        return torch.cat([values, nothing])[self.pair.to(values.device)]


def pack(
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    *,
    min_saved: int = MIN_SAVED,
    prune: bool = True,
    images: Images | None = None,
) -> TokenTree:
    """The token tree of a batch; shared prefixes are found from the token ids, on the host, with one copy from a GPU.

    Args:
        input_ids: (B, T) int64, at least 0 wherever attention_mask is 1.
        attention_mask: (B, T) bool or 0/1; the ones of a row lie together, wherever its padding is.
        completion_mask: (B, C) bool or 0/1, the scored tokens among the last C of each row; C <= T. A row's first token
            cannot be scored, nor can padding.
        min_saved: a shared stretch becomes a segment if that saves so many tokens; otherwise its rows go apart where
            it begins. On CPUs a segment costs attention what 6 to 25 tokens cost the layers' products (models of 256
            to 1024 features); GPUs skip tiles, and 1 is best.
        prune: leave out what no scored token needs: a row from its last scored token on, a row without one. Results
            are the same; only an auxiliary loss over all tokens has to see them.
        images: of the rows. Rows share image tokens only where the images are equal, and the tree has each image once.

    Returns:
        TokenTree. The order of rows does not matter to `tokens`. Where there is nothing to run, one token stands in, so
        that the ranks of a distributed run stay in step.

    Raises:
        TypeError, ValueError: the message names the argument.
    """
    check_count("min_saved", min_saved)
    rows = Rows.of(input_ids, attention_mask, completion_mask, prune, images)
    sorted_ids, of_row = rows.distinct()
    length = (sorted_ids >= 0).sum(1)
    branch = torch.tensor(branches(shared_with_previous(sorted_ids), min_saved), device="cpu")
    begin = F.pad((length - branch).cumsum(0), (1, 0))  # of each sorted row's own tokens; the last is N

    count, depth = (torch.arange(n, device="cpu") for n in sorted_ids.shape)
    count = count[:, None]
    brings = branch[:, None] <= depth  # a token of its own at this depth, not one of the row before
    owner = count.where(brings, 0).cummax(0).values
    index = begin[owner] + depth - branch[owner]
    index = index.masked_fill(sorted_ids < 0, -1)
    successor = count.where(brings, len(length)).flip(0).cummin(0).values.flip(0)
    successor = F.pad(successor[1:], (0, 0, 0, 1), value=len(length))
    own = brings & (sorted_ids >= 0)

    tokens, position, end = sorted_ids[own], depth.expand_as(own)[own], begin[successor][own]
    before = F.pad(index, (1, 0), value=-1)[:, :-1][own]
    if len(tokens) == 0:
        tokens, position, end, before = (torch.tensor([x], device="cpu") for x in (0, 0, 1, -1))
    index = index[of_row]
    copies = torch.bincount(index[index >= 0], minlength=len(tokens))
    pairs = rows.pairs(index)
    segments, parents = _segments(end, before)
    shown = None
    if images is not None:
        is_image = tokens >= rows.vocabulary
        shown = images.of_tree(tokens[is_image] - rows.vocabulary, input_ids, attention_mask)
        tokens = tokens.masked_fill(is_image, images.token)
    there = (x.to(input_ids.device) for x in (tokens, position.int(), end.int(), copies, rows.spread(index), *pairs))
    return TokenTree(*there, segments, parents, prune, input_ids.shape[1], shown)  # type: ignore[call-arg, arg-type]  # tensors' number


class Rows(NamedTuple):
    """The batch on the host, its rows aligned at their first tokens."""

    batch: Tensor  # (B, T): as it came
    scored: Tensor  # (B, T) bool
    width: int  # C
    first: Tensor  # (B, 1): the column of a row's first token
    ids: Tensor  # (B, L), -1 behind a row's end; where an image is, its code, behind the ids of the batch

    @classmethod
    def of(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor,
        completion_mask: Tensor,
        prune: bool,
        images: Images | None = None,
    ) -> "Rows":
        check_flag("prune", prune)
        batch, live, scored = _on_host(input_ids, attention_mask, completion_mask)
        first = live.int().argmax(1, keepdim=True)
        if (live.int().diff(dim=1) == 1).sum(1).add(live[:, 0]).max() > 1:
            raise ValueError("attention_mask: the tokens of a row must lie together, found a gap")
        if (scored & ~live).any():
            raise ValueError("completion_mask: padding cannot be scored, see attention_mask")
        if scored.gather(1, first).any():
            raise ValueError("completion_mask: a row's first token cannot be scored, nothing predicts it")
        if (batch < 0).logical_and(live).any():
            raise ValueError("input_ids must be at least 0 wherever attention_mask is 1")
        length = live.sum(1, keepdim=True)
        if prune:
            columns = torch.arange(batch.shape[1], device="cpu")
            length = (columns.where(scored, 0).amax(1, keepdim=True) - first).clamp(min=0)
        depth = torch.arange(max(int(length.max()), 1), device="cpu")
        told_apart = batch
        if images is not None:
            if images.code.shape != batch.shape:
                raise ValueError(f"images are of {tuple(images.code.shape)} tokens, input_ids are {tuple(batch.shape)}")
            told_apart = batch.where(images.code < 0, images.code + batch.max() + 1)
        ids = told_apart.gather(1, (first + depth).clamp(max=batch.shape[1] - 1)).where(depth < length, -1)
        return cls(batch, scored, completion_mask.shape[1], first, ids)

    @property
    def vocabulary(self) -> int:
        """More than any token id of the batch."""
        return int(self.batch.max()) + 1

    def distinct(self) -> tuple[Tensor, Tensor]:
        """`ids` without repetition, sorted as words are, and where each row is among them."""
        return self.ids.unique(dim=0, return_inverse=True)  # -1 behind the end: a prefix sorts first

    def prompt(self) -> Tensor:
        """(B,): how many tokens of a row come before its first scored one; all, where none is scored."""
        return (self.scored.int().argmax(1) - self.first[:, 0]).where(self.scored.any(1), self.ids.shape[1])

    def pairs(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """source, target and pair of TokenTree; `index` (B, L) is the flat index of each of `ids`."""
        row, column = self.scored.nonzero(as_tuple=True)
        predictor = index[row, column - self.first[row, 0] - 1]
        vocab = self.vocabulary
        keys, which = (predictor * vocab + self.batch[row, column]).unique(return_inverse=True)
        pair = torch.full_like(self.batch, len(keys)).index_put_((row, column), which)
        return keys // vocab, keys % vocab, pair[:, self.batch.shape[1] - self.width :]

    def spread(self, index: Tensor) -> Tensor:
        """(B, L) aligned at the first tokens -> (B, T) as the batch lies."""
        row, depth = (index >= 0).nonzero(as_tuple=True)
        spread = torch.full_like(self.batch, -1)
        return spread.index_put_((row, depth + self.first[row, 0]), index[row, depth])


def check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")


def _on_host(input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T) int64, bool and bool, after one copy."""
    for name, x in (("input_ids", input_ids), ("attention_mask", attention_mask), ("completion_mask", completion_mask)):
        check_tensor(name, x)
        if x.dim() != 2:
            raise ValueError(f"{name} must be (rows, tokens), got {tuple(x.shape)}")
        check_device(name, x, "input_ids", input_ids)
    if input_ids.dtype != torch.int64:
        raise TypeError(f"input_ids must be int64, got {input_ids.dtype}")
    if 0 in input_ids.shape:
        raise ValueError(f"input_ids must hold at least one row and one column, got {tuple(input_ids.shape)}")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask must be {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}")
    (rows, tokens), scored = input_ids.shape, completion_mask.shape[1]
    if completion_mask.shape[0] != rows or scored > tokens:
        raise ValueError(f"completion_mask must be ({rows}, C), C <= {tokens}, got {tuple(completion_mask.shape)}")
    ids, live, scored = torch.stack(
        [input_ids, attention_mask.long(), F.pad(completion_mask.long(), (tokens - scored, 0))]
    ).cpu()
    for name, x in (("attention_mask", live), ("completion_mask", scored)):
        if not ((x == 0) | (x == 1)).all():
            raise ValueError(f"{name} must hold 0 and 1 only")
    return ids, live.bool(), scored.bool()


def shared_with_previous(sorted_ids: Tensor) -> list[int]:
    """How many tokens each row shares with the one before it."""
    alike = (sorted_ids[1:] == sorted_ids[:-1]) & (sorted_ids[1:] >= 0)
    return [0, *alike.int().cumprod(1).sum(1).tolist()]


def branches(shared: list[int], min_saved: int) -> list[int]:
    """The depth at which each row leaves the path of the row before it.

    That is `shared`, unless the stretch between two branchings is too short for its own segment: then all that go
    through it part where it begins. Shallow branchings come first, because the depth of the deeper ones hangs on them.
    """
    branch = list(shared)
    waiting = [(1, len(shared), 0)]  # rows, all of which share so many tokens with the row before
    while waiting:
        begin, stop, base = waiting.pop()
        if begin >= stop:
            continue
        shallowest = min(shared[begin:stop])
        cuts = [row for row in range(begin, stop) if shared[row] == shallowest]
        depth = shallowest if (shallowest - base) * len(cuts) >= min_saved else base
        for left, right in zip([begin - 1, *cuts], [*cuts, stop]):
            waiting.append((left + 1, right, depth))
        for row in cuts:
            branch[row] = depth
    return branch


def _segments(end: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """segments and parents of TokenTree; `before` (N,) is the flat index of the token before, or -1."""
    begin = F.pad(end.diff().nonzero()[:, 0] + 1, (1, 0))
    stop = F.pad(begin[1:], (0, 1), value=len(end))
    parents = torch.searchsorted(begin, before[begin], right=True) - 1
    return torch.stack([begin, stop, end[begin]], 1), parents
