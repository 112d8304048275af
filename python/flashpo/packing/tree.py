"""`pack`: the token tree of a batch, which holds each distinct token once.

Rows that begin alike are paths of one tree. Its tokens are laid out flat, in depth-first order:

    rows                       tokens      a b c d e f        end[j] is one past the last token that sees token j,
    a b c d                    position    0 1 2 3 2 3        so that
    a b e f                    end         6 6 4 4 6 6        query i sees key j  <=>  j <= i < end[j]

To build it, the rows are sorted lexicographically. Row i then shares with row i - 1 everything that it shares with any
earlier row, so that the lengths of these shared beginnings determine the whole tree.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashpo.ops._check import check_device, check_flag, check_tensor
from flashpo.packing.images import Images, TreeImages

MIN_SAVED = 16


class TokenTree(NamedTuple):
    """The token tree of a batch of B rows of T tokens, made by `pack`.

    It has N distinct tokens in S segments, and M distinct pairs (token, next token to predict). A segment is a run of
    consecutive tokens that the same rows pass through. `segments` and `parents` are on the host, all other tensors on
    the batch's device. A flat index counts the tokens of the tree, 0 to N - 1.
    """

    tokens: Tensor  # (N,) int64
    position: Tensor  # (N,) int32: the token's place in its row, from 0
    end: Tensor  # (N,) int32: the flat index after that of the last token that sees this one
    copies: Tensor  # (N,) int64: how many rows contain the token
    flat: Tensor  # (B, T) int64: the flat index of each token of the batch; -1 for padding and for pruned tokens
    source: Tensor  # (M,) int64: the flat index of the token that predicts `target`; ascending
    target: Tensor  # (M,) int64: the token id to predict
    pair: Tensor  # (B, C) int64: the pair that scores this token of a row; M if it is not scored
    segments: Tensor  # (S, 3) int64: flat index of its begin, of its end, and of the end of all of its descendants
    parents: Tensor  # (S,) int64: the segment that it continues, -1 for a root
    pruned: bool  # whether tokens that no scored token needs were left out
    width: int  # T, the number of positions in a forward of the padded batch
    images: TreeImages | None = None

    @property
    def mask(self) -> Tensor:
        """(1, 1, 2, N) int32: `end` and `position`, which attention gets in place of its mask."""
        return torch.stack([self.end, self.position])[None, None]

    def inputs(self, follows_width: bool = False) -> dict[str, Tensor]:
        """The keywords of a backbone's forward: input_ids (1, N), attention_mask (`mask`) and position_ids (1, N).

        Args:
            follows_width: whether the backbone's rotary frequencies depend on the last position of a forward. If so,
                all positions are moved so that the last one is that of the padded batch. That changes nothing else,
                because rotary embeddings only depend on the distance between tokens.
        """
        position = self.position.long()
        if follows_width:
            position = position + (self.width - 1 - position.max())
        return {"input_ids": self.tokens[None], "attention_mask": self.mask, "position_ids": position[None]}

    def unpack(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Values of the pairs, (M, ...), as rows, (B, C, ...); `fill` at tokens that are not scored."""
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
    """The token tree of a batch, which contains each distinct token once.

    Tokens of several rows are the same if the rows are equal up to and including them. These shared prefixes are found
    from the token ids, on the host, after a single copy from the GPU.

    Args:
        input_ids: (B, T) int64, at least 0 wherever `attention_mask` is 1.
        attention_mask: (B, T) bool or 0/1. The ones of a row must be consecutive; the padding may be on either side.
        completion_mask: (B, C) bool or 0/1, C <= T: which of the last C tokens of each row are scored. A row's first
            token and padding cannot be scored.
        min_saved: shared tokens become a segment of their own if that saves at least so many tokens; otherwise the rows
            separate where these tokens begin. On CPUs an additional segment costs attention as much time as 6 to 25
            tokens cost the matrix products of the layers (measured with hidden sizes of 256 to 1024). On GPUs
            attention skips tiles, and 1 is best.
        prune: leave out tokens that no scored token needs: those of a row from its last scored token on, and rows
            without scored tokens. Log-probs and gradients stay the same; but an auxiliary loss over all tokens needs
            prune=False.
        images: the images of the rows, made by `Images.of`. Rows share image tokens only if the images are equal. The
            tree contains each distinct image once.

    Returns:
        A TokenTree. `tokens` does not depend on the order of the rows. If no token has to run, the tree has one token
        that nothing needs, so that all ranks of a distributed run have a forward.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """
    check_count("min_saved", min_saved)
    rows = Rows.of(input_ids, attention_mask, completion_mask, prune, images)
    sorted_ids, of_row = rows.distinct()
    length = (sorted_ids >= 0).sum(1)
    branch = torch.tensor(branches(shared_with_previous(sorted_ids), min_saved), device="cpu")
    # flat index of the first token that each sorted row adds to the tree; the last entry is N
    begin = F.pad((length - branch).cumsum(0), (1, 0))

    count, depth = (torch.arange(n, device="cpu") for n in sorted_ids.shape)
    count = count[:, None]
    brings = branch[:, None] <= depth  # whether a row adds a token at this depth, or shares that of the row before
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
    """The batch on the host, with its rows aligned at their first tokens."""

    batch: Tensor  # (B, T): the token ids as they were given
    scored: Tensor  # (B, T) bool
    width: int  # C
    first: Tensor  # (B, 1): the column of a row's first token
    ids: Tensor  # (B, L): the aligned ids, -1 after a row's end; for image tokens a code that is larger than any id

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
        """A number that is larger than any token id of the batch."""
        return int(self.batch.max()) + 1

    def distinct(self) -> tuple[Tensor, Tensor]:
        """The distinct rows of `ids`, sorted lexicographically, and the index of each row among them."""
        return self.ids.unique(dim=0, return_inverse=True)  # a prefix sorts first, because -1 follows a row's end

    def prompt(self) -> Tensor:
        """(B,): how many tokens of a row come before its first scored one; L if none is scored."""
        return (self.scored.int().argmax(1) - self.first[:, 0]).where(self.scored.any(1), self.ids.shape[1])

    def pairs(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`source`, `target` and `pair` of TokenTree. `index` (B, L): the flat index of each token of `ids`."""
        row, column = self.scored.nonzero(as_tuple=True)
        predictor = index[row, column - self.first[row, 0] - 1]
        vocab = self.vocabulary
        keys, which = (predictor * vocab + self.batch[row, column]).unique(return_inverse=True)
        pair = torch.full_like(self.batch, len(keys)).index_put_((row, column), which)
        return keys // vocab, keys % vocab, pair[:, self.batch.shape[1] - self.width :]

    def spread(self, index: Tensor) -> Tensor:
        """Move indices (B, L), aligned at the first tokens, to the places (B, T) that the tokens have in the batch."""
        row, depth = (index >= 0).nonzero(as_tuple=True)
        spread = torch.full_like(self.batch, -1)
        return spread.index_put_((row, depth + self.first[row, 0]), index[row, depth])


def check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")


def _on_host(input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Check the three tensors and copy them to the host together: (B, T) int64, bool and bool."""
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
    """How many tokens each row shares with the row before it; 0 for the first row."""
    alike = (sorted_ids[1:] == sorted_ids[:-1]) & (sorted_ids[1:] >= 0)
    return [0, *alike.int().cumprod(1).sum(1).tolist()]


def branches(shared: list[int], min_saved: int) -> list[int]:
    """The depth at which each row leaves the path of the row before it.

    This is `shared`, unless the tokens between two branches are too few for a segment of their own (`min_saved`). Then
    all rows that pass through these tokens separate where the tokens begin. Shallow branches are decided first, because
    the depths of the deeper ones depend on them.
    """
    branch = list(shared)
    waiting = [(1, len(shared), 0)]  # ranges of rows that share at least `base` tokens with the row before
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
    """`segments` and `parents` of TokenTree. `before` (N,): the flat index of the token before each token, or -1."""
    begin = F.pad(end.diff().nonzero()[:, 0] + 1, (1, 0))
    stop = F.pad(begin[1:], (0, 1), value=len(end))
    parents = torch.searchsorted(begin, before[begin], right=True) - 1
    return torch.stack([begin, stop, end[begin]], 1), parents
