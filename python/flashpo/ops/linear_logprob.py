"""log softmax(hidden W^T)[target] and its entropy, without storing the logits.

    z = softcap tanh(((h W^T + b) logit_scale) / softcap) / T       logprob = z_t - lse(z)
    dz_j = d_logprob (1[j = t] - p_j) - d_entropy p_j (log p_j + entropy)
    dx_j = dz_j (1 - tanh^2) logit_scale / T      d hidden = dx W      d weight = dx^T h      d bias = sum dx

Forward folds tiles of logits into a partial (see `token_stats`). Backward computes the tiles again, uses the saved
log-sum-exp, and turns them into gradients in place. Lower bound on the work: one GEMM for forward; four with backward,
or three if the head is frozen.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashpo._op import op
from flashpo._precision import autocast_to
from flashpo.ops import _linear_logprob_cpu as cpu
from flashpo.ops._check import (
    check_device,
    check_float,
    check_group,
    check_index,
    check_int,
    check_positive,
    check_range,
)
from flashpo.ops._first_order import first_order
from flashpo.ops._product import product
from flashpo.ops._wide import wide_dtype
from flashpo.ops.token_stats import (
    ENTROPY,
    LN2,
    LOG_Z,
    LOG_Z_REST,
    TokenStats,
    check_outputs,
    merge_partials,
    neutral_partial,
    partial_from_logits,
    partial_rows,
    select,
    split,
)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = ("entropy",),
    group: dist.ProcessGroup | None = None,
    gather: Callable[[], contextlib.AbstractContextManager] | None = None,
) -> TokenStats:
    """Per-token log-probabilities of `target` under the LM head `weight`, with side statistics.

    Args:
        hidden: (..., H) float32, bfloat16 or float16: the last hidden states (not logits).
        weight: (V, H): the LM head, which is converted to the compute dtype tile by tile. The compute dtype is
            autocast's if autocast is on, otherwise that of `hidden`.
        target: (...) int64. Rows equal to `ignore_index` cost nothing and give exactly 0.
        bias: (V,) or None.
        temperature: a positive number, or a tensor of the target's shape with one number per token.
        logit_scale, softcap: the transforms of the head's logits (Cohere, Granite; Gemma 2), see the formula at the top
            of flashpo/ops/linear_logprob.py.
        ignore_index: see target.
        outputs: names of the `TokenStats` fields wanted besides `logprob`.
        group: a process group over which `weight` and `bias` are sharded along V, in rank order and in equal shards.
            hidden, target and the incoming gradients must be the same on every rank.
        gather: returns a context manager inside which a sharded `weight` and `bias` (as of ZeRO-3) are whole. The
            caller is already inside such a context. Backward enters another one, so that they need not stay whole in
            between.

    Returns:
        TokenStats of the target's shape, fp32, in nats. `logprob` and `entropy` are differentiable in hidden, weight
        and bias. Gradients are accumulated in fp32 and returned in their argument's dtype.

    Raises:
        TypeError, ValueError: the message names the argument. (A target outside [0, V) is a device assertion on CUDA.)
    """
    side = check_outputs(outputs)
    check_head("", hidden, weight, target, bias, logit_scale, softcap, "linear_logprob")
    check_int("ignore_index", ignore_index)
    check_group("group", group)
    token_temperature = _token_temperature(temperature, target)
    results = LinearLogprob.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        target.reshape(-1),
        bias,
        token_temperature,
        1.0 if token_temperature is not None else float(temperature),
        float(logit_scale),
        None if softcap is None else float(softcap),
        ignore_index,
        side,
        group,
        gather,
    )
    return select(outputs, target.shape, *results)


def check_head(of: str, hidden, weight, target, bias, logit_scale, softcap, op: str) -> None:
    """Check the arguments of one head. Where `op` takes several heads, `of` is the prefix of their names."""
    check_index(f"{of}hidden", hidden, "target", target)
    check_float(f"{of}weight", weight)
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"{of}weight must be (V, H) with V > 0, got {tuple(weight.shape)}")
    if hidden.shape[-1] != weight.shape[1]:
        given = f": these are logits; {op} takes the hidden states before the head"
        raise ValueError(
            f"{of}hidden has {hidden.shape[-1]} features, {of}weight (V, H) = {tuple(weight.shape)}"
            + (given if hidden.shape[-1] == weight.shape[0] else "")
        )
    check_device(f"{of}weight", weight, f"{of}hidden", hidden)
    if bias is not None:
        check_float(f"{of}bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{of}bias must be {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
        check_device(f"{of}bias", bias, f"{of}hidden", hidden)
    if softcap is not None:
        check_positive(f"{of}softcap", softcap)
    check_positive(f"{of}logit_scale", logit_scale)


def _token_temperature(temperature: float | Tensor, target: Tensor) -> Tensor | None:
    if not isinstance(temperature, Tensor):
        check_positive("temperature", temperature)
        return None
    check_float("temperature", temperature)
    if temperature.shape != target.shape:
        wanted, got = tuple(target.shape), tuple(temperature.shape)
        raise ValueError(f"temperature must be a number or of the target's shape {wanted}, got {got}")
    if temperature.requires_grad:
        raise ValueError("temperature must not require grad: linear_logprob has no gradient for it")
    check_device("temperature", temperature, "target", target)
    if temperature.device.type == "cpu" and not (temperature > 0).all():
        raise ValueError("temperature must be positive everywhere")
    return temperature.reshape(-1)


def head_logits(hidden, weight, bias, token_temperature, temperature, logit_scale, softcap, dtype):
    """(z, dz/dx) in fp32 or wider, both (N, V)."""
    wide = wide_dtype(dtype)
    x = hidden.to(dtype).to(wide) @ weight.to(dtype).to(wide).t()
    if bias is not None:
        x = x + bias.to(wide)
    x = x * logit_scale
    slope = torch.full_like(x, logit_scale)
    if softcap is not None:
        tanh = torch.tanh(x / softcap)
        x, slope = softcap * tanh, slope * (1 - tanh * tanh)
    t = temperature if token_temperature is None else token_temperature.to(wide)[:, None]
    return x / t, slope / t


@op
def linear_logprob_partial(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (J, H): the whole head, or the part of it that begins at vocab_start
    target: Tensor,  # (N,)
    bias: Tensor | None,  # (J,)
    token_temperature: Tensor | None,  # (N,)
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    vocab_start: int,
    vocab: int,
    side: bool,
    dtype: torch.dtype,  # the dtype of the GEMM
) -> Tensor:
    """The partial (R, N) of this part of the vocabulary; (0, 1, 0, ...) for ignored tokens."""
    check_range("target", target, vocab, ignore_index)
    z, _ = head_logits(hidden, weight, bias, token_temperature, temperature, logit_scale, softcap, dtype)
    partial = partial_from_logits(z, target - vocab_start, side)
    return partial.where(target != ignore_index, neutral_partial(side, len(target), partial))


@linear_logprob_partial.fake
def _(hidden, weight, target, *rest):
    *_, side, dtype = rest
    return hidden.new_empty((partial_rows(side), target.shape[0]), dtype=wide_dtype(dtype))


@op
def linear_logprob_bwd(
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
    rows: Tensor,  # from merge_partials
    d_logprob: Tensor | None,
    d_entropy: Tensor | None,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_hidden, d_weight, d_bias) in their arguments' dtypes; a gradient that is not wanted is an empty tensor."""
    z, slope = head_logits(hidden, weight, bias, token_temperature, temperature, logit_scale, softcap, dtype)
    bits = (z / LN2 - rows[LOG_Z, :, None]) - rows[LOG_Z_REST, :, None]
    logp = (bits * LN2).clamp(min=torch.finfo(z.dtype).min)
    p = logp.exp()
    dx = torch.zeros_like(z)
    if d_logprob is not None:
        onehot = torch.arange(z.shape[-1], device=z.device) == (target - vocab_start)[:, None]
        dx += d_logprob[:, None] * (onehot.to(z.dtype) - p)
    if d_entropy is not None:
        dx -= d_entropy[:, None] * p * (logp + rows[ENTROPY, :, None])
    dx = (dx * slope).masked_fill((target == ignore_index)[:, None], 0.0)
    return head_gradients(dx, hidden, weight, bias, dtype, want_hidden, want_weight, want_bias)


