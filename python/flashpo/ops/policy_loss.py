"""The policy losses of `loss_spec.py`: per-token loss, explicit gradient, aggregation and statistics in one pass.

Gradients are written by hand instead of recorded by autograd. The gradient of a clipped token is then 0 whatever its
ratio is, so no 0 * inf becomes NaN. Log-ratios beyond SATURATION (64) give the loss and the gradient of that bound.
"""

import functools
import math
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashpo._op import native, op
from flashpo.ops import _policy_loss_reference
from flashpo.ops._check import (
    check_cu_seqlens,
    check_device,
    check_float,
    check_group,
    check_number,
    check_tensor,
    check_that,
)
from flashpo.ops._first_order import first_order
from flashpo.ops.loss_spec import CHOICES, LossSpec, resolve, resolved_key
from flashpo.ops.masked_quantile import entropy_threshold
from flashpo.ops.policy_stats import EXTREMES, INDEX, LOG_RATIO_BINS, LOG_RATIO_EDGES, NAMES, SUMS, PolicyStats


class PolicyLoss(NamedTuple):
    loss: Tensor  # a scalar, differentiable
    stats: PolicyStats


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor,
    mask: Tensor,
    *,
    loss: str | LossSpec = "dapo",
    cu_seqlens: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    importance_ratio: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_group: Any = None,
    num_items: Tensor | float | None = None,
    scale: float = 1.0,
    **overrides,
) -> PolicyLoss:
    """Loss of a batch of completions under any `LossSpec`, and its statistics.

        loss = scale (sum_t a_t m_t (k_t x_t + kl_coef KL_t) - entropy_coef H)

    x is the spec's surrogate and m the mask. k are weights: for the mismatch of sampler and trainer, and 0 for
    off-policy and low-entropy tokens. a is the spec's aggregation and H the mean entropy.

    Args:
        logprob: (B, T), or flat (N,) with `cu_seqlens`, fp32 (fp64: reference only): log-probs under the policy. Only
            this argument and `entropy` are differentiated.
        old_logprob: the same shape: log-probs under the policy that acted. None: the policy itself, so that every ratio
            is 1.
        advantage: one per sequence, (B,) or (B, 1), or one per token, (B, T). Flat: (S,) or (S, 1), and (N,) or (1, N).
            A flat tensor (N,) with as many tokens as sequences is ambiguous and is refused, unless every sequence has
            exactly one token.
        mask: the same shape as logprob, bool or integers, not 0 at live tokens. At other tokens no tensor is ever read.
            Unlike other operators, this one does not check that the mask holds only 0 and 1: on a CPU the check would
            take as long as the loss.
        loss: a name in `LOSSES` or a LossSpec. `overrides` such as `clip_high=0.3` replace fields of it.
        cu_seqlens: (S + 1,) int64: where each sequence of the flat tensors begins, and N at the end.
        ref_logprob: log-probs under the reference policy; needed if kl_coef is not 0.
        rollout_logprob: log-probs under the sampler, NaN where unknown. Needed for `importance`, used by
            `off_policy_threshold`, and not read otherwise.
        importance_ratio: finished importance weights instead of `importance` and `rollout_logprob`, in one of the
            shapes of advantage.
        entropy: the policy's entropy at each token. Needed for entropy_coef (differentiable) and for top_entropy;
            otherwise only a statistic.
        entropy_group: the process group over whose ranks the share `top_entropy` is taken.
        num_items: the denominator of the aggregation, instead of the count of this call: the live tokens of the global
            batch for token_mean, its sequences otherwise. A number of at least 0 or a scalar tensor.
        scale: a factor of the whole loss, such as 1 / gradient accumulation steps.

    Returns:
        PolicyLoss(loss, stats): a scalar, and PolicyStats, which stay on the device. A batch without live tokens gives
        0, which stays in the graph.

    Raises:
        TypeError, ValueError: a tensor that the spec needs is missing, or one that it cannot use is given; shapes,
            dtypes or devices disagree; an option is unknown or contradicts another.
    """
    spec = resolve(loss, tuple(overrides.items()))
    given = {"old_logprob": old_logprob, "ref_logprob": ref_logprob, "rollout_logprob": rollout_logprob}
    _check(spec, logprob, {**given, "entropy": entropy}, advantage, mask, importance_ratio, cu_seqlens, num_items)
    check_number("scale", scale)
    check_group("entropy_group", entropy_group)
    shape = logprob.shape
    if cu_seqlens is None:
        cu_seqlens = _padded_starts(shape[0], shape[1], logprob)
    logprob = logprob.reshape(-1)
    entropy = None if entropy is None else entropy.reshape(-1)
    old, ref, rollout = (
        None if x is None else x.detach().reshape(-1) for x in (old_logprob, ref_logprob, rollout_logprob)
    )
    mask = mask.reshape(-1)
    sequences = cu_seqlens.shape[0] - 1
    advantage = _per_token_or_sequence(advantage, sequences)
    if importance_ratio is not None:
        importance_ratio = _per_token_or_sequence(importance_ratio, sequences)
    threshold = None
    if spec.top_entropy < 1 and entropy is not None:
        threshold = entropy_threshold(entropy.detach(), mask, 1 - spec.top_entropy, group=entropy_group)
    if num_items is not None:
        if isinstance(num_items, Tensor):
            num_items = num_items.detach().to(logprob).reshape(1)
        else:  # filled on the device, because copying a number from the host would wait
            num_items = logprob.new_full((1,), num_items)
    args = (
        logprob, old, advantage, mask, cu_seqlens, ref, rollout, importance_ratio, entropy, threshold, num_items,
        float(scale), resolved_key(loss, tuple(overrides.items())),
    )  # fmt: skip
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (logprob, entropy)):
        value, stats = PolicyLossFunction.apply(*args)
    else:
        value, stats, *_ = policy_loss_fwd(*args)
    return PolicyLoss(value, PolicyStats(stats))


