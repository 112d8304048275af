"""Log-probs of the LM head from tiles of logits that exist in registers only, and gradients from tiles of d logits.

Both passes compute a tile by the same instructions, so that backward's logits agree with forward's log-sum-exp.
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashpo.kernels.token_stats import (
    ENTROPY,
    LN2,
    LOG2E,
    LOG_Z,
    LOG_Z_REST,
    LOWEST,
    fold,
    join,
    log2_prob,
    store_partial,
)
from flashpo.ops._check import check_range
from flashpo.ops._product import add_product, product

# The number of vocabulary columns that a program folds. It is a constant, so that the order in which a token's logits
# are added up depends on nothing. It gives enough parts to fill a GPU even with a single tile of tokens.
SPLIT = 1024
CHUNK_BYTES = 2**28  # bytes of d logits that backward holds at a time

# (BLOCK_N, BLOCK_V, BLOCK_H, stages, warps), best first. fp32 does not use tensor cores and is limited by registers.
TILES_16_BIT = (
    (128, 256, 64, 4, 8),
    (128, 128, 64, 4, 8),
    (128, 128, 64, 3, 8),
    (128, 128, 32, 3, 8),
    (64, 128, 32, 2, 4),
)
TILES_32_BIT = ((64, 64, 16, 3, 8),)
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def tiles(dtype: torch.dtype, shared_memory: int, stored: int | None = None) -> tuple[int, int, int, int, int]:
    """The best tile whose stages fit into shared memory, where operands take `stored` bytes per element."""
    table = TILES_32_BIT if dtype == torch.float32 else TILES_16_BIT
    for tile in table:
        block_n, block_v, block_h, stages, _ = tile
        if stages * (block_n + block_v) * block_h * (stored or dtype.itemsize) <= shared_memory - 1024:
            return tile
    raise ValueError(f"no tile of {dtype} fits in {shared_memory} bytes of shared memory")


@functools.cache
def shared_memory(device: torch.device) -> int:
    if device.type == "cpu":  # Triton's interpreter
        return 99 * 1024
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


@triton.jit
def logits_tile(
    hidden,
    weight,
    n,
    v,
    J,
    H,
    stride_h,
    stride_w,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """hidden[n] weight[v]^T in fp32. Columns past the last one repeat it."""
    k = tl.arange(0, BLOCK_H)
    a_at = hidden + n[:, None] * stride_h + k[None, :]
    b_at = weight + tl.minimum(v, J - 1).to(tl.int64)[None, :] * stride_w + k[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, H, BLOCK_H):
        a = tl.load(a_at, mask=k[None, :] < H - start, other=0.0).to(DTYPE)
        b = tl.load(b_at, mask=k[:, None] < H - start, other=0.0).to(DTYPE)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        a_at += BLOCK_H
        b_at += BLOCK_H
    return acc


@triton.jit
def transform(x, bias, v, J, logit_scale, softcap):
    """(the logits before temperature, their derivative by hidden weight^T)."""
    if bias is not None:
        x += tl.load(bias + v, mask=v < J, other=0.0).to(tl.float32)[None, :]
    x *= logit_scale
    slope = tl.full(x.shape, 1.0, tl.float32) * logit_scale
    if softcap is not None:
        t = tl.exp2(tl.abs(x) * (-2 * LOG2E / softcap))
        tanh = (1 - t) / (1 + t)
        x = tl.where(x < 0, -softcap, softcap) * tanh
        slope *= 1 - tanh * tanh
    return x, slope


@triton.jit
def inverse_temperature(token_temperature, temperature, n):
    if token_temperature is not None:
        return 1.0 / tl.load(token_temperature + n).to(tl.float32)
    return tl.full(n.shape, 1.0, tl.float32) / temperature


# Per-token arguments may be rows of one tensor, whose alignment varies with their length.
@triton.jit(
    do_not_specialize=["N", "J", "vocab_start"],
    do_not_specialize_on_alignment=["target", "token_temperature"],
)
def partial_kernel(
    hidden,  # (N, H)
    weight,  # (J, H)
    target,  # (N,)
    bias,  # (J,) or None
    token_temperature,  # (N,) or None
    order,  # (N,): indices of the tokens, live ones first
    live,  # (): the number of live tokens
    out,  # (splits, 4 or 8, N)
    N,
    J,
    H,
    stride_h,
    stride_w,
    temperature,
    logit_scale,
    softcap,
    vocab_start,
    SIDE: tl.constexpr,
    DTYPE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    count = tl.load(live)
    if tl.program_id(0) * BLOCK_N >= count:
        return
    n = tl.load(order + i, mask=i < count, other=0)  # a token past the last is computed but not stored
    own = tl.load(target + n) - vocab_start
    bits = inverse_temperature(token_temperature, temperature, n) * LOG2E
    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    weighted, sq_sum, y_sum, z_target, before = total, total, total, top, top
    for start in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, J), BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        x = logits_tile(hidden, weight, n, v, J, H, stride_h, stride_w, DTYPE, BLOCK_N, BLOCK_V, BLOCK_H)
        z, _ = transform(x, bias, v, J, logit_scale, softcap)
        z = tl.where(v[None, :] < J, z, float("-inf"))
        z_target = tl.maximum(z_target, tl.max(tl.where(v[None, :] == own[:, None], z, float("-inf")), 1))
        top, total, weighted, sq_sum, y_sum, before = fold(
            top, total, weighted, sq_sum, y_sum, before, z, bits, v, own, J, SIDE
        )
    R: tl.constexpr = 8 if SIDE else 4
    N = N.to(tl.int64)
    part = out + (split * R).to(tl.int64) * N
    base = tl.maximum(top, LOWEST)
    y_target, before, relative = (z_target - base) * bits, (before - base) * bits, (top - base) * bits
    store_partial(part, n, i < count, N, top * bits, total, weighted, y_target, sq_sum, y_sum, before, relative, SIDE)


@triton.jit(do_not_specialize=["N", "S", "ignore_index"], do_not_specialize_on_alignment=["target"])
def join_kernel(partials, target, out, N, S, ignore_index, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Join the parts (S, R, N). Ignored tokens, which no program wrote, become 0, 1, 0, 0, 1, 0, 0, 0."""
    N = N.to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    alive = inside & (tl.load(target + n, mask=inside, other=0) != ignore_index)
    ref, total, weighted, y_target, sq_sum, y_sum, before, top = join(partials, n, alive, N, S, SIDE)
    store_partial(
        out,
        n,
        inside,
        N,
        tl.where(alive, ref, 0.0),
        tl.where(alive, total, 1.0),
        tl.where(alive, weighted, 0.0),
        tl.where(alive, y_target, 0.0),
        tl.where(alive, sq_sum, 1.0),
        tl.where(alive, y_sum, 0.0),
        tl.where(alive, before, 0.0),
        tl.where(alive, top, 0.0),
        SIDE,
    )


