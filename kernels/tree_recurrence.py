"""tree_recurrence, forward, with one decay per head. Formulas and names are those of flashpo/ops/tree_recurrence.py.

Terms that do not depend on a state are computed for all chunks in one launch. The states follow, one launch per depth:
a program computes the state from which its chunk starts from the chunk before it. All outputs are again one launch.
Everything is in fp32.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashpo.kernels.tree_attention import block_dim

BLOCK_V = 32  # columns of a state per program
# Kernels that loop over columns do not fit into shared memory with more stages
LAUNCH = {"num_stages": 1, "num_warps": 8}


@triton.jit
def product(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def tokens_of(token, chunk, N, C: tl.constexpr):
    """(the index of each token of a chunk, whether there is such a token)."""
    at = tl.load(token + chunk * C + tl.arange(0, C))
    return at, at < N


@triton.jit
def rows(x, at, live, stride, begin, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """(C, BLOCK) of one head of x from the column `begin`; zeros past its tokens and its width."""
    column = begin + tl.arange(0, BLOCK)
    found = tl.load(x + at[:, None] * stride + column, mask=live[:, None] & (column < WIDTH), other=0.0)
    return found.to(tl.float32)


@triton.jit
def block(x, begin, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """(addresses, mask) of a (BLOCK_R, BLOCK_C) part of a contiguous (ROWS, COLUMNS) from the column `begin`."""
    row, column = tl.arange(0, BLOCK_R)[:, None], begin + tl.arange(0, BLOCK_C)[None, :]
    return x + row * COLUMNS + column, (row < ROWS) & (column < COLUMNS)


@triton.jit
def load_block(x, begin, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    at, inside = block(x, begin, ROWS, COLUMNS, BLOCK_R, BLOCK_C)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def store_block(
    x, begin, values, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    at, inside = block(x, begin, ROWS, COLUMNS, BLOCK_R, BLOCK_C)
    tl.store(at, values, mask=inside)


@triton.jit
def decays(decay, at, live, heads, C: tl.constexpr):
    """exp of: G_i - G_j (0 above the diagonal), G, G_last - G, G_last. No sum is computed as the difference of two."""
    g = tl.load(decay + at * heads, mask=live, other=0.0).to(tl.float32)
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    until = tl.where(j <= i, g[None, :], 0.0)
    gap = product(until, tl.where(i > j, 1.0, 0.0))
    factor = tl.where(j <= i, tl.exp(gap), 0.0)
    rest = tl.sum(tl.where(j > i, g[None, :], 0.0), 1)
    return factor, tl.exp(tl.sum(until, 1)), tl.exp(rest), tl.exp(tl.sum(g, 0))


@triton.jit
def inverse(a, C: tl.constexpr):
    """(I + a)^-1 for a strictly lower triangular a."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    found = tl.where(i == j, 1.0, 0.0)
    for row in range(1, C):
        of_row = tl.sum(tl.where(j == row, tl.trans(a), 0.0), 1)  # a[row], along the rows of `found`
        found -= tl.where(i == row, tl.sum(of_row[:, None] * found, 0)[None, :], 0.0)
    return found