def _padded_starts(sequences: int, length: int, like: Tensor) -> Tensor:
    """Where the rows of a padded batch begin. Kept between calls, except in a trace, whose tensors are not real."""
    real = type(like) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    if real and not (like.is_cuda and torch.cuda.is_current_stream_capturing()):
        return _kept_starts(sequences, length, like.device)
    return torch.arange(sequences + 1, device=like.device) * length


@functools.lru_cache(maxsize=64)
def _kept_starts(sequences: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(sequences + 1, device=device) * length


def _per_token_or_sequence(x: Tensor, sequences: int) -> Tensor:
    """Reshape x to (S, 1) if it has, or can be read as having, one value for each sequence, otherwise to (N,)."""
    per_sequence = x.shape == (sequences,) or x.shape == (sequences, 1)
    return x.detach().reshape(-1, 1) if per_sequence else x.detach().reshape(-1)


def _check_per_token_or_sequence(name, x, logprob, sequences, cu_seqlens) -> None:
    """Check that x clearly has one value per sequence or per token. Ambiguity is allowed where both readings agree."""
    flat = logprob.dim() == 1
    if x.shape not in (logprob.shape, (sequences,), (sequences, 1)) and not (flat and x.shape == (1, *logprob.shape)):
        raise ValueError(
            f"{name} must have one value for each of the {sequences} sequences or for each token, "
            f"{tuple(logprob.shape)}, got {tuple(x.shape)}"
        )
    if flat and x.dim() == 1 and sequences == logprob.shape[0]:
        check_that(
            (cu_seqlens.diff() == 1).all(),
            f"{name} ({sequences},) could be of the {sequences} sequences or of the {sequences} tokens: "
            f"pass ({sequences}, 1) for sequences, (1, {sequences}) for tokens",
        )


def _check(spec, logprob, others, advantage, mask, importance_ratio, cu_seqlens, num_items) -> None:
    check_float("logprob", logprob)
    if logprob.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"logprob must be float32 or float64, got {logprob.dtype}")
    if logprob.dim() != (2 if cu_seqlens is None else 1):
        raise ValueError(f"logprob must be (B, T), or (N,) with cu_seqlens, got {tuple(logprob.shape)}")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, logprob)
    sequences = logprob.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    for name, x in {**others, "mask": mask}.items():
        if x is None and name != "mask":
            continue
        check_tensor(name, x)
        if x.shape != logprob.shape:
            raise ValueError(f"{name} must have logprob's shape {tuple(logprob.shape)}, got {tuple(x.shape)}")
        if name != "mask" and x.dtype != logprob.dtype:
            raise TypeError(f"{name} must be {logprob.dtype} like logprob, got {x.dtype}")
        check_device(name, x, "logprob", logprob)
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"mask must be bool or integers 0 and 1, got {mask.dtype}")
    for name, x in {"advantage": advantage, "importance_ratio": importance_ratio}.items():
        if x is None and name != "advantage":
            continue
        check_tensor(name, x)
        _check_per_token_or_sequence(name, x, logprob, sequences, cu_seqlens)
        if x.dtype != logprob.dtype:
            raise TypeError(f"{name} must be {logprob.dtype} like logprob, got {x.dtype}")
        check_device(name, x, "logprob", logprob)

    def need(name: str, wanted: bool, reason: str) -> None:
        if wanted and others[name] is None:
            raise ValueError(f"{name} is needed for {reason}")

    need("ref_logprob", spec.kl_coef != 0, "kl_coef")
    need("entropy", spec.entropy_coef != 0, "entropy_coef")
    need("entropy", spec.top_entropy < 1, "top_entropy")
    need("rollout_logprob", spec.importance != "none", f"importance={spec.importance!r}")
    if importance_ratio is not None and spec.importance != "none":
        raise ValueError(f"importance_ratio and importance={spec.importance!r} exclude each other")
    if others["ref_logprob"] is not None and spec.kl_coef == 0:
        raise ValueError("ref_logprob is given, but kl_coef is 0")
    if isinstance(num_items, Tensor):
        check_tensor("num_items", num_items)
        if num_items.numel() != 1 or num_items.is_complex():
            got = f"{num_items.dtype} {tuple(num_items.shape)}"
            raise ValueError(f"num_items must be a number or a scalar tensor, got {got}")
        if num_items.device.type != "cpu":
            check_device("num_items", num_items, "logprob", logprob)
    elif num_items is not None:
        check_number("num_items", num_items)
        if num_items < 0:
            raise ValueError(f"num_items must not be negative, got {num_items}")
    if num_items is not None and spec.aggregation in ("local_token_mean", "token_sum"):
        raise ValueError(f"num_items does nothing for aggregation={spec.aggregation!r}")
    if spec.aggregation == "fixed_length" and spec.max_length is None:
        raise ValueError("aggregation='fixed_length' needs max_length")


