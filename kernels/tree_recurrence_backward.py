"""tree_recurrence, backward. It recomputes the terms, then computes the gradients of the states from the last depth to
the first, and then those of the inputs for all chunks at once. Everything is in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashpo.kernels.tree_recurrence import (
    Problem,
    decays,
    load_block,
    product,
    rows,
    store_block,
    tokens_of,
)


@triton.jit(do_not_specialize=["N"])
def updates_kernel(
    q,  # (N, Hk, DK)
    k,
    decay,  # (N, H)
    token,  # (M, C)
    states,  # (M, H, DK, DV)
    update,  # (M, H, C, DV); in: U, out: u
    read,  # (M, H, C, DK) or None
    d_out,  # (N, H, DV)
    d_update,  # (M, H, C, DV): P^T d_out
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
    factor, _, _, _ = decays(decay + head, at, live, heads, C)
    key_head = (head // REPEAT).to(tl.int64)
    queries = rows(q + key_head * stride_qh, at, live, stride_qn, 0, DK, BLOCK_K) * scale
    keys = rows(k + key_head * stride_kh, at, live, stride_kn, 0, DK, BLOCK_K)
    within = product(queries, tl.trans(keys)) * factor
    place = chunk * heads + head
    d = rows(d_out + head * DV, at, live, heads * DV, begin, DV, BLOCK_V)
    store_block(d_update + place * C * DV, begin, product(tl.trans(within), d), C, DV, C, BLOCK_V)
    if read is not None:
        w = load_block(read + place * C * DK, 0, C, DK, C, BLOCK_K)
        state = load_block(states + place * DK * DV, begin, DK, DV, BLOCK_K, BLOCK_V)
        u = load_block(update + place * C * DV, begin, C, DV, C, BLOCK_V) - product(w, state)
        store_block(update + place * C * DV, begin, u, C, DV, C, BLOCK_V)


@triton.jit(do_not_specialize=["N", "first", "next", "stop", "segments"])
def states_kernel(
    q,
    k,
    decay,
    token,
    before,  # (M,)
    last,  # (S,)
    read,
    d_out,
    d_ends,  # (S, H, DK, DV) or None
    d_update,  # in: P^T d_out, out: the gradient of u
    d_before,  # (M, H, DK, DV): of the states before the chunks; d_behind: of the states after them
    d_behind,
    N,
    first,  # the first chunk of this depth, of the next one and of the one after it
    next,
    stop,
    segments,
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
    """State gradients for the chunks of one depth: the sum over the chunks that start from a state, in their order."""
    within = tl.program_id(0)
    chunk, head, heads = (first + within).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    begin = tl.program_id(2) * BLOCK_V
    d_state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    for other in range(next, stop):
        if tl.load(before + other) == within:
            d_state += load_block(
                d_before + (heads.to(tl.int64) * other + head) * DK * DV, begin, DK, DV, BLOCK_K, BLOCK_V
            )
    if d_ends is not None:
        for segment in range(segments):
            if tl.load(last + segment) == chunk:
                d_state += load_block(
                    d_ends + (heads.to(tl.int64) * segment + head) * DK * DV, begin, DK, DV, BLOCK_K, BLOCK_V
                )
    place = chunk * heads + head
    store_block(d_behind + place * DK * DV, begin, d_state, DK, DV, BLOCK_K, BLOCK_V)
    at, live = tokens_of(token, chunk, N, C)
    _, reach, rest, kept = decays(decay + head, at, live, heads, C)
    key_head = (head // REPEAT).to(tl.int64)
    queries = rows(q + key_head * stride_qh, at, live, stride_qn, 0, DK, BLOCK_K) * (scale * reach)[:, None]
    keys = rows(k + key_head * stride_kh, at, live, stride_kn, 0, DK, BLOCK_K) * rest[:, None]
    du = load_block(d_update + place * C * DV, begin, C, DV, C, BLOCK_V) + product(keys, d_state)
    store_block(d_update + place * C * DV, begin, du, C, DV, C, BLOCK_V)
    d = rows(d_out + head * DV, at, live, heads * DV, begin, DV, BLOCK_V)
    d_state = kept * d_state + product(tl.trans(queries), d)
    if read is not None:
        d_state -= product(tl.trans(load_block(read + place * C * DK, 0, C, DK, C, BLOCK_K)), du)
    store_block(d_before + place * DK * DV, begin, d_state, DK, DV, BLOCK_K, BLOCK_V)


@triton.jit(do_not_specialize=["N"])
def inputs_kernel(
    q,
    k,
    v,
    decay,
    beta,  # (N, H) or None
    token,
    states,
    solved,  # (M, H, C, C) or None
    update,  # u
    d_out,
    d_update,  # the gradient of u
    d_behind,
    dq,  # (N, H, DK): for each head of v
    dk,
    dv,  # (N, H, DV)
    d_decay,  # (N, H)
    d_beta,  # (N, H) or None
    N,
    stride_qn,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    scale,
    REPEAT: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    chunk, head, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    at, live = tokens_of(token, chunk, N, C)
    factor, reach, rest, kept = decays(decay + head, at, live, heads, C)
    key_head, place = (head // REPEAT).to(tl.int64), chunk * heads + head
    d_reached = tl.zeros((C, BLOCK_K), tl.float32)  # the gradient of scale q exp(G)
    d_read = tl.zeros((C, BLOCK_K), tl.float32)  # the gradient of beta k exp(G)
    d_write = tl.zeros((C, BLOCK_K), tl.float32)  # the gradient of k exp(G_last - G)
    d_within = tl.zeros((C, C), tl.float32)  # the gradient of P; d_against: that of A
    d_against = tl.zeros((C, C), tl.float32)
    of_last, of_beta = 0.0, tl.zeros((C,), tl.float32)
    for begin in range(0, DV, BLOCK_V):
        state = load_block(states + place * DK * DV, begin, DK, DV, BLOCK_K, BLOCK_V)
        d_state = load_block(d_behind + place * DK * DV, begin, DK, DV, BLOCK_K, BLOCK_V)
        u = load_block(update + place * C * DV, begin, C, DV, C, BLOCK_V)
        du = load_block(d_update + place * C * DV, begin, C, DV, C, BLOCK_V)
        d = rows(d_out + head * DV, at, live, heads * DV, begin, DV, BLOCK_V)
        d_reached += product(d, tl.trans(state))
        d_write += product(u, tl.trans(d_state))
        d_within += product(d, tl.trans(u))
        of_last += tl.sum(state * d_state)
        if beta is not None:
            b = tl.load(beta + at * heads + head, mask=live, other=0.0)
            r = product(tl.trans(load_block(solved + place * C * C, 0, C, C, C, C)), du)
            d_read -= product(r, tl.trans(state))
            d_against -= product(r, tl.trans(u))
            values = rows(v + head.to(tl.int64) * stride_vh, at, live, stride_vn, begin, DV, BLOCK_V)
            of_beta += tl.sum(r * values, 1)
            du = r * b[:, None]
        column = begin + tl.arange(0, BLOCK_V)
        to = dv + (at[:, None] * heads + head) * DV + column
        tl.store(to, du.to(dv.dtype.element_ty), mask=live[:, None] & (column < DV))
    queries = rows(q + key_head * stride_qh, at, live, stride_qn, 0, DK, BLOCK_K) * scale
    keys = rows(k + key_head * stride_kh, at, live, stride_kn, 0, DK, BLOCK_K)
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    by_query = d_within * factor
    d_gap = by_query * product(queries, tl.trans(keys))
    d_queries = d_reached * reach[:, None] + product(by_query, keys)
    d_keys = d_write * rest[:, None] + product(tl.trans(by_query), queries)
    d_reach = tl.sum(queries * d_reached, 1) * reach
    d_rest = tl.sum(keys * d_write, 1) * rest
    if beta is not None:
        b = tl.load(beta + at * heads + head, mask=live, other=0.0)
        by_key = tl.where(j < i, d_against * factor, 0.0)
        of_pairs = by_key * product(keys, tl.trans(keys))
        of_state = tl.sum(keys * d_read, 1) * reach
        tl.store(d_beta + at * heads + head, of_beta + of_state + tl.sum(of_pairs, 1), mask=live)
        by_key *= b[:, None]
        d_gap += of_pairs * b[:, None]
        d_reach += of_state * b
        d_keys += d_read * (reach * b)[:, None] + product(by_key, keys) + product(tl.trans(by_key), keys)
    d_reach += tl.where(tl.arange(0, C) == C - 1, kept * of_last, 0.0)
    # The decay of token t is part of G_i - G_j where j < t <= i.
    between = product(tl.where(j < i, d_gap, 0.0), tl.where(i < j, 1.0, 0.0)) + d_reach[:, None]
    found = tl.sum(tl.where(i >= j, between, 0.0), 0) + tl.sum(tl.where(i < j, d_rest[:, None], 0.0), 0)
    tl.store(d_decay + at * heads + head, found, mask=live)
    column = tl.arange(0, BLOCK_K)
    to, inside = (at[:, None] * heads + head) * DK + column, live[:, None] & (column < DK)
    tl.store(dq + to, d_queries * scale, mask=inside)
    tl.store(dk + to, d_keys, mask=inside)


def backward(
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
    states: Tensor,
    d_out: Tensor,
    d_ends: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    problem = Problem.of(q, k, v, decay, beta, token)
    (N, heads, DV), DK, (M, C) = v.shape, q.shape[2], token.shape
    d_out = d_out.to(v.dtype).contiguous()
    d_ends = None if d_ends is None else d_ends.float().contiguous()
    d_update = problem.new(M, heads, C, DV)
    d_before, d_behind = (problem.new(M, heads, DK, DV) for _ in range(2))
    dq, dk = (problem.new(N, heads, DK) for _ in range(2))
    dv, d_decay = v.new_empty(v.shape), problem.new(N, heads)
    d_beta = None if beta is None else problem.new(N, heads)
    blocks, rest = triton.cdiv(DV, problem.constants["BLOCK_V"]), problem.constants
    of_keys = *problem.q.stride()[:2], *problem.k.stride()[:2]
    with torch.cuda.device_of(v):
        solved, update, read = problem.terms(token)
        updates_kernel[(M, heads, blocks)](
            problem.q, problem.k, problem.decay, token, states, update, read, d_out, d_update, N, *of_keys, scale,
            **rest,
        )  # fmt: skip
        after, stop = M, M
        for size in reversed(sizes):
            first = after - size
            states_kernel[(size, heads, blocks)](
                problem.q, problem.k, problem.decay, token, before, last, read, d_out, d_ends, d_update, d_before,
                d_behind, N, first, after, stop, len(last), *of_keys, scale, **rest,
            )  # fmt: skip
            after, stop = first, after
        inputs_kernel[(M, heads)](
            problem.q, problem.k, problem.v, problem.decay, problem.beta, token, states, solved, update, d_out,
            d_update, d_behind, dq, dk, dv, d_decay, d_beta, N, *of_keys, *problem.v.stride()[:2], scale, **rest,
        )  # fmt: skip
    dq, dk = (x.unflatten(1, (q.shape[1], -1)).sum(2) for x in (dq, dk))
    return dq, dk, dv, d_decay, d_beta
