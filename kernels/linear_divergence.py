"""Divergence of two heads from tiles of their logits that exist in registers only: `divergence_stats` in Triton.

All passes compute both tiles by the same instructions, so that their logits agree with the log-sum-exps of the first
pass.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashpo.kernels.linear_logprob import (
    SPLIT,
    TILES_16_BIT,
    TRITON_DTYPES,
    gradients,
    logits_tile,
    plan,
    shared_memory,
    tiles,
    transform,
    unit,
)
from flashpo.kernels.token_stats import ENTROPY, LN2, LOG2E, LOG_Z, LOG_Z_REST, LOWEST, fold, log2_prob
from flashpo.ops import divergence_stats as stats
from flashpo.ops._check import check_range

FORWARD, REVERSE, MIXTURE = (tl.constexpr(mode) for mode in range(3))


@triton.jit
def both_tiles(
    s_hidden,
    s_weight,
    s_bias,
    t_hidden,
    t_weight,
    t_bias,
    n,
    v,
    J,
    s_H,
    t_H,
    s_stride_h,
    s_stride_w,
    t_stride_h,
    t_stride_w,
    s_logit_scale,
    s_softcap,
    t_logit_scale,
    t_softcap,
    S_DTYPE: tl.constexpr,
    T_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """(the student's logits before temperature, their derivative, the teacher's logits); -inf past the last column."""
    x_s = logits_tile(s_hidden, s_weight, n, v, J, s_H, s_stride_h, s_stride_w, S_DTYPE, BLOCK_N, BLOCK_V, BLOCK_H)
    x_t = logits_tile(t_hidden, t_weight, n, v, J, t_H, t_stride_h, t_stride_w, T_DTYPE, BLOCK_N, BLOCK_V, BLOCK_H)
    z_s, slope = transform(x_s, s_bias, v, J, s_logit_scale, s_softcap)
    z_t, _ = transform(x_t, t_bias, v, J, t_logit_scale, t_softcap)
    inside = v[None, :] < J
    return tl.where(inside, z_s, float("-inf")), slope, tl.where(inside, z_t, float("-inf"))


@triton.jit
def gap_of_tile(gap, forbidden, own, top_own, total_own, other, top_other, bits):
    """Add a tile to the sums GAP and FORBIDDEN (N,). `top_...` and `total_own` are those before this tile."""
    base_own = tl.maximum(tl.maximum(top_own, tl.max(own, 1)), LOWEST)
    base_other = tl.maximum(tl.maximum(top_other, tl.max(other, 1)), LOWEST)
    shift = tl.maximum((top_own - base_own) * bits, LOWEST)
    moved = shift - tl.maximum((top_other - base_other) * bits, LOWEST)
    y = tl.maximum((own - base_own[:, None]) * bits[:, None], LOWEST)
    y_other = tl.maximum((other - base_other[:, None]) * bits[:, None], LOWEST)
    gap = (gap + moved * total_own) * tl.exp2(shift) + tl.sum(tl.exp2(y) * (y - y_other), 1)
    missing = (other == float("-inf")) & (own > float("-inf"))
    return gap, forbidden + tl.sum(missing.to(tl.float32), 1)


@triton.jit
def keep_top(top, at, x, v):
    """The largest logit so far and its index (the first of several that tie)."""
    highest = tl.max(x, 1)
    first = tl.min(tl.where(x == highest[:, None], v[None, :], 2147483647), 1).to(tl.float32)
    return tl.maximum(top, highest), tl.where(highest > top, first, at)


@triton.jit
def mixture_over_student(log2_s, log2_t, beta, rest):
    """(log M - log p of the student, log M - log p of the teacher) in nats, from bits; rest = 1 - beta."""
    d = tl.minimum(tl.maximum(log2_t - log2_s, -126.0), 126.0)
    e = tl.exp2(-tl.abs(d))  # the ratio of the smaller probability to the larger one
    small, large = tl.where(d < 0, beta, rest), tl.where(d < 0, rest, beta)
    over_larger = tl.log(tl.where(e < 0.5, large + small * e, 1.0 + small * (e - 1.0)))
    return over_larger + tl.maximum(d, 0.0) * LN2, over_larger - tl.minimum(d, 0.0) * LN2


@triton.jit(do_not_specialize=["N", "J", "vocab_start"], do_not_specialize_on_alignment=["target"])
def partial_kernel(
    s_hidden,  # (N, H)
    s_weight,  # (J, H)
    s_bias,  # (J,) or None
    t_hidden,
    t_weight,
    t_bias,
    target,  # (N,)
    order,  # (N,): indices of the tokens, live ones first
    live,  # (): the number of live tokens
    out,  # (splits, 10 or 14, N)
    N,
    J,
    s_H,
    t_H,
    s_stride_h,
    s_stride_w,
    t_stride_h,
    t_stride_w,
    temperature,
    s_logit_scale,
    s_softcap,
    t_logit_scale,
    t_softcap,
    vocab_start,
    MODE: tl.constexpr,
    TOP1: tl.constexpr,
    SPLIT: tl.constexpr,
    S_DTYPE: tl.constexpr,
    T_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    count = tl.load(live)
    if tl.program_id(0) * BLOCK_N >= count:
        return
    n = tl.load(order + i, mask=i < count, other=0)
    own = tl.load(target + n) - vocab_start
    bits = tl.full((BLOCK_N,), LOG2E, tl.float32) / temperature
    zero = tl.zeros((BLOCK_N,), tl.float32)
    s_top = zero + float("-inf")
    t_top, s_target, t_target, s_best, t_best = s_top, s_top, s_top, s_top, s_top
    s_total, s_weighted, t_total, t_weighted, gap, forbidden, s_at, t_at = (
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
    )
    for start in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, J), BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z_s, _, z_t = both_tiles(
            s_hidden, s_weight, s_bias, t_hidden, t_weight, t_bias, n, v, J, s_H, t_H, s_stride_h, s_stride_w,
            t_stride_h, t_stride_w, s_logit_scale, s_softcap, t_logit_scale, t_softcap,
            S_DTYPE, T_DTYPE, BLOCK_N, BLOCK_V, BLOCK_H,
        )  # fmt: skip
        hit = v[None, :] == own[:, None]
        s_target = tl.maximum(s_target, tl.max(tl.where(hit, z_s, float("-inf")), 1))
        t_target = tl.maximum(t_target, tl.max(tl.where(hit, z_t, float("-inf")), 1))
        if MODE == FORWARD:
            gap, forbidden = gap_of_tile(gap, forbidden, z_t, t_top, t_total, z_s, s_top, bits)
        if MODE == REVERSE:
            gap, forbidden = gap_of_tile(gap, forbidden, z_s, s_top, s_total, z_t, t_top, bits)
        if TOP1:
            s_best, s_at = keep_top(s_best, s_at, z_s, v)
            t_best, t_at = keep_top(t_best, t_at, z_t, v)
        s_top, s_total, s_weighted, _, _, _ = fold(
            s_top, s_total, s_weighted, zero, zero, zero, z_s, bits, v, own, J, False
        )
        t_top, t_total, t_weighted, _, _, _ = fold(
            t_top, t_total, t_weighted, zero, zero, zero, z_t, bits, v, own, J, False
        )
    R: tl.constexpr = 14 if TOP1 else 10
    N = N.to(tl.int64)
    at = out + (split * R).to(tl.int64) * N + n
    s_base, t_base = tl.maximum(s_top, LOWEST), tl.maximum(t_top, LOWEST)
    kept = i < count
    tl.store(at, s_top * bits, mask=kept)
    tl.store(at + N, s_total, mask=kept)
    tl.store(at + 2 * N, s_weighted, mask=kept)
    tl.store(at + 3 * N, (s_target - s_base) * bits, mask=kept)
    tl.store(at + 4 * N, t_top * bits, mask=kept)
    tl.store(at + 5 * N, t_total, mask=kept)
    tl.store(at + 6 * N, t_weighted, mask=kept)
    tl.store(at + 7 * N, (t_target - t_base) * bits, mask=kept)
    tl.store(at + 8 * N, gap, mask=kept)
    tl.store(at + 9 * N, forbidden, mask=kept)
    if TOP1:
        tl.store(at + 10 * N, (s_best - s_base) * bits, mask=kept)
        tl.store(at + 11 * N, s_at + vocab_start, mask=kept)
        tl.store(at + 12 * N, (t_best - t_base) * bits, mask=kept)
        tl.store(at + 13 * N, t_at + vocab_start, mask=kept)


@triton.jit(do_not_specialize=["N", "J"])
def mixture_kernel(
    s_hidden,
    s_weight,
    s_bias,
    t_hidden,
    t_weight,
    t_bias,
    order,
    live,
    s_rows,  # (4, N): from merge_partials
    t_rows,
    out,  # (splits, 2, N): JSD and KL_STUDENT
    N,
    J,
    s_H,
    t_H,
    s_stride_h,
    s_stride_w,
    t_stride_h,
    t_stride_w,
    temperature,
    s_logit_scale,
    s_softcap,
    t_logit_scale,
    t_softcap,
    beta,
    rest,
    SPLIT: tl.constexpr,
    S_DTYPE: tl.constexpr,
    T_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    count = tl.load(live)
    if tl.program_id(0) * BLOCK_N >= count:
        return
    n = tl.load(order + i, mask=i < count, other=0)
    bits = tl.full((BLOCK_N, 1), LOG2E, tl.float32) / temperature
    N = N.to(tl.int64)
    s_z, s_rest = tl.load(s_rows + N * LOG_Z + n)[:, None], tl.load(s_rows + N * LOG_Z_REST + n)[:, None]
    t_z, t_rest = tl.load(t_rows + N * LOG_Z + n)[:, None], tl.load(t_rows + N * LOG_Z_REST + n)[:, None]
    jsd = tl.zeros((BLOCK_N,), tl.float32)
    kl = jsd
    for start in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, J), BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z_s, _, z_t = both_tiles(
            s_hidden, s_weight, s_bias, t_hidden, t_weight, t_bias, n, v, J, s_H, t_H, s_stride_h, s_stride_w,
            t_stride_h, t_stride_w, s_logit_scale, s_softcap, t_logit_scale, t_softcap,
            S_DTYPE, T_DTYPE, BLOCK_N, BLOCK_V, BLOCK_H,
        )  # fmt: skip
        log2_s, log2_t = log2_prob(z_s, bits, s_z, s_rest), log2_prob(z_t, bits, t_z, t_rest)
        over_s, over_t = mixture_over_student(log2_s, log2_t, beta, rest)
        of_student = tl.exp2(log2_s) * over_s
        jsd -= tl.sum(beta * tl.exp2(log2_t) * over_t + rest * of_student, 1)
        kl -= tl.sum(of_student, 1)
    at = out + split.to(tl.int64) * 2 * N + n
    tl.store(at, jsd, mask=i < count)
    tl.store(at + N, kl, mask=i < count)


@triton.jit(
    do_not_specialize=["N", "start", "stop", "vocab_start"],
    do_not_specialize_on_alignment=["target", "kl", "d_divergence", "d_entropy", "d_logprob"],
)
def d_logits_kernel(
    s_hidden,
    s_weight,
    s_bias,
    t_hidden,
    t_weight,
    t_bias,
    target,
    order,
    live,
    s_rows,
    t_rows,
    kl,  # (N,)
    d_divergence,  # (N,) or None
    d_entropy,  # (N,) or None
    d_logprob,  # (N,) or None
    out,  # (N, whole tiles): d (hidden weight^T) of the student's columns start ... stop - 1
    N,
    start,
    stop,
    s_H,
    t_H,
    s_stride_h,
    s_stride_w,
    t_stride_h,
    t_stride_w,
    stride_out,
    temperature,
    s_logit_scale,
    s_softcap,
    t_logit_scale,
    t_softcap,
    beta,
    rest,
    vocab_start,
    MODE: tl.constexpr,
    S_DTYPE: tl.constexpr,
    T_DTYPE: tl.constexpr,
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
    z_s, slope, z_t = both_tiles(
        s_hidden, s_weight, s_bias, t_hidden, t_weight, t_bias, n, v, stop, s_H, t_H, s_stride_h, s_stride_w,
        t_stride_h, t_stride_w, s_logit_scale, s_softcap, t_logit_scale, t_softcap,
        S_DTYPE, T_DTYPE, BLOCK_N, BLOCK_V, BLOCK_H,
    )  # fmt: skip
    cold = tl.full((BLOCK_N, 1), 1.0, tl.float32) / temperature
    N = N.to(tl.int64)
    s_z, s_rest = tl.load(s_rows + N * LOG_Z + n)[:, None], tl.load(s_rows + N * LOG_Z_REST + n)[:, None]
    t_z, t_rest = tl.load(t_rows + N * LOG_Z + n)[:, None], tl.load(t_rows + N * LOG_Z_REST + n)[:, None]
    log2_s = log2_prob(z_s, cold * LOG2E, s_z, s_rest)
    log2_t = log2_prob(z_t, cold * LOG2E, t_z, t_rest)
    p = tl.exp2(log2_s)
    d = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    if d_divergence is not None:
        upstream = tl.load(d_divergence + n)
        # An infinite KL would give NaN even where its gradient is 0
        used = tl.where(upstream == 0, 0.0, tl.load(kl + n))[:, None]
        if MODE == FORWARD:
            of_z = p - tl.exp2(log2_t)
        if MODE == REVERSE:
            of_z = p * ((log2_s - log2_t) * LN2 - used)
        if MODE == MIXTURE:
            over_s, _ = mixture_over_student(log2_s, log2_t, beta, rest)
            of_z = -rest * p * (over_s + used)
        d += upstream[:, None] * of_z
    if d_entropy is not None:
        d -= tl.load(d_entropy + n)[:, None] * p * (log2_s * LN2 + tl.load(s_rows + N * ENTROPY + n)[:, None])
    if d_logprob is not None:
        own = tl.load(target + n) - vocab_start
        d += tl.load(d_logprob + n)[:, None] * ((v[None, :] == own[:, None]).to(tl.float32) - p)
    d *= slope * cold
    tl.store(out + n[:, None] * stride_out + column[None, :], d.to(out.dtype.element_ty), mask=i[:, None] < count)


def tiles_of_two(dtypes, limit: int, stored: int) -> tuple[int, int, int, int, int]:
    """The best tile for a program that holds two: one of `tiles`, but at most half as wide as the widest."""
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    tile = tiles(widest, limit, stored)
    return tiles(widest, limit // 2, stored) if tile == TILES_16_BIT[0] else tile


def mode_of(beta: float) -> int:
    return 0 if beta == 0 else 1 if beta == 1 else 2


class Launch:
    """What all kernels of one call share."""

    def __init__(self, heads):
        student, teacher = (
            head._replace(**{x: unit(getattr(head, x)) for x in head._fields[:3]}) for head in heads[:2]
        )
        self.student, self.target = student, unit(heads.target)
        dtypes = student.dtype, teacher.dtype
        stored = max(x.itemsize for x in (*student[:2], *teacher[:2], *dtypes))
        limit = shared_memory(student.hidden.device)
        self.order, self.live, _ = plan(student.hidden, student.weight, self.target, heads.ignore_index, student.dtype)
        block_n, block_v, block_h, stages, warps = tiles_of_two(dtypes, limit, stored)
        self.N, self.J, self.block_v = len(student.hidden), len(student.weight), block_v
        self.blocks = triton.cdiv(self.N, block_n)
        self.tensors = *student[:3], *teacher[:3]
        self.shapes = (
            student.hidden.shape[1],
            teacher.hidden.shape[1],
            student.hidden.stride(0),
            student.weight.stride(0),
            teacher.hidden.stride(0),
            teacher.weight.stride(0),
        )
        self.transforms = (
            heads.temperature,
            student.logit_scale,
            student.softcap,
            teacher.logit_scale,
            teacher.softcap,
        )
        self.tile = {
            "S_DTYPE": TRITON_DTYPES[dtypes[0]],
            "T_DTYPE": TRITON_DTYPES[dtypes[1]],
            "BLOCK_N": block_n,
            "BLOCK_V": block_v,
            "BLOCK_H": block_h,
            "num_stages": stages,
            "num_warps": warps,
        }


def partial(heads, vocab: int, top1: bool) -> Tensor:
    check_range("target", heads.target, vocab, heads.ignore_index)
    launch = Launch(heads)
    splits = triton.cdiv(launch.J, SPLIT)
    parts = heads.target.new_empty((splits, stats.partial_rows(top1), launch.N), dtype=torch.float32)
    if launch.N == 0:
        return parts[0]
    with torch.cuda.device_of(heads.target):
        partial_kernel[(launch.blocks, splits)](
            *launch.tensors,
            launch.target,
            launch.order,
            launch.live,
            parts,
            launch.N,
            launch.J,
            *launch.shapes,
            *launch.transforms,
            heads.start,
            MODE=mode_of(heads.beta),
            TOP1=top1,
            SPLIT=SPLIT,
            **launch.tile,
        )
    whole = stats.join(parts, heads.beta)
    return whole.where(launch.target != heads.ignore_index, stats.neutral_partial(top1, launch.N, whole))


def mixture(heads, student_rows: Tensor, teacher_rows: Tensor) -> Tensor:
    launch = Launch(heads)
    splits = triton.cdiv(launch.J, SPLIT)
    parts = student_rows.new_empty((splits, 2, launch.N))
    if launch.N > 0:
        with torch.cuda.device_of(heads.target):
            mixture_kernel[(launch.blocks, splits)](
                *launch.tensors,
                launch.order,
                launch.live,
                student_rows.contiguous(),
                teacher_rows.contiguous(),
                parts,
                launch.N,
                launch.J,
                *launch.shapes,
                *launch.transforms,
                heads.beta,
                1 - heads.beta,
                SPLIT=SPLIT,
                **launch.tile,
            )
    return parts.sum(0).where(launch.target != heads.ignore_index, 0.0)


def backward(heads, student_rows, teacher_rows, kl, d_divergence, d_entropy, d_logprob, *wanted):
    launch = Launch(heads)
    rows = student_rows.contiguous(), teacher_rows.contiguous()
    upstream = [unit(x) for x in (kl, d_divergence, d_entropy, d_logprob)]

    def d_logits(dx: Tensor, start: int, stop: int) -> None:
        d_logits_kernel[(launch.blocks, triton.cdiv(stop - start, launch.block_v))](
            *launch.tensors,
            launch.target,
            launch.order,
            launch.live,
            *rows,
            *upstream,
            dx,
            launch.N,
            start,
            stop,
            *launch.shapes,
            dx.stride(0),
            *launch.transforms,
            heads.beta,
            1 - heads.beta,
            heads.start,
            MODE=mode_of(heads.beta),
            **launch.tile,
        )

    student, ignored = launch.student, launch.target == heads.ignore_index
    return gradients(
        d_logits, student.hidden, student.weight, student.bias, ignored, student.dtype, launch.block_v, *wanted
    )
