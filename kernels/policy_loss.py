"""Policy losses of ragged sequences in one launch, and their gradient in another: `flashpo.ops.policy_loss` in Triton.

A program takes a sequence. If no gradient depends on the whole sequence, it takes a part of one. Each program stores a
row of partial statistics; the last program to finish adds up the rows in order and computes the loss. The gradients
that programs store lack the factors that are known only then; these are returned as `factors`.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashpo.kernels.policy_rows import (
    BINS,
    COLUMNS,
    POLICY_LOSS,
    SEQUENCES,
    SUMS,
    WIDTH,
    bin_column,
    finish,
    stack,
)
from flashpo.kernels.policy_terms import (
    SATURATION,
    VESPO_LOG_MAX,
    VESPO_LOG_MIN,
    Numbers,
    clamp,
    exp,
    gmpo_gain,
    importance_weight,
    kl_estimate,
    load_live,
    load_spread,
    load_tokens,
    surrogate,
    vespo_phi,
)
from flashpo.ops.loss_spec import LossSpec
from flashpo.ops.policy_stats import NAMES


@triton.jit(
    do_not_specialize=["N", "S", "PARTS"],
    do_not_specialize_on_alignment=[
        "logprob", "old_logprob", "advantage", "mask", "cu_seqlens", "ref_logprob", "rollout_logprob",
        "importance_ratio", "entropy", "entropy_threshold", "num_items", "loss_out", "stats", "grads", "factors",
        "partials", "arrived",
    ],
)  # fmt: skip
def forward_kernel(
    logprob,  # (N,), like the following unless noted; None if not given
    old_logprob,
    advantage,  # (N,) or (S,)
    mask,
    cu_seqlens,  # (S + 1,)
    ref_logprob,
    rollout_logprob,
    importance_ratio,  # (N,) or (S,)
    entropy,
    entropy_threshold,  # (1,)
    num_items,  # (1,)
    loss_out,  # (1,)
    stats,  # (COLUMNS,)
    grads,  # (1 or 2, N)
    factors,  # (1 or 2,)
    partials,  # (S PARTS, WIDTH)
    arrived,  # (1,): the number of programs that have finished; reset to 0 by the last one
    numbers,
    N,
    S,
    PARTS,
    RATIO: tl.constexpr,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,  # "none": there is no KL
    KL_RATIO_CORRECTION: tl.constexpr,
    IMPORTANCE: tl.constexpr,
    AGGREGATION: tl.constexpr,
    EMPTY_SEQUENCES: tl.constexpr,
    ENTROPY_MEAN: tl.constexpr,  # "none": there is no bonus
    ADVANTAGE_OF_SEQUENCE: tl.constexpr,
    IMPORTANCE_OF_SEQUENCE: tl.constexpr,
    CHAIN: tl.constexpr,  # whether the gradient of the ratio goes through the whole sequence
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,  # tokens at a time in the first pass, which holds fewer values per token
):
    SEQUENCE_RATIO: tl.constexpr = RATIO == "sequence" or RATIO == "sequence_sum"
    PER_SEQUENCE: tl.constexpr = SEQUENCE_RATIO and ADVANTAGE_OF_SEQUENCE and SURROGATE != "gmpo"
    WEIGHTED: tl.constexpr = importance_ratio is not None or IMPORTANCE != "none"
    RHO_SUMS: tl.constexpr = (IMPORTANCE_OF_SEQUENCE and importance_ratio is None) or IMPORTANCE == "geometric_mask"
    FIRST_PASS: tl.constexpr = (
        RATIO != "token"
        or SURROGATE == "vespo"
        or AGGREGATION == "sequence_mean"
        or IMPORTANCE_OF_SEQUENCE
        or RHO_SUMS
        or numbers.off_policy_threshold is not None
    )
    program = tl.program_id(0).to(tl.int64)
    s, part = program // PARTS, program % PARTS
    exists = s < S  # false for the one program of a batch without sequences
    start = tl.load(cu_seqlens + s, mask=exists, other=0)
    end = tl.load(cu_seqlens + s + 1, mask=exists, other=0)

    # 1. What the tokens need to know about their whole sequence
    n, kept_at_least_1, log_w_of_sequence, log_weight, rho_total, behind = 1.0, 1.0, 0.0, 0.0, 0.0, 0.0
    if FIRST_PASS:
        zeros = tl.zeros((WIDE,), tl.float32)
        n_sum, kept_sum, d_sum, weight_sum, rho_sum, behind_sum = zeros, zeros, zeros, zeros, zeros, zeros
        for first in range(start, end, WIDE):
            at = first + tl.arange(0, WIDE)
            t = load_tokens(
                logprob, old_logprob, advantage, mask, rollout_logprob, entropy, entropy_threshold, at, at < end, s,
                ADVANTAGE_OF_SEQUENCE,
            )  # fmt: skip
            n_sum += t.live.to(tl.float32)
            if SURROGATE == "gmpo":
                kept_sum += t.kept.to(tl.float32)
                d_sum += tl.where(t.kept, gmpo_gain(t.d, t.advantage, numbers), 0.0)
            elif RATIO != "token":
                d_sum += t.d
            if SURROGATE == "vespo":
                weight_sum += clamp(t.d, -20.0, 20.0)
                if importance_ratio is not None:
                    rho = load_spread(importance_ratio, at, t.live, s, IMPORTANCE_OF_SEQUENCE)
                    log_rho = tl.log(tl.maximum(rho, 1e-8))
                elif IMPORTANCE != "none":
                    rho = importance_weight(t.log_rho, 0.0, 0.0, numbers, IMPORTANCE)
                    # Then log_rho is more accurate than the logarithm of its exponential
                    unbounded = rho == exp(t.log_rho)
                    log_rho = tl.where(unbounded, t.log_rho, tl.log(tl.maximum(rho, 1e-8)))
                if WEIGHTED:
                    weight_sum += tl.where(t.live, clamp(log_rho, VESPO_LOG_MIN, 20.0), 0.0)
            if RHO_SUMS:
                rho_sum += t.log_rho
            if numbers.off_policy_threshold is not None:
                behind_sum += t.behind
        n = tl.sum(n_sum)
        kept_at_least_1 = tl.maximum(tl.sum(kept_sum), 1.0)
        log_w_of_sequence = tl.sum(d_sum)
        if SURROGATE == "gmpo":
            log_w_of_sequence /= kept_at_least_1
        elif RATIO != "sequence_sum":
            log_w_of_sequence /= tl.maximum(n, 1.0)
        log_weight = clamp(tl.sum(weight_sum), VESPO_LOG_MIN, VESPO_LOG_MAX)
        rho_total = tl.sum(rho_sum)
        behind = tl.sum(behind_sum) / tl.maximum(n, 1.0)
    at_least_1 = tl.maximum(n, 1.0)
    share = 1 / at_least_1 if AGGREGATION == "sequence_mean" else 1.0

    # 2. Losses, statistics, and gradients except for CHAIN
    size = tl.cdiv(tl.cdiv(end - start, PARTS), BLOCK) * BLOCK
    begin = start + part * size
    stop = tl.minimum(begin + size, end)
    zeros = tl.zeros((BLOCK,), tl.float32)
    infinite = tl.full((BLOCK,), float("inf"), tl.float32)
    loss, chain, tokens, kl_sum, approx_kl = zeros, zeros, zeros, zeros, zeros
    ratios, ratio, squared = zeros, zeros, zeros
    low, high, below_sum, above_sum, capped_sum, saturated_sum = zeros, zeros, zeros, zeros, zeros, zeros
    h_sum, kept_sum, kept_h_sum, phis, phi_sum, dropped_sum = zeros, zeros, zeros, zeros, zeros, zeros
    weights, weight_sum, weight_squared = zeros, zeros, zeros
    smallest, largest, lightest, heaviest = infinite, -infinite, infinite, -infinite
    bins = tl.zeros((WIDTH,), tl.int32)
    # A sequence without tokens gets a block, too. Its first place stands for the sequence in statistics per sequence.
    for first in range(begin, tl.where(exists & (part == 0), tl.maximum(stop, start + 1), stop), BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < stop
        t = load_tokens(
            logprob, old_logprob, advantage, mask, rollout_logprob, entropy, entropy_threshold, at, inside, s,
            ADVANTAGE_OF_SEQUENCE,
        )  # fmt: skip
        is_first = at == start
        weight = tl.where(t.live if SURROGATE == "gmpo" else t.kept, 1.0, 0.0)
        if WEIGHTED:
            if importance_ratio is not None:
                rho = load_spread(importance_ratio, at, t.live, s, IMPORTANCE_OF_SEQUENCE)
            else:
                rho = importance_weight(t.log_rho, rho_total, rho_total / at_least_1, numbers, IMPORTANCE)
            if SURROGATE != "vespo":
                weight = tl.where(weight > 0, rho, 0.0)
            of_weight = is_first & (zeros + n > 0) if IMPORTANCE_OF_SEQUENCE else t.live
            rho = tl.where(of_weight, rho, 0.0)
            weights += of_weight.to(tl.float32)
            weight_sum += rho
            weight_squared += rho * rho
            lightest = tl.minimum(lightest, tl.where(of_weight, rho, float("inf")))
            heaviest = tl.maximum(heaviest, tl.where(of_weight, rho, float("-inf")))
        if numbers.off_policy_threshold is not None:
            dropped = (t.advantage < 0) & (zeros + behind > numbers.off_policy_threshold)
            weight = tl.where(dropped, 0.0, weight)
            dropped_sum += (dropped & is_first).to(tl.float32)

        log_w = t.d if RATIO == "token" else zeros + log_w_of_sequence
        has_slope = (log_w >= numbers.log_ratio_min) & (log_w <= numbers.log_ratio_max)
        log_w = clamp(log_w, numbers.log_ratio_min, numbers.log_ratio_max)
        w = exp(clamp(log_w, -SATURATION, SATURATION))
        phi = zeros
        if SURROGATE == "vespo":
            phi = vespo_phi(log_weight, t.advantage, numbers)
            of_phi = (is_first if ADVANTAGE_OF_SEQUENCE else t.live).to(tl.float32)
            phis += of_phi
            phi_sum += of_phi * phi
        x, by_log_w, by_logp, below, above, capped = surrogate(t, w, phi, numbers, SURROGATE)
        x, by_log_w, by_logp = x * weight, tl.where(has_slope, by_log_w * weight, 0.0), by_logp * weight
        if KL != "none":
            delta = load_live(ref_logprob, at, t.live, zeros) - t.logp
            kl, d_kl = kl_estimate(delta, numbers, KL)
            if KL_RATIO_CORRECTION:
                kl, d_kl = kl * w, d_kl * w
                by_log_w += tl.where(has_slope, numbers.kl_coef * kl, 0.0)
            x += numbers.kl_coef * kl
            by_logp += numbers.kl_coef * d_kl
            kl_sum += tl.where(t.live, kl, 0.0)
        loss += tl.where(t.live, x, 0.0)
        if CHAIN:
            chain += tl.where(t.live, by_log_w, 0.0)
        else:
            by_logp += by_log_w
        tl.store(grads + at, tl.where(t.live, by_logp * share, 0.0), mask=inside)
        if ENTROPY_MEAN == "tokens":
            tl.store(grads + N.to(tl.int64) + at, t.kept.to(tl.float32), mask=inside)
        elif ENTROPY_MEAN == "loss":
            tl.store(grads + N.to(tl.int64) + at, t.live.to(tl.float32) * share, mask=inside)

        one_each = is_first if PER_SEQUENCE else t.live
        if RATIO == "token":
            bins += tl.histogram(bin_column(log_w), WIDTH, mask=one_each)
        ratios += one_each.to(tl.float32)
        ratio += tl.where(one_each, w, 0.0)
        squared += tl.where(one_each, w * w, 0.0)
        smallest = tl.minimum(smallest, tl.where(one_each, w, float("inf")))
        largest = tl.maximum(largest, tl.where(one_each, w, float("-inf")))
        loses = t.advantage < 0
        if SURROGATE == "dppo_tv" or SURROGATE == "dppo_kl":
            loses = t.advantage <= 0
        low += (one_each & below & loses).to(tl.float32)
        high += (one_each & above & (t.advantage > 0)).to(tl.float32)
        below_sum += (one_each & below).to(tl.float32)
        above_sum += (one_each & above).to(tl.float32)
        capped_sum += (one_each & capped).to(tl.float32)
        saturated_sum += (t.live & (tl.abs(log_w) > SATURATION)).to(tl.float32)
        tokens += t.live.to(tl.float32)
        approx_kl -= tl.where(t.live, log_w if RATIO == "token" else t.d, 0.0)
        h_sum += t.entropy
        kept_sum += t.kept.to(tl.float32)
        kept_h_sum += tl.where(t.kept, t.entropy, 0.0)

    # 3. Add the gradient of a sequence's ratio to all of its tokens
    if CHAIN:
        each = tl.sum(chain) * share
        if SURROGATE == "gmpo":
            each /= kept_at_least_1
        elif RATIO == "sequence":
            each /= at_least_1
        tl.debug_barrier()
        for first in range(begin, stop, BLOCK):
            at = first + tl.arange(0, BLOCK)
            inside = at < stop
            t = load_tokens(
                logprob, old_logprob, advantage, mask, rollout_logprob, entropy, entropy_threshold, at, inside, s,
                ADVANTAGE_OF_SEQUENCE,
            )  # fmt: skip
            receives = t.live
            if SURROGATE == "gmpo":
                receives = t.kept & (gmpo_gain(t.d, t.advantage, numbers) == t.d)
            before = tl.load(grads + at, mask=inside, other=0.0)
            tl.store(grads + at, before + tl.where(receives, each, 0.0), mask=inside)

    k = tl.arange(0, 32)
    row = tl.sum(
        stack((
            h_sum * share, loss * share, tokens, zeros, zeros, h_sum, kl_sum, approx_kl, ratios, ratio, squared, low,
            high, below_sum, above_sum, capped_sum, saturated_sum, weights, weight_sum, weight_squared, dropped_sum,
            kept_sum, kept_h_sum, phis, phi_sum, zeros, zeros, zeros, zeros, zeros, zeros, zeros,
        )),
        0,
    )  # fmt: skip
    if EMPTY_SEQUENCES == "surrogate" and ADVANTAGE_OF_SEQUENCE:
        empty = tl.load(advantage + s, mask=exists & (n == 0) & (part == 0), other=0.0)
        row = tl.where(k == POLICY_LOSS, row - empty, row)
    row = tl.where(k == SEQUENCES, (exists & (part == 0)).to(tl.float32), row)
    at = partials + program * WIDTH
    tl.store(at + k, row, mask=k < BINS)
    k = tl.arange(0, WIDTH)
    if RATIO != "token":
        log_w = clamp(log_w_of_sequence, numbers.log_ratio_min, numbers.log_ratio_max)
        bins = tl.where(k == bin_column(log_w + tl.zeros((WIDTH,), tl.float32)), tl.sum(ratios), 0.0)
    tl.store(at + k, bins.to(tl.float32), mask=(k >= BINS) & (k < SUMS))
    k = tl.arange(0, 8)
    row = tl.max(stack((-smallest, largest, -infinite, -infinite, -lightest, heaviest, -infinite, -infinite)), 0)
    tl.store(at + SUMS + k, row, mask=SUMS + k < COLUMNS)
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        finish(
            partials, loss_out, stats, factors, num_items, numbers, S, PARTS, AGGREGATION, EMPTY_SEQUENCES, ENTROPY_MEAN
        )
        tl.store(arrived, 0)


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["grads", "factors", "d_loss", "out"])
def backward_kernel(grads, factors, d_loss, out, N, BLOCK: tl.constexpr):
    r = tl.program_id(1)
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = r * N.to(tl.int64) + n
    factor = tl.load(factors + r) * tl.load(d_loss)
    tl.store(out + at, tl.load(grads + at, mask=n < N, other=0.0) * factor, mask=n < N)


@functools.cache
def _arrived(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


def arrived(device: torch.device) -> Tensor:
    """A counter that is zero before and after every launch. There is one per stream, because launches on a stream do
    not overlap. A CUDA graph may be replayed at the same time, so it gets its own, which it sets to zero."""
    if device.type == "cpu" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    return _arrived(device, torch.cuda.current_stream(device).cuda_stream)


@functools.lru_cache(maxsize=256)
def structure(spec: LossSpec) -> dict[str, object]:
    chain = spec.ratio in ("sequence", "sequence_sum") and (
        spec.surrogate in ("clip", "sapo", "gmpo") or spec.kl_ratio_correction
    )
    return dict(
        RATIO=spec.ratio,
        SURROGATE=spec.surrogate,
        KL=spec.kl if spec.kl_coef != 0 else "none",
        KL_RATIO_CORRECTION=spec.kl_ratio_correction,
        IMPORTANCE=spec.importance,
        AGGREGATION=spec.aggregation,
        EMPTY_SEQUENCES=spec.empty_sequences,
        ENTROPY_MEAN=spec.entropy_mean if spec.entropy_coef != 0 else "none",
        CHAIN=chain,
        BLOCK=1024 if chain else 512,
        WIDE=2048,
        num_warps=8 if chain else 4,
    )


def parts_of_a_sequence(N: int, S: int) -> int:
    """The number of parts: so many that there are up to 256 programs, each with at least 1024 tokens."""
    return max(1, min(256 // max(S, 1), N // (1024 * max(S, 1)), 32))


def forward(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    ref_logprob: Tensor | None,
    rollout_logprob: Tensor | None,
    importance_ratio: Tensor | None,
    entropy: Tensor | None,
    entropy_threshold: Tensor | None,
    num_items: Tensor | None,
    scale: float,
    spec: str,  # LossSpec.key
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss_spec = LossSpec.from_key(spec)
    N, S = logprob.shape[0], cu_seqlens.shape[0] - 1
    options = structure(loss_spec)
    parts = 1 if options["CHAIN"] else parts_of_a_sequence(N, S)
    programs = max(S * parts, 1)
    rows = 1 if options["ENTROPY_MEAN"] == "none" else 2
    loss, stats, grads, factors = (logprob.new_empty(shape) for shape in ((), len(NAMES), (rows, N), rows))
    tensors = (
        logprob, old_logprob, advantage, mask.view(torch.uint8) if mask.dtype == torch.bool else mask, cu_seqlens,
        ref_logprob, rollout_logprob, importance_ratio, entropy, entropy_threshold, num_items,
    )  # fmt: skip
    of_sequence = loss_spec.importance.startswith("sequence")
    if importance_ratio is not None:
        of_sequence = importance_ratio.dim() == 2
    with torch.cuda.device_of(logprob):
        forward_kernel[(programs,)](
            *(None if x is None else x.contiguous() for x in tensors),
            loss,
            stats,
            grads,
            factors,
            logprob.new_empty(programs, WIDTH.value),
            arrived(logprob.device),
            Numbers.of(loss_spec, scale),
            N,
            S,
            parts,
            ADVANTAGE_OF_SEQUENCE=advantage.dim() == 2,
            IMPORTANCE_OF_SEQUENCE=of_sequence,
            **options,
        )
    return loss, stats, grads, factors


def backward(grads: Tensor, factors: Tensor, d_loss: Tensor) -> Tensor:
    out = torch.empty_like(grads, memory_format=torch.contiguous_format)
    R, N = grads.shape
    if N > 0:
        with torch.cuda.device_of(grads):
            backward_kernel[(triton.cdiv(N, 1024), R)](
                grads.contiguous(), factors.contiguous(), d_loss, out, N, BLOCK=1024
            )
    return out