@triton.jit(
    do_not_specialize=["N", "start", "stop", "vocab_start"],
    do_not_specialize_on_alignment=["target", "token_temperature", "d_logprob", "d_entropy"],
)
def d_logits_kernel(
    hidden,
    weight,
    target,
    bias,
    token_temperature,
    order,
    live,
    rows,  # (4 or 7, N): from merge_partials
    d_logprob,  # (N,) or None
    d_entropy,  # (N,) or None
    out,  # (N, whole tiles): d (hidden weight^T) of the columns start ... stop - 1; beyond them anything
    N,
    start,
    stop,
    H,
    stride_h,
    stride_w,
    stride_out,
    temperature,
    logit_scale,
    softcap,
    vocab_start,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    count = tl.load(live)
    if tl.program_id(0) * BLOCK_N >= count:
        return
    n = tl.load(order + i, mask=i < count, other=0)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    v = start + column
    x = logits_tile(hidden, weight, n, v, stop, H, stride_h, stride_w, DTYPE, BLOCK_N, BLOCK_V, BLOCK_H)
    z, slope = transform(x, bias, v, stop, logit_scale, softcap)
    cold = inverse_temperature(token_temperature, temperature, n)
    at = rows + n
    N = N.to(tl.int64)
    log_z, log_z_rest = tl.load(at + N * LOG_Z)[:, None], tl.load(at + N * LOG_Z_REST)[:, None]
    logp = log2_prob(z, (cold * LOG2E)[:, None], log_z, log_z_rest)
    p = tl.exp2(logp)
    d = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    if d_logprob is not None:
        own = tl.load(target + n) - vocab_start
        d += tl.load(d_logprob + n)[:, None] * ((v[None, :] == own[:, None]).to(tl.float32) - p)
    if d_entropy is not None:
        d -= tl.load(d_entropy + n)[:, None] * p * (logp * LN2 + tl.load(at + N * ENTROPY)[:, None])
    d *= slope * cold[:, None]
    # Whole tiles are stored: a mask for the columns, whose number may be odd, would prevent 16-byte stores.
    tl.store(out + n[:, None] * stride_out + column[None, :], d.to(out.dtype.element_ty), mask=i[:, None] < count)


def plan(hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int, dtype: torch.dtype):
    """What both passes need: the order of tokens (live ones first) and the number of live ones, on the device; the
    tile."""
    ignored = target == ignore_index
    order = ignored.to(torch.uint8).argsort(stable=True)
    live = (~ignored).sum()
    block_n, block_v, block_h, stages, warps = tiles(
        dtype, shared_memory(hidden.device), max(hidden.itemsize, weight.itemsize, dtype.itemsize)
    )
    tile = {
        "DTYPE": TRITON_DTYPES[dtype],
        "BLOCK_N": block_n,
        "BLOCK_V": block_v,
        "BLOCK_H": block_h,
        "num_stages": stages,
        "num_warps": warps,
    }
    return order, live, tile


def unit(x):
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def partial(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    token_temperature: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    vocab_start: int,
    vocab: int,
    side: bool,
    dtype: torch.dtype,
) -> Tensor:
    check_range("target", target, vocab, ignore_index)
    (N, H), J, R = hidden.shape, len(weight), 8 if side else 4
    out = hidden.new_empty((R, N), dtype=torch.float32)
    if N == 0:
        return out
    hidden, weight, target, bias, token_temperature = map(unit, (hidden, weight, target, bias, token_temperature))
    order, live, tile = plan(hidden, weight, target, ignore_index, dtype)
    splits = triton.cdiv(J, SPLIT)
    parts = hidden.new_empty((splits, R, N), dtype=torch.float32)
    with torch.cuda.device_of(hidden):
        partial_kernel[(triton.cdiv(N, tile["BLOCK_N"]), splits)](
            hidden,
            weight,
            target,
            bias,
            token_temperature,
            order,
            live,
            parts,
            N,
            J,
            H,
            hidden.stride(0),
            weight.stride(0),
            temperature,
            logit_scale,
            softcap,
            vocab_start,
            SIDE=side,
            SPLIT=SPLIT,
            **tile,
        )
        join_kernel[(triton.cdiv(N, 128),)](parts, target, out, N, splits, ignore_index, SIDE=side, BLOCK=128)
    return out


def backward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    token_temperature: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    vocab_start: int,
    dtype: torch.dtype,
    rows: Tensor,
    d_logprob: Tensor | None,
    d_entropy: Tensor | None,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, target, bias, token_temperature, d_logprob, d_entropy = map(
        unit, (hidden, weight, target, bias, token_temperature, d_logprob, d_entropy)
    )
    rows = rows.contiguous()
    order, live, tile = plan(hidden, weight, target, ignore_index, dtype)
    (N, H), block_n, block_v = hidden.shape, tile["BLOCK_N"], tile["BLOCK_V"]

    def d_logits(dx: Tensor, start: int, stop: int) -> None:
        d_logits_kernel[(triton.cdiv(N, block_n), triton.cdiv(stop - start, block_v))](
            hidden,
            weight,
            target,
            bias,
            token_temperature,
            order,
            live,
            rows,
            d_logprob,
            d_entropy,
            dx,
            N,
            start,
            stop,
            H,
            hidden.stride(0),
            weight.stride(0),
            dx.stride(0),
            temperature,
            logit_scale,
            softcap,
            vocab_start,
            **tile,
        )

    ignored = target == ignore_index
    return gradients(d_logits, hidden, weight, bias, ignored, dtype, block_v, want_hidden, want_weight, want_bias)


def gradients(
    d_logits: Callable[[Tensor, int, int], None],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ignored: Tensor,
    dtype: torch.dtype,
    block_v: int,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a few thousand columns of d logits at a time, and add their share of the gradients by GEMMs with fp32
    output.

    `d_logits(out, start, stop)` writes those of the vocabulary entries start ... stop - 1, in whole tiles of block_v.
    """
    (N, H), J = hidden.shape, len(weight)
    d_hidden = hidden.new_zeros((N, H) if want_hidden else 0, dtype=torch.float32)
    d_weight = torch.empty_like(weight) if want_weight else hidden.new_empty(0)
    d_bias = torch.empty_like(bias) if bias is not None and want_bias else hidden.new_empty(0)
    if N == 0 or not (want_hidden or want_weight or want_bias):
        return d_hidden.to(hidden.dtype), d_weight.zero_(), d_bias.zero_()
    chunk = min(J, max(1024, min(8192, CHUNK_BYTES // (N * dtype.itemsize) // 256 * 256)))
    dx = hidden.new_zeros((N, triton.cdiv(chunk, block_v) * block_v), dtype=dtype)  # the rows of ignored tokens stay 0
    if want_weight:  # the hidden states of ignored tokens may be anything, even inf
        operand = hidden.to(dtype).masked_fill(ignored[:, None], 0.0)
    for start in range(0, J, chunk):
        stop = min(start + chunk, J)
        part, head = dx[:, : stop - start], slice(start, stop)
        with torch.cuda.device_of(hidden):
            d_logits(dx, start, stop)
        if want_hidden:
            _add_mm(d_hidden, part, weight[head].to(dtype))
        if want_weight:
            d_weight[head] = _mm(part.t(), operand)
        if want_bias:
            d_bias[head] = part.sum(0, dtype=torch.float32)
    return d_hidden.to(hidden.dtype), d_weight, d_bias


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """a b with fp32 output. By default cuBLAS may add up parts of a 16-bit product in 16 bits."""
    if a.is_cuda:
        return a @ b if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)
    return product(a.float(), b.float())


def _add_mm(acc: Tensor, a: Tensor, b: Tensor) -> None:
    if not a.is_cuda:
        add_product(acc, a.float(), b.float())
    elif a.dtype == torch.float32:
        acc.addmm_(a, b)
    else:
        torch.addmm(acc, a, b, out_dtype=torch.float32, out=acc)