policy_loss_fwd = op(_policy_loss_reference.policy_loss_fwd)


@policy_loss_fwd.fake
def _(logprob, *rest):
    rows = 2 if LossSpec.from_key(rest[-1]).entropy_coef != 0 else 1
    return tuple(logprob.new_empty(shape) for shape in ((), len(NAMES), (rows, logprob.shape[0]), rows))


def _numbers_of(spec: LossSpec) -> dict[str, float]:
    """A spec's fields under the names of csrc/policy_table.h: choices as their numbers, None as NaN, tuples
    flattened."""
    numbers: dict[str, float] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, tuple):
            for i, each in enumerate(value):
                add(f"{name}_{i}", each)
        else:
            numbers[name] = math.nan if value is None else float(value)

    for name, value in asdict(spec).items():
        add(name, CHOICES[name].index(value) if name in CHOICES else value)
    return numbers


@functools.lru_cache(maxsize=256)
def _numbers(key: str) -> Tensor:
    return torch.tensor(list(_numbers_of(LossSpec.from_key(key)).values()), dtype=torch.float64, device="cpu")


def _compare_with_native() -> None:
    """Raise ImportError if the extension numbers choices, fields or statistics differently from Python."""
    choices = {name: ", ".join(x.replace("+", "_plus") for x in values) for name, values in CHOICES.items()}
    sums = ", ".join(name for name in SUMS if name not in LOG_RATIO_BINS).upper()
    ours = choices, ", ".join(_numbers_of(LossSpec())), (sums, ", ".join(dict(EXTREMES)).upper()), LOG_RATIO_EDGES
    if ours != (native.policy_choices, native.policy_numbers, native.policy_stats, native.log_ratio_edges):
        raise ImportError("flashpo._C has other losses than flashpo.ops.policy_loss: build it from these sources")


