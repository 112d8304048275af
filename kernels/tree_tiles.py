"""Lists of the attention mask's tiles in a tree: those that are fully visible, and those that are partly visible.

The lists are made on the device, once for all layers of a model and for backward. Those of the last tree are kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 64  # columns that are examined at once
MOST: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def visible(i, j, end_j, position_i, position_j, window):
    """Whether query i sees key j; the shapes broadcast. window may be None."""
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
    """For each row of tokens: the smallest and largest end, and the smallest and largest position."""
    inside = token < N
    ends = tl.load(end + token, mask=inside, other=0)
    places = tl.load(position + token, mask=inside, other=0)
    return lowest(ends, inside), highest(ends, inside), lowest(places, inside), highest(places, inside)


@triton.jit(do_not_specialize=["N", "columns", "window"])
def lists_kernel(
    end,  # (N,)
    position,  # (N,)
    lists,  # (rows, columns): the fully visible tiles' columns from the front, the partly visible ones' from the back
    counts,  # (rows, 2): the numbers of both
    N,
    columns,
    window,
    ROWS_ARE_KEYS: tl.constexpr,
    ROW: tl.constexpr,  # tokens in a row of tiles
    COLUMN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program for each row of tiles."""
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
    """(lists, counts) for rows of `row` tokens. Rows are keys and columns queries if `rows_are_keys`, else vice
    versa."""
    kept = _kept(end, position)
    options = window, row, column, rows_are_keys
    if options not in kept:
        kept[options] = _made(end, position, *options)
    return kept[options]


Lists = dict[tuple, tuple[Tensor, Tensor]]  # keyed by the options of `lists`
_last: tuple[tuple, tuple[Tensor, Tensor], Lists] | None = None  # (identity, tree, lists)


def _kept(end: Tensor, position: Tensor) -> Lists:
    """The lists of this tree, to which the caller may add.

    The cache also holds the tree's tensors, so that no other tensor can get their addresses. `_version` detects writes
    into them, except in inference mode, where nothing is cached. A CUDA graph that is being captured makes its own
    lists, which live as long as the graph.
    """
    global _last
    if end.is_inference() or position.is_inference() or (end.is_cuda and torch.cuda.is_current_stream_capturing()):
        return {}
    stream = torch.cuda.current_stream(end.device) if end.is_cuda else None
    identity = stream, *((x.data_ptr(), len(x), x._version) for x in (end, position))
    kept = _last  # read once, because another thread may replace it at any moment
    if kept is None or kept[0] != identity:
        kept = _last = identity, (end, position), {}
    return kept[2]


def release() -> None:
    """Forget the last tree and its lists."""
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
