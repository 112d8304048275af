"""log softmax(logits / T)[index] and its entropy, in one pass over the logits; the gradient takes one more pass.

z = logits / T      logprob = z[index] - lse(z)      entropy = -sum_j p_j log p_j
d logits_j = (d_logprob (1[j = index] - p_j) - d_entropy p_j (log p_j + entropy)) / T
"""

import torch
from torch import Tensor

from flashpo._op import native, op
from flashpo.ops._check import (
    KERNEL_DTYPES,
    check_disjoint,
    check_flag,
    check_index,
    check_int,
    check_positive,
    check_range,
)
from flashpo.ops._first_order import first_order
from flashpo.ops._layout import dense_rows
from flashpo.ops._wide import wide, wide_dtype
from flashpo.ops.token_stats import (
    ENTROPY,
    LN2,
    LOG_Z,
    LOG_Z_REST,
    TokenStats,
    check_outputs,
    merge_partials,
    partial_from_logits,
    result_rows,
    select,
    split,
)


def selective_log_softmax(
    logits: Tensor,
    index: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = ("entropy",),
    inplace_backward: bool = False,
) -> TokenStats:
    """Per-token log-probabilities of `index` under softmax(logits / temperature), with side statistics.

    Args:
        logits: (..., V) float32, bfloat16 or float16 (float64: reference only). -inf means impossible.
        index: (...) int64 on the same device. Entries equal to `ignore_index` cost nothing and give exactly 0.
        temperature: a positive number.
        ignore_index: see index.
        outputs: names of the `TokenStats` fields wanted besides `logprob`.
        inplace_backward: let backward write the gradient over `logits`, which saves a tensor of their size. Nothing
            else may need the logits' values afterwards; autograd raises if something does. Logits that share memory, as
            in an expanded tensor, are refused.

    Returns:
        TokenStats of shape (...), fp32, in nats; `logprob` and `entropy` are differentiable.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes or devices disagree, the vocabulary is empty, temperature is not positive, or an index is
            outside [0, V) (on CUDA: an asynchronous device assertion).
    """
    check_index("logits", logits, "index", index)
    check_positive("temperature", temperature)
    check_int("ignore_index", ignore_index)
    check_flag("inplace_backward", inplace_backward)
    if inplace_backward:
        if torch.compiler.is_compiling():
            raise ValueError("inplace_backward must be False under torch.compile, got True")
        check_disjoint("logits", logits)
    side = check_outputs(outputs)
    if logits.dim() != 3:
        logits = logits.unsqueeze(0) if logits.dim() == 2 else logits.reshape(1, -1, logits.shape[-1])
    flat = index if index.dim() == 1 else index.reshape(-1)
    if logits.requires_grad and torch.is_grad_enabled():
        results = SelectiveLogSoftmax.apply(logits, flat, temperature, ignore_index, side, inplace_backward)
    else:
        results = split(selective_log_softmax_fwd(logits, flat, temperature, ignore_index, side))
    return select(outputs, index.shape, *results)


@op
def selective_log_softmax_fwd(
    logits: Tensor,  # (B, T, V)
    index: Tensor,  # (B T)
    temperature: float,
    ignore_index: int,
    side: bool,
) -> Tensor:
    """The rows (4 or 7, B T) of `merge_partials`; 0 at ignored entries."""
    check_range("index", index, logits.shape[-1], ignore_index)
    z = wide(logits.flatten(0, 1)) / temperature
    partial = partial_from_logits(z, index, side)
    return merge_partials.reference(partial[None], z.shape[-1]).masked_fill(index == ignore_index, 0.0)


@selective_log_softmax_fwd.fake
def _(logits, index, temperature, ignore_index, side):
    dtype = wide_dtype(logits.dtype)
    return logits.new_empty((result_rows(side), index.shape[0]), dtype=dtype)


def _grad(logits, index, temperature, ignore_index, rows, d_logprob, d_entropy) -> Tensor:
    z = logits.flatten(0, 1).to(rows.dtype) / temperature
    bits = (z / LN2 - rows[LOG_Z, :, None]) - rows[LOG_Z_REST, :, None]
    logp = (bits * LN2).clamp(min=torch.finfo(z.dtype).min)
    p = logp.exp()
    d = torch.zeros_like(z)
    ignored = index == ignore_index
    if d_logprob is not None:
        onehot = torch.arange(z.shape[-1], device=z.device) == index[:, None]
        d += d_logprob[:, None] * (onehot.to(z.dtype) - p)
    if d_entropy is not None:
        d -= d_entropy[:, None] * p * (logp + rows[ENTROPY, :, None])
    return (d / temperature).masked_fill(ignored[:, None], 0.0).to(logits.dtype).view(logits.shape)