@triton.jit(do_not_specialize=["N"])
def terms_kernel(
    k,  # (N, Hk, DK)
    v,  # (N, H, DV)
    decay,  # (N, H)
    beta,  # (N, H) or None
    token,  # (M, C)
    solved,  # (M, H, C, C): (I + A)^-1, or None
    update,  # (M, H, C, DV): U
    read,  # (M, H, C, DK): W, or None
    N,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    REPEAT: tl.constexpr,  # H / Hk
    DK: tl.constexpr,
    DV: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    chunk, head, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    at, live = tokens_of(token, chunk, N, C)
    place = chunk * heads + head
    values = v + head.to(tl.int64) * stride_vh
    if beta is not None:
        factor, reach, _, _ = decays(decay + head, at, live, heads, C)
        b = tl.load(beta + at * heads + head, mask=live, other=0.0).to(tl.float32)
        keys = rows(k + (head // REPEAT).to(tl.int64) * stride_kh, at, live, stride_kn, 0, DK, BLOCK_K)
        i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
        a = tl.where(j < i, product(keys, tl.trans(keys)) * factor * b[:, None], 0.0)
        t = inverse(a, C)
        store_block(solved + place * C * C, 0, t, C, C, C, C)
        store_block(read + place * C * DK, 0, product(t, keys * (b * reach)[:, None]), C, DK, C, BLOCK_K)
        for begin in range(0, DV, BLOCK_V):
            x = rows(values, at, live, stride_vn, begin, DV, BLOCK_V) * b[:, None]
            store_block(update + place * C * DV, begin, product(t, x), C, DV, C, BLOCK_V)
    else:
        for begin in range(0, DV, BLOCK_V):
            x = rows(values, at, live, stride_vn, begin, DV, BLOCK_V)
            store_block(update + place * C * DV, begin, x, C, DV, C, BLOCK_V)


@triton.jit
def state_behind(
    k, decay, token, states, update, chunk, head, heads, begin, N, stride_kn, stride_kh,
    REPEAT: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The state after a chunk, exp(G_last) S_before + (k exp(G_last - G))^T u, in the columns from `begin`."""
    at, live = tokens_of(token, chunk, N, C)
    _, _, rest, kept = decays(decay + head, at, live, heads, C)
    keys = rows(k + (head // REPEAT).to(tl.int64) * stride_kh, at, live, stride_kn, 0, DK, BLOCK_K)
    place = chunk * heads + head
    u = load_block(update + place * C * DV, begin, C, DV, C, BLOCK_V)
    state = load_block(states + place * DK * DV, begin, DK, DV, BLOCK_K, BLOCK_V)
    return kept * state + product(tl.trans(keys * rest[:, None]), u)


@triton.jit(do_not_specialize=["N", "first", "first_above"])
def states_kernel(
    k,
    decay,
    token,
    before,  # (M,)
    states,  # (M, H, DK, DV)
    update,  # in: U, out: u
    read,
    N,
    first,  # the first chunk of this depth, and of the depth before; both are 0 for the roots
    first_above,
    stride_kn,
    stride_kh,
    REPEAT: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Compute the states before the chunks of one depth, and their u."""
    chunk, head, heads = (first + tl.program_id(0)).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    begin = tl.program_id(2) * BLOCK_V
    place = chunk * heads + head
    if first == 0:
        state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    else:
        state = state_behind(
            k, decay, token, states, update, first_above + tl.load(before + chunk), head, heads, begin, N, stride_kn,
            stride_kh, REPEAT, DK, DV, C, BLOCK_K, BLOCK_V,
        )  # fmt: skip
    store_block(states + place * DK * DV, begin, state, DK, DV, BLOCK_K, BLOCK_V)
    if read is not None:
        w = load_block(read + place * C * DK, 0, C, DK, C, BLOCK_K)
        u = load_block(update + place * C * DV, begin, C, DV, C, BLOCK_V) - product(w, state)
        store_block(update + place * C * DV, begin, u, C, DV, C, BLOCK_V)


@triton.jit(do_not_specialize=["N"])
def ends_kernel(
    k,
    decay,
    token,
    last,  # (S,)
    states,
    update,
    ends,  # (S, H, DK, DV)
    N,
    stride_kn,
    stride_kh,
    REPEAT: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    segment, head, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    begin = tl.program_id(2) * BLOCK_V
    state = state_behind(
        k, decay, token, states, update, tl.load(last + segment), head, heads, begin, N, stride_kn, stride_kh,
        REPEAT, DK, DV, C, BLOCK_K, BLOCK_V,
    )  # fmt: skip
    store_block(ends + (segment * heads + head) * DK * DV, begin, state, DK, DV, BLOCK_K, BLOCK_V)


@triton.jit(do_not_specialize=["N"])
def out_kernel(
    q,  # (N, Hk, DK)
    k,
    decay,
    token,
    states,
    update,  # u
    out,  # (N, H, DV)
    N,
    stride_qn,
    stride_qh,
    stride_kn,
    stride_kh,
    scale,
    REPEAT: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    chunk, head, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    begin = tl.program_id(2) * BLOCK_V
    at, live = tokens_of(token, chunk, N, C)
    factor, reach, _, _ = decays(decay + head, at, live, heads, C)
    key_head = (head // REPEAT).to(tl.int64)
    queries = rows(q + key_head * stride_qh, at, live, stride_qn, 0, DK, BLOCK_K) * scale
    keys = rows(k + key_head * stride_kh, at, live, stride_kn, 0, DK, BLOCK_K)
    place = chunk * heads + head
    state = load_block(states + place * DK * DV, begin, DK, DV, BLOCK_K, BLOCK_V)
    u = load_block(update + place * C * DV, begin, C, DV, C, BLOCK_V)
    found = product(queries * reach[:, None], state) + product(product(queries, tl.trans(keys)) * factor, u)
    column = begin + tl.arange(0, BLOCK_V)
    to = out + (at[:, None] * heads + head) * DV + column
    tl.store(to, found.to(out.dtype.element_ty), mask=live[:, None] & (column < DV))


class Problem(NamedTuple):
    """The arguments in the form that the kernels take."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor  # fp32, contiguous
    beta: Tensor | None
    constants: dict[str, int]  # sizes, and launch options

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None, token: Tensor):
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        widths = {"DK": q.shape[2], "DV": v.shape[2], "C": token.shape[1], "REPEAT": v.shape[1] // q.shape[1]}
        blocks = {"BLOCK_K": block_dim(q.shape[2]), "BLOCK_V": min(BLOCK_V, block_dim(v.shape[2]))}
        beta = None if beta is None else beta.float().contiguous()
        return cls(q, k, v, decay.float().contiguous(), beta, widths | blocks | LAUNCH)

    def new(self, *shape: int) -> Tensor:
        return self.v.new_empty(shape, dtype=torch.float32)

    def terms(self, token: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """(I + A)^-1, U and W."""
        (N, heads, DV), (M, C) = self.v.shape, token.shape
        solved, read = None, None
        if self.beta is not None:
            solved, read = self.new(M, heads, C, C), self.new(M, heads, C, self.q.shape[2])
        update = self.new(M, heads, C, DV)
        terms_kernel[(M, heads)](
            self.k, self.v, self.decay, self.beta, token, solved, update, read, N,
            *self.k.stride()[:2], *self.v.stride()[:2], **self.constants,
        )  # fmt: skip
        return solved, update, read


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor | None,
    token: Tensor,
    before: Tensor,
    last: Tensor,
    sizes: list[int],
    scale: float,
    with_ends: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem.of(q, k, v, decay, beta, token)
    (N, heads, DV), DK, M = v.shape, q.shape[2], token.shape[0]
    out, states = v.new_empty(v.shape), problem.new(M, heads, DK, DV)
    ends = problem.new(len(last) if with_ends else 0, heads, DK, DV)
    blocks = triton.cdiv(DV, problem.constants["BLOCK_V"])
    strides, rest = problem.k.stride()[:2], problem.constants
    with torch.cuda.device_of(v):
        _, update, read = problem.terms(token)
        first = above = 0
        for size in sizes:
            states_kernel[(size, heads, blocks)](
                problem.k, problem.decay, token, before, states, update, read, N, first, above, *strides, **rest
            )
            first, above = first + size, first
        if with_ends:
            ends_kernel[(len(last), heads, blocks)](
                problem.k, problem.decay, token, last, states, update, ends, N, *strides, **rest
            )
        out_kernel[(M, heads, blocks)](
            problem.q, problem.k, problem.decay, token, states, update, out, N,
            *problem.q.stride()[:2], *strides, scale, **rest,
        )  # fmt: skip
    return out, states, ends