if native is not None:
    _compare_with_native()


@policy_loss_fwd.backend("native")  # csrc/cpu/policy_loss.cpp
def _(logprob, old, advantage, mask, cu, ref, rollout, ratio, entropy, threshold, num_items, scale, spec):
    if logprob.device.type != "cpu" or logprob.dtype != torch.float32:
        return NotImplemented
    rows = 2 if LossSpec.from_key(spec).entropy_coef != 0 else 1
    stats, grads, factors = (logprob.new_empty(size) for size in (len(NAMES), (rows, logprob.shape[0]), rows))
    if mask.dtype not in (torch.bool, torch.int32, torch.int64):
        mask = mask != 0
    tensors = logprob, old, advantage, mask, cu, ref, rollout, ratio, entropy, threshold, num_items
    native.policy_loss_fwd(
        *(None if x is None else x.contiguous() for x in tensors),
        scale, _numbers(spec), stats, grads, factors, torch.get_num_threads(),
    )  # fmt: skip
    return stats[INDEX["loss"]].clone(), stats, grads, factors


@policy_loss_fwd.backend("triton")  # kernels/policy_loss.py
def _(logprob, *rest):
    if logprob.dtype != torch.float32:
        return NotImplemented
    from flashpo.kernels.policy_loss import forward

    return forward(logprob, *rest)


@op
def policy_loss_bwd(grads: Tensor, factors: Tensor, d_loss: Tensor) -> Tensor:
    """Scale rows of finished gradients: grads (R, N) times factors (R,) times d_loss ()."""
    return grads * (factors * d_loss)[:, None]


@policy_loss_bwd.fake
def _(grads, factors, d_loss):
    return torch.empty_like(grads)


@policy_loss_bwd.backend("native")
def _(grads, factors, d_loss):
    if grads.device.type != "cpu" or grads.dtype != torch.float32:
        return NotImplemented
    out = torch.empty_like(grads, memory_format=torch.contiguous_format)
    native.policy_loss_bwd(grads.contiguous(), factors, d_loss, out, torch.get_num_threads())
    return out


@policy_loss_bwd.backend("triton")
def _(grads, factors, d_loss):
    if grads.dtype != torch.float32:
        return NotImplemented
    from flashpo.kernels.policy_loss import backward

    return backward(grads, factors, d_loss)


class PolicyLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprob, old, advantage, mask, cu, ref, rollout, ratio, entropy, *rest):
        tensors = logprob, old, advantage, mask, cu, ref, rollout, ratio, entropy
        loss, stats, grads, factors = policy_loss_fwd(*tensors, *rest)
        ctx.save_for_backward(grads, factors)
        ctx.inputs = logprob, entropy
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)  # do not make zeros for the statistics
        return loss, stats

    @staticmethod
    @first_order
    def backward(ctx, d_loss, _):
        if d_loss is None:
            return (None,) * 13
        grads = policy_loss_bwd(*ctx.saved_tensors, d_loss)
        d_entropy = grads[1] if ctx.needs_input_grad[8] and grads.shape[0] == 2 else None
        return grads[0], *[None] * 7, d_entropy, *[None] * 4
