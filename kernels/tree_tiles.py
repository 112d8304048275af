"""Which tiles of a tree's attention mask hold anything, and which nothing but seen pairs: lists made on the device.

They are made once for all layers of a model, and for backward: those of the last tree are kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 64  # columns looked at together
MOST: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def visible(i, j, end_j, position_i, position_j, window):
    """Whether query i sees key j, of any shapes that broadcast; window may be None."""
    seen = (j <= i) & (i < end_j)
    if window is not None:
        seen &= position_i - position_j < window
    return seen


@triton.jit
def lowest(x, inside):
    return tl.min(tl.where(inside, x, MOST), 1)


@triton.jit
def highest(x, inside):
    return tl.max(tl.where(inside, x, -MOST), 1)


@triton.jit
def bounds(end, position, token, N):
    """Of each row of tokens: the least and the largest end and position."""
    inside = token < N
    ends = tl.load(end + token, mask=inside, other=0)
    places = tl.load(position + token, mask=inside, other=0)
    return lowest(ends, inside), highest(ends, inside), lowest(places, inside), highest(places, inside)


@triton.jit(do_not_specialize=["N", "columns", "window"])
def lists_kernel(
    end,  # (N,)
    position,  # (N,)
    lists,  # (rows, columns): the full tiles' columns from the front, the others' from the back
    counts,  # (rows, 2): how many of either
    N,
    columns,
    window,
    ROWS_ARE_KEYS: tl.constexpr,
    ROW: tl.constexpr,  # tokens
    COLUMN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A program for each row of tiles."""
    begin = tl.program_id(0) * ROW
    own = bounds(end, position, begin + tl.arange(0, ROW)[None, :], N)
    stop = tl.minimum(begin + ROW, N)
    if ROWS_ARE_KEYS:
        first, behind = begin // COLUMN, tl.cdiv(tl.max(own[1]), COLUMN)
    else:
        first, behind = 0, tl.cdiv(stop, COLUMN)
    lists += tl.program_id(0).to(tl.int64) * columns
    full_count = 0
    other_count = 0
    for start in range(first, behind, CHUNK):
        c = start + tl.arange(0, CHUNK)
        c_begin = c * COLUMN
        c_stop = tl.minimum(c_begin + COLUMN, N)
        theirs = bounds(end, position, c_begin[:, None] + tl.arange(0, COLUMN)[None, :], N)
        if ROWS_ARE_KEYS:
            k_begin, k_stop, q_begin, q_stop, keys, queries = begin, begin + ROW, c_begin, c_stop, own, theirs
        else:
            k_begin, k_stop, q_begin, q_stop, keys, queries = c_begin, c_begin + COLUMN, begin, stop, theirs, own
        held = (c < behind) & (k_begin < q_stop) & (keys[1] > q_begin)
        full = (k_stop <= q_begin + 1) & (keys[0] >= q_stop)
        if window is not None:
            held &= queries[2] - keys[3] < window
            full &= queries[3] - keys[2] < window
        full &= held
        other = held & ~full
        tl.store(lists + full_count + tl.cumsum(full.to(tl.int32), 0) - 1, c, mask=full)
        tl.store(lists + columns - other_count - tl.cumsum(other.to(tl.int32), 0), c, mask=other)
        full_count += tl.sum(full.to(tl.int32), 0)
        other_count += tl.sum(other.to(tl.int32), 0)
    counts += tl.program_id(0) * 2
    tl.store(counts, full_count)
    tl.store(counts + 1, other_count)


def lists(
    end: Tensor, position: Tensor, window: int | None, row: int, column: int, rows_are_keys: bool
) -> tuple[Tensor, Tensor]:
    """(lists, counts) for rows of `row` tokens; a mask of keys by queries where `rows_are_keys`, else the other way."""
    kept = _kept(end, position)
    options = window, row, column, rows_are_keys
    if options not in kept:
        kept[options] = _made(end, position, *options)
    return kept[options]


Lists = dict[tuple, tuple[Tensor, Tensor]]  # by their options
_last: tuple[tuple, tuple[Tensor, Tensor], Lists] | None = None  # (identity, tree, lists)


def _kept(end: Tensor, position: Tensor) -> Lists:
    """The lists of this tree, to be added to.

    What is kept holds the tree's tensors, so that no other has their addresses; `_version` counts what is written into
    them, inference mode excepted. A graph being captured makes lists of its own, which live as long as it does.
    """
    global _last
    if end.is_inference() or position.is_inference() or (end.is_cuda and torch.cuda.is_current_stream_capturing()):
        return {}
    stream = torch.cuda.current_stream(end.device) if end.is_cuda else None
    identity = stream, *((x.data_ptr(), len(x), x._version) for x in (end, position))
    kept = _last  # looked at once: another thread may put its own tree there at any moment
    if kept is None or kept[0] != identity:
        kept = _last = identity, (end, position), {}
    return kept[2]


def release() -> None:
    """Forgets the last tree and its lists."""
    global _last
    _last = None


def _made(
    end: Tensor, position: Tensor, window: int | None, row: int, column: int, rows_are_keys: bool
) -> tuple[Tensor, Tensor]:
    rows, columns = triton.cdiv(len(end), row), triton.cdiv(len(end), column)
    out = end.new_empty((rows, columns), dtype=torch.int32)
    counts = end.new_empty((rows, 2), dtype=torch.int32)
    lists_kernel[(rows,)](
        end,
        position,
        out,
        counts,
        len(end),
        columns,
        window,
        ROWS_ARE_KEYS=rows_are_keys,
        ROW=row,
        COLUMN=column,
        CHUNK=CHUNK,
    )
    return out, counts