def head_gradients(dx, hidden, weight, bias, dtype, want_hidden, want_weight, want_bias):
    """(d_hidden, d_weight, d_bias) of x = hidden weight^T + bias; a gradient that is not wanted is an empty tensor."""
    none = hidden.new_empty(0)
    return (
        product(dx, weight.to(dtype).to(dx.dtype)).to(hidden.dtype) if want_hidden else none,
        product(dx.t(), hidden.to(dtype).to(dx.dtype)).to(weight.dtype) if want_weight else none.clone(),
        dx.sum(0).to(hidden.dtype if bias is None else bias.dtype) if want_bias else none.clone(),
    )


@linear_logprob_bwd.fake
def _(hidden, weight, target, bias, *rest):
    like = (hidden, weight, bias)
    return tuple(torch.empty_like(x) if wanted else hidden.new_empty(0) for x, wanted in zip(like, rest[-3:]))


@linear_logprob_partial.backend("native")
def _(*args):
    return cpu.partial(*args) if cpu.takes(args[0], args[-1]) else NotImplemented


@linear_logprob_bwd.backend("native")
def _(*args):
    return cpu.backward(*args) if cpu.takes(args[0], args[10]) else NotImplemented


_TRITON_DTYPES = {torch.float32, torch.bfloat16, torch.float16}