@op
def selective_log_softmax_bwd(
    logits: Tensor,
    index: Tensor,
    temperature: float,
    ignore_index: int,
    rows: Tensor,  # as returned by forward
    d_logprob: Tensor | None,
    d_entropy: Tensor | None,
) -> Tensor:
    """d logits (B, T, V), contiguous and in the logits' dtype."""
    return _grad(logits, index, temperature, ignore_index, rows, d_logprob, d_entropy)


@selective_log_softmax_bwd.fake
def _(logits, *rest):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@op(mutates=("logits",))
def selective_log_softmax_bwd_(
    logits: Tensor,
    index: Tensor,
    temperature: float,
    ignore_index: int,
    rows: Tensor,  # as returned by forward
    d_logprob: Tensor | None,
    d_entropy: Tensor | None,
) -> None:
    """Like selective_log_softmax_bwd, but writes the gradient over the logits."""
    logits.copy_(_grad(logits, index, temperature, ignore_index, rows, d_logprob, d_entropy))


@selective_log_softmax_bwd_.fake
def _(*args):
    return None


@selective_log_softmax_fwd.backend("native")  # csrc/cpu/selective_log_softmax.cpp
def _(logits, index, temperature, ignore_index, side):
    if logits.device.type != "cpu" or logits.dtype not in KERNEL_DTYPES:
        return NotImplemented
    rows = logits.new_empty((result_rows(side), len(index)), dtype=torch.float32)
    native.selective_log_softmax_fwd(
        dense_rows(logits), index.contiguous(), temperature, ignore_index, rows, torch.get_num_threads()
    )
    return rows


def _native_bwd(out, logits, index, temperature, ignore_index, rows, d_logprob, d_entropy):
    native.selective_log_softmax_bwd(
        dense_rows(logits),
        index.contiguous(),
        temperature,
        ignore_index,
        rows,
        None if d_logprob is None else d_logprob.contiguous(),
        None if d_entropy is None else d_entropy.contiguous(),
        out,
        torch.get_num_threads(),
    )


@selective_log_softmax_bwd.backend("native")
def _(logits, *rest):
    if logits.device.type != "cpu" or logits.dtype not in KERNEL_DTYPES:
        return NotImplemented
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _native_bwd(out, logits, *rest)
    return out


@selective_log_softmax_bwd_.backend("native")
def _(logits, *rest):
    if logits.device.type != "cpu" or logits.dtype not in KERNEL_DTYPES or logits.stride(-1) != 1:
        return NotImplemented
    _native_bwd(logits, logits, *rest)


@selective_log_softmax_fwd.backend("triton")  # kernels/selective_log_softmax.py
def _(logits, *rest):
    if logits.dtype not in KERNEL_DTYPES:
        return NotImplemented
    from flashpo.kernels.selective_log_softmax import forward

    return forward(logits, *rest)


@selective_log_softmax_bwd.backend("triton")
def _(logits, *rest):
    if logits.dtype not in KERNEL_DTYPES:
        return NotImplemented
    from flashpo.kernels.selective_log_softmax import backward

    return backward(torch.empty_like(logits, memory_format=torch.contiguous_format), logits, *rest)


@selective_log_softmax_bwd_.backend("triton")
def _(logits, *rest):
    if logits.dtype not in KERNEL_DTYPES or logits.stride(-1) != 1:
        return NotImplemented
    from flashpo.kernels.selective_log_softmax import backward

    backward(logits, logits, *rest)


class SelectiveLogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, index, temperature, ignore_index, side, inplace_backward):
        ctx.set_materialize_grads(False)  # the entropy is often only logged, and then its gradient is None
        rows = selective_log_softmax_fwd(logits, index, temperature, ignore_index, side)
        ctx.save_for_backward(logits, index, rows)
        ctx.options = temperature, ignore_index, inplace_backward
        # Copies, because the caller may write over them
        logprob, entropy, *side_rows = (x.clone() for x in split(rows))
        ctx.mark_non_differentiable(*side_rows)
        return logprob, entropy, *side_rows

    @staticmethod
    @first_order
    def backward(ctx, d_logprob, d_entropy, *_):
        logits, index, rows = ctx.saved_tensors
        temperature, ignore_index, inplace = ctx.options
        args = logits, index, temperature, ignore_index, rows, d_logprob, d_entropy
        if not inplace:
            return selective_log_softmax_bwd(*args), None, None, None, None, None
        selective_log_softmax_bwd_(*args)
        torch.autograd.graph.increment_version(logits)
        return logits.detach(), None, None, None, None, None
