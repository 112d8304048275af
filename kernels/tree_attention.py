"""tree_attention, forward: for a tile of queries of one head, a program goes over the tiles of keys that they see.

Fully visible tiles come first and need no mask. The softmax is online, in powers of 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashpo.kernels.linear_logprob import shared_memory
from flashpo.kernels.token_stats import LN2, LOG2E
from flashpo.kernels.tree_tiles import lists, visible

# head dimension -> (queries, keys, stages, warps), best first
TILES_16_BIT = {
    64: ((64, 64, 3, 4), (64, 64, 2, 4)),
    128: ((64, 64, 3, 4), (64, 64, 2, 4), (64, 32, 2, 4)),
    256: ((128, 64, 2, 8), (64, 64, 2, 8), (64, 32, 2, 4), (32, 32, 1, 4)),
}
TILES_32_BIT = {  # without tensor cores, limited by registers
    64: ((64, 32, 2, 8), (32, 32, 2, 4)),
    128: ((32, 16, 2, 4),),
    256: ((32, 16, 1, 8), (16, 16, 1, 4)),
}


def block_dim(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def tile(dtype: torch.dtype, dim: int, shared_memory: int) -> dict[str, int]:
    """The best tile for heads of `dim`, a power of 2, such that the queries and all stages of keys and values fit."""
    table = TILES_32_BIT if dtype == torch.float32 else TILES_16_BIT
    for queries, keys, stages, warps in table[max(dim, 64)]:
        if (queries + 2 * stages * keys) * dim * dtype.itemsize <= shared_memory - 1024:
            return {"BLOCK_Q": queries, "BLOCK_K": keys, "num_stages": stages, "num_warps": warps}
    raise ValueError(f"no tile of heads of {dim} {dtype} fits in {shared_memory} bytes of shared memory")


@triton.jit
def load_tokens(x, begin, N, stride, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK, BLOCK_D) of one head of x from the token `begin`; zeros past the last token and the last feature."""
    i, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    at = x + begin.to(tl.int64) * stride + i[:, None] * stride + d[None, :]
    inside = i[:, None] < N - begin
    if D != BLOCK_D:
        inside &= d[None, :] < D
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def cap(x, scale, softcap):
    """(the score of x = q k for a softmax in powers of 2, the derivative of the score by scale x)."""
    if softcap is not None:
        t = tl.exp2(tl.abs(x) * (-2 * LOG2E * scale / softcap))
        tanh = (1 - t) / (1 + t)
        s, slope = tl.where(x < 0, -softcap, softcap) * LOG2E * tanh, 1 - tanh * tanh
    else:
        s, slope = x * (scale * LOG2E), 1.0
    return s, slope


@triton.jit
def forward_step(
    top,
    total,
    acc,
    q,
    k,
    v,
    end,
    position,
    begin,
    i,
    position_i,
    N,
    stride_kn,
    stride_vn,
    scale,
    window,
    softcap,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Fold the keys from `begin` into the running (maximum, sum, weighted values)."""
    keys = load_tokens(k, begin, N, stride_kn, BLOCK_K, D, BLOCK_D)
    s, _ = cap(tl.dot(q, tl.trans(keys), input_precision="ieee"), scale, softcap)
    if MASKED:
        j = begin + tl.arange(0, BLOCK_K)
        end_j = tl.load(end + j, mask=j < N, other=0)
        position_j = tl.load(position + j, mask=j < N, other=0) if window is not None else j
        seen = visible(i[:, None], j[None, :], end_j[None, :], position_i[:, None], position_j[None, :], window)
        s = tl.where(seen, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    # 0 for a row that has seen no key yet
    base = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
    shrink = tl.exp2(top - base)
    p = tl.exp2(s - base[:, None])
    values = load_tokens(v, begin, N, stride_vn, BLOCK_K, DV, BLOCK_DV)
    acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return new_top, total * shrink + tl.sum(p, 1), acc


@triton.jit(do_not_specialize=["N", "columns", "window"])
def forward_kernel(
    q,  # (N, Hq, D)
    k,  # (N, Hkv, D)
    v,  # (N, Hkv, DV)
    sinks,  # (Hq,) or None
    end,  # (N,)
    position,  # (N,)
    lists,  # the tiles of keys for each tile of queries
    counts,
    out,  # (N, Hq, DV)
    lse,  # (N, Hq)
    N,
    columns,
    stride_qn,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    scale,
    window,
    softcap,
    REPEAT: tl.constexpr,  # Hq / Hkv
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    row = tl.num_programs(0) - 1 - tl.program_id(0)  # the last tokens have the longest lists
    head, heads = tl.program_id(1), tl.num_programs(1)
    k += (head // REPEAT).to(tl.int64) * stride_kh
    v += (head // REPEAT).to(tl.int64) * stride_vh
    begin = row * BLOCK_Q
    inside = begin + tl.arange(0, BLOCK_Q) < N
    i = tl.minimum(begin + tl.arange(0, BLOCK_Q), N - 1)  # queries past the last repeat it
    position_i = tl.load(position + i) if window is not None else i
    queries = load_tokens(q + head.to(tl.int64) * stride_qh, begin, N, stride_qn, BLOCK_Q, D, BLOCK_D)
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_DV), tl.float32)
    lists += row.to(tl.int64) * columns
    for t in range(tl.load(counts + 2 * row)):
        top, total, acc = forward_step(
            top, total, acc, queries, k, v, end, position, tl.load(lists + t) * BLOCK_K, i, position_i, N,
            stride_kn, stride_vn, scale, window, softcap, False, D, DV, BLOCK_K, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    for t in range(tl.load(counts + 2 * row + 1)):
        top, total, acc = forward_step(
            top, total, acc, queries, k, v, end, position, tl.load(lists + columns - 1 - t) * BLOCK_K, i, position_i, N,
            stride_kn, stride_vn, scale, window, softcap, True, D, DV, BLOCK_K, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        new_top = tl.maximum(top, sink)
        total = total * tl.exp2(top - new_top) + tl.exp2(sink - new_top)
        acc *= tl.exp2(top - new_top)[:, None]
        top = new_top
    at = i.to(tl.int64) * heads + head
    tl.store(lse + at, (top + tl.log2(total)) * LN2, mask=inside)
    d = tl.arange(0, BLOCK_DV)[None, :]
    inside = inside[:, None] & (d < DV)
    tl.store(out + at[:, None] * DV + d, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    end: Tensor,
    position: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    (N, heads, dim), v_dim = q.shape, v.shape[2]
    out = q.new_empty((N, heads, v_dim))
    lse = q.new_empty((N, heads), dtype=torch.float32)
    if N == 0:
        return out, lse
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    end, position = end.contiguous(), position.contiguous()
    blocks = {"BLOCK_D": block_dim(dim), "BLOCK_DV": block_dim(v_dim)}
    blocks |= tile(q.dtype, max(blocks.values()), shared_memory(q.device))
    with torch.cuda.device_of(q):
        table = lists(end, position, window or None, blocks["BLOCK_Q"], blocks["BLOCK_K"], rows_are_keys=False)
        forward_kernel[(len(table[0]), heads)](
            q,
            k,
            v,
            None if sinks is None else sinks.contiguous(),
            end,
            position,
            *table,
            out,
            lse,
            N,
            table[0].shape[1],
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            scale,
            window or None,
            softcap or None,
            REPEAT=heads // k.shape[1],
            D=dim,
            DV=v_dim,
            **blocks,
        )
    return out, lse