@linear_logprob_partial.backend("triton")  # kernels/linear_logprob.py
def _(*args):
    if not {args[0].dtype, args[1].dtype, args[-1]} <= _TRITON_DTYPES:
        return NotImplemented
    from flashpo.kernels.linear_logprob import partial

    return partial(*args)


@linear_logprob_bwd.backend("triton")
def _(*args):
    if not {args[0].dtype, args[1].dtype, args[10]} <= _TRITON_DTYPES:
        return NotImplemented
    from flashpo.kernels.linear_logprob import backward

    return backward(*args)


class LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        token_temperature: Tensor | None,
        temperature: float,
        logit_scale: float,
        softcap: float | None,
        ignore_index: int,
        side: bool,
        group: dist.ProcessGroup | None,
        gather: Callable[[], contextlib.AbstractContextManager] | None,
    ):
        ctx.set_materialize_grads(False)  # the entropy is often only logged, and then its gradient is None
        dtype = compute_dtype(hidden)
        shards = 1 if group is None else dist.get_world_size(group)
        start = 0 if group is None else dist.get_rank(group) * weight.shape[0]
        vocab = shards * weight.shape[0]
        head = bias, token_temperature, temperature, logit_scale, softcap, ignore_index, start
        partial = linear_logprob_partial(hidden, weight, target, *head, vocab, side, dtype)
        partials = partial[None] if group is None else gather_partials(partial, vocab, group)
        rows = merge_partials(partials, vocab)
        if group is not None:
            rows = rows.masked_fill(target == ignore_index, 0.0)
        ctx.save_for_backward(hidden, weight, target, bias, token_temperature, rows)
        ctx.options = (temperature, logit_scale, softcap, ignore_index, start, dtype), group, gather
        # Copies, because the caller may write over them
        logprob, entropy, *side_rows = (x.clone() for x in split(rows))
        ctx.mark_non_differentiable(*side_rows)
        return logprob, entropy, *side_rows

    @staticmethod
    @first_order
    def backward(ctx: Any, d_logprob: Tensor | None, d_entropy: Tensor | None, *_):
        hidden, weight, target, bias, token_temperature, rows = ctx.saved_tensors
        head, group, gather = ctx.options
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        with gather() if gather else contextlib.nullcontext():
            grads = linear_logprob_bwd(
                hidden, weight, target, bias, token_temperature, *head, rows, d_logprob, d_entropy, *wanted
            )
        d_hidden, d_weight, d_bias = (grad if want else None for grad, want in zip(grads, wanted))
        if group is not None and d_hidden is not None:
            d_hidden = all_reduced(d_hidden, group)
        return d_hidden, d_weight, None, d_bias, None, None, None, None, None, None, None, None


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the head's GEMM: autocast's if it is on, otherwise that of `hidden`."""
    return autocast_to(hidden.device.type) or hidden.dtype


def gather_partials(partial: Tensor, vocab: int, group: dist.ProcessGroup) -> Tensor:
    """The partials of all ranks, (ranks, rows, N), by one collective. One more row carries the vocabulary's size, which
    shows whether the shards have the same size."""
    mine = torch.cat([partial, partial.new_full((1, partial.shape[1]), vocab)])
    every = mine.new_empty((dist.get_world_size(group), *mine.shape))
    dist.all_gather_into_tensor(every.view(-1, mine.shape[1]), mine, group=group)
    if (every[:, -1] != vocab).any():
        raise ValueError("weight: the shards of a group must have the same number of rows; pad the vocabulary")
    return every[:, :-1]


def all_reduced(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the ranks, taken in fp32."""
    total = x.float()
    dist.all_reduce(total, group=group)
    return total.to(x.dtype)
