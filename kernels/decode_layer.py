"""The operations of a decoder layer between its matrix products; a program computes a row of tokens or one of its
heads.

Every intermediate result is rounded where transformers' modules round it: to the dtype of the operands, or to the wider
one of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashpo.kernels.kv_append import BLOCK, place

LONGEST = 16384  # the number of features in a row, which a program holds at once
COLUMNS = 1024  # columns of a gated activation per program


@triton.jit
def rounded(x, dtype: tl.constexpr):
    return x.to(dtype).to(tl.float32)


@triton.jit
def load_wide(p, mask):
    return tl.load(p, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def scaled(x, inverse, weight, at, inside, dtype: tl.constexpr, UNIT_OFFSET: tl.constexpr):
    """The last step of an RMSNorm in `dtype`: the scaling by the weight."""
    w = load_wide(weight + at, inside)
    if UNIT_OFFSET:
        y = rounded(x * inverse * (1 + w), dtype)
    elif weight.dtype.element_ty == tl.float32:
        y = rounded(x * inverse, dtype) * w
    else:
        y = rounded(rounded(x * inverse, dtype) * w, dtype)
    return y


@triton.jit
def norm_kernel(
    x,  # (N, H)
    residual,  # (N, H) or None
    weight,  # (H,)
    out,  # (N, H)
    residual_out,  # (N, H)
    eps,
    H: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * H
    h = tl.arange(0, BLOCK_H)
    inside = h < H
    dtype: tl.constexpr = residual_out.dtype.element_ty
    y = load_wide(x + row + h, inside)
    if residual is not None:
        y = rounded(y + load_wide(residual + row + h, inside), dtype)
    tl.store(residual_out + row + h, y, mask=inside)
    inverse = tl.rsqrt(tl.sum(y * y, 0) / H + eps)
    tl.store(out + row + h, scaled(y, inverse, weight, h, inside, dtype, UNIT_OFFSET), mask=inside)


@triton.jit
def turned(
    x, weight, cos, sin, eps, D: tl.constexpr, R: tl.constexpr, UNIT_OFFSET: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The head at x, normalised if there is a weight, with its first R features rotated in halves."""
    d = tl.arange(0, BLOCK_D)
    inside, turns, first = d < D, d < R, d < R // 2
    partner = tl.where(first, d + R // 2, d - R // 2)
    dtype: tl.constexpr = x.dtype.element_ty
    y, z = load_wide(x + d, inside), load_wide(x + partner, turns)
    if weight is not None:
        inverse = tl.rsqrt(tl.sum(y * y, 0) / D + eps)
        y = scaled(y, inverse, weight, d, inside, dtype, UNIT_OFFSET)
        z = scaled(z, inverse, weight, partner, turns, dtype, UNIT_OFFSET)
    z = tl.where(first, -z, z)
    a, b = y * load_wide(cos + d, turns), z * load_wide(sin + d, turns)
    if cos.dtype.element_ty == dtype:
        a, b = rounded(a, dtype), rounded(b, dtype)
    return tl.where(turns, a + b, y)


@triton.jit(do_not_specialize=["limit"], do_not_specialize_on_alignment=["slots"])
def rope_kernel(
    q,  # (N, q_heads * D)
    k,  # (N, heads * D)
    v,  # (N, heads * D)
    cos,  # (N, R)
    sin,  # (N, R)
    q_weight,  # (D,) or None
    k_weight,  # (D,) or None
    out,  # (N, q_heads, D)
    k_cache,  # (blocks, heads, D, 64)
    v_cache,  # (blocks, heads, 64, D)
    slots,  # (N,)
    eps,
    limit,
    stride_q,
    stride_k,
    stride_v,
    q_heads: tl.constexpr,
    heads: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """For each token, one program per query head, then one per head of keys and values."""
    n, head = (tl.program_id(0) // (q_heads + heads)).to(tl.int64), tl.program_id(0) % (q_heads + heads)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    cos += n * R
    sin += n * R
    if head < q_heads:
        query = turned(q + n * stride_q + head * D, q_weight, cos, sin, eps, D, R, UNIT_OFFSET, BLOCK_D)
        tl.store(out + (n * q_heads + head) * D + d, query, mask=inside)
    else:
        head -= q_heads
        tile, offset, live = place(slots, n, limit, head, heads)
        live &= inside
        key = turned(k + n * stride_k + head * D, k_weight, cos, sin, eps, D, R, UNIT_OFFSET, BLOCK_D)
        tl.store(k_cache + tile * D + d * BLOCK + offset, key, mask=live)
        value = tl.load(v + n * stride_v + head * D + d, mask=inside)
        tl.store(v_cache + (tile + offset) * D + d, value, mask=live)


@triton.jit
def gated_kernel(
    gate,  # (N, columns)
    up,  # (N, columns)
    out,  # (N, columns)
    stride_gate,
    stride_up,
    columns: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """silu(x) = x sigmoid(x). gelu_tanh(x) = x sigmoid(u), since 1 + tanh(u / 2) = 2 sigmoid(u)."""
    parts: tl.constexpr = (columns + BLOCK - 1) // BLOCK
    n = (tl.program_id(0) // parts).to(tl.int64)
    j = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    inside = j < columns
    x = load_wide(gate + n * stride_gate + j, inside)
    u = 1.5957691216057308 * (x + 0.044715 * x * x * x) if GELU else x
    active = rounded(x / (1 + tl.exp(-u)), gate.dtype.element_ty)
    tl.store(out + n * columns + j, active * load_wide(up + n * stride_up + j, inside), mask=inside)


def warps(numbers: int) -> int:
    """So many warps that each thread has 16 bytes of 16-bit numbers."""
    return min(max(triton.next_power_of_2(numbers) // 256, 1), 16)


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, unit_offset: bool, out: Tensor, total: Tensor
) -> None:
    """All tensors are contiguous."""
    rows, features = x.shape
    if x.numel() == 0:
        return
    with torch.cuda.device_of(x):
        norm_kernel[(rows,)](
            x,
            residual,
            weight,
            out,
            total,
            eps,
            H=features,
            UNIT_OFFSET=unit_offset,
            BLOCK_H=triton.next_power_of_2(features),
            num_warps=warps(features),
        )


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    unit_offset: bool,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: Tensor,
    out: Tensor,
) -> None:
    """The rows of q, k and v may be strided; all other tensors are contiguous."""
    rows, q_heads, features = out.shape
    blocks, heads = k_cache.shape[:2]
    if rows == 0:
        return
    with torch.cuda.device_of(q):
        rope_kernel[(rows * (q_heads + heads),)](
            q,
            k,
            v,
            cos,
            sin,
            q_weight,
            k_weight,
            out,
            k_cache,
            v_cache,
            slot,
            eps,
            blocks * BLOCK.value,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            q_heads=q_heads,
            heads=heads,
            D=features,
            R=cos.shape[1],
            UNIT_OFFSET=unit_offset,
            BLOCK_D=triton.next_power_of_2(features),
            num_warps=1,
            debug=True,  # keeps the device assertion
            sanitize_overflow=False,
        )


def gated_activation(gate: Tensor, up: Tensor, gelu: bool, out: Tensor) -> None:
    """Rows may be strided."""
    rows, columns = gate.shape
    if gate.numel() == 0:
        return
    block = min(COLUMNS, triton.next_power_of_2(columns))
    with torch.cuda.device_of(gate):
        gated_kernel[(rows * triton.cdiv(columns, block),)](
            gate,
            up,
            out,
            gate.stride(0),
            up.stride(0),
            columns=columns,
            GELU=gelu,
            BLOCK=block,
            num_warps=warps(block),
        )
