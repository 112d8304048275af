"""Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438) over the live tokens of each sequence.

delta_t = r_t + gamma V_t' - V_t      A_t = delta_t + gamma lam A_t'      R_t = A_t + V_t

t' is the next live token of the sequence; after the last one, V and A are 0. A is a linear recurrence, so it can be
computed by an associative scan: (a, b) after (a', b') is (a a', b + a b').
"""

import torch
import torch.distributed as dist
from torch import Tensor

from flashpo._op import native, op
from flashpo.ops._check import (
    check_cu_seqlens,
    check_device,
    check_flag,
    check_float,
    check_group,
    check_mask,
    check_share,
)
from flashpo.ops._layout import dense_rows
from flashpo.ops._wide import wide_dtype

EPS = 1e-8  # added to the variance when advantages are whitened


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten: bool = False,
    cu_seqlens: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of every live token. Masked tokens (tools, observations, padding) are skipped.

    A masked token neither ends an episode nor counts as a step: value and advantage of the next live token are passed
    on to the live token before it unchanged, as in verl. Rewards and values at masked tokens are never read.

    Args:
        rewards: (B, T), or flat (N,) with `cu_seqlens`: the reward of each token, including KL penalties.
        values: the same shape: V before the token. Both are float32, bfloat16, float16 or float64.
        mask: the same shape, bool or integers 0 and 1: which tokens are live.
        gamma, lam: in [0, 1].
        whiten: replace the advantages by (A - mean) / sqrt(var + 1e-8), with the mean and the variance over all live
            tokens. The variance has ddof 1; for a single token it is 0, where verl raises. Returns are not changed.
        cu_seqlens: (S + 1,) int64: where each sequence of the flat tensors begins, and N at the end.
        group: with `whiten`, mean and variance are taken over all ranks of this process group.

    Returns:
        (advantages, returns), both fp32 (fp64 for fp64) and 0 at masked tokens. Neither requires grad.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices disagree, or an argument is out of its range.
    """
    check_float("rewards", rewards)
    check_float("values", values)
    if rewards.dim() != (2 if cu_seqlens is None else 1):
        raise ValueError(f"rewards must be (B, T), or (N,) with cu_seqlens, got {tuple(rewards.shape)}")
    if values.shape != rewards.shape:
        raise ValueError(f"values must have rewards' shape {tuple(rewards.shape)}, got {tuple(values.shape)}")
    check_device("values", values, "rewards", rewards)
    mask = check_mask("mask", mask, "rewards", rewards)
    check_share("gamma", gamma)
    check_share("lam", lam)
    check_flag("whiten", whiten)
    if group is not None and not whiten:
        raise ValueError("group must be None with whiten=False, got a group")
    check_group("group", group)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, rewards)
    rewards, values = rewards.detach(), values.detach()
    advantages, returns, moments = gae_fwd(rewards, values, mask, cu_seqlens, float(gamma), float(lam), whiten)
    if whiten:
        if group is not None:
            here = merge_moments(moments)
            ranks = [torch.empty_like(here) for _ in range(dist.get_world_size(group))]
            dist.all_gather(ranks, here, group)
            moments = torch.stack(ranks)
        gae_whiten_(advantages, mask, moments)
    return advantages, returns


@op
def gae_fwd(
    rewards: Tensor,  # (B, T), or (N,) with cu_seqlens
    values: Tensor,
    mask: Tensor,  # bool
    cu_seqlens: Tensor | None,
    gamma: float,
    lam: float,
    with_moments: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages, returns, and per sequence (S, 3) float64: live tokens, mean and sum of squared deviations.

    The sums are float64, so the result is the exact recurrence rounded once.
    """
    r, v = (x.double().masked_fill(~mask, 0.0) for x in (rewards, values))
    at = torch.arange(r.shape[-1], device=r.device)
    if cu_seqlens is None:
        sequence, last = torch.zeros_like(at), at == at.shape[0] - 1
    else:
        sequence = torch.searchsorted(cu_seqlens[1:], at, right=True)
        last = at + 1 == cu_seqlens[1:][sequence]
    # The first live token at or after each token
    live_at = torch.where(mask, at, at.shape[0]).flip(-1).cummin(-1).values.flip(-1)
    following = torch.nn.functional.pad(live_at, (0, 1), value=at.shape[0])[..., 1:]
    inside = following < at.shape[0]
    following = following.where(inside, 0)
    inside = inside & (sequence[following] == sequence)
    b = (r + gamma * v.gather(-1, following).where(inside, 0.0) - v).masked_fill(~mask, 0.0)
    a = torch.ones_like(b).masked_fill(mask, gamma * lam).masked_fill(last, 0.0)
    step = 1
    while step < at.shape[0]:  # each (a, b) covers `step` tokens; 0 * inf must not leave its sequence
        reached = b[..., :-step] + (a[..., :-step] * b[..., step:]).where(a[..., :-step] != 0, 0.0)
        b = torch.cat((reached, b[..., -step:]), -1)
        a = torch.cat((a[..., :-step] * a[..., step:], a[..., -step:]), -1)
        step *= 2
    advantages = b.masked_fill(~mask, 0.0)
    returns = advantages + v
    advantages = advantages.to(_result_dtype(rewards, values))
    moments = rewards.new_zeros((0, 3), dtype=torch.float64)
    if with_moments:
        moments = _moments(advantages, mask, None if cu_seqlens is None else sequence, _sequences(rewards, cu_seqlens))
    return advantages, returns.to(advantages.dtype), moments


def _result_dtype(rewards: Tensor, values: Tensor) -> torch.dtype:
    return wide_dtype(torch.promote_types(rewards.dtype, values.dtype))


def _sequences(rewards: Tensor, cu_seqlens: Tensor | None) -> int:
    return rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _moments(x: Tensor, mask: Tensor, sequence: Tensor | None, sequences: int) -> Tensor:
    x, live = x.double(), mask.double()
    if sequence is None:
        sequence = torch.arange(sequences, device=x.device)[:, None].expand(x.shape)
    sequence = sequence.flatten()

    def total(y: Tensor) -> Tensor:
        return y.new_zeros(sequences).index_add_(0, sequence, y.flatten())

    n = total(live)
    mean = total(x) / n.clamp(min=1)
    deviation = (x.flatten() - mean[sequence]) * live.flatten()
    return torch.stack((n, mean, total(deviation.square())), -1)


@gae_fwd.fake
def _(rewards, values, mask, cu_seqlens, gamma, lam, with_moments):
    out = torch.empty_like(rewards, dtype=_result_dtype(rewards, values), memory_format=torch.contiguous_format)
    rows = _sequences(rewards, cu_seqlens) if with_moments else 0
    return out, torch.empty_like(out), rewards.new_empty((rows, 3), dtype=torch.float64)


def merge_moments(moments: Tensor) -> Tensor:
    """Merge moments (K, 3) into (3,): live tokens, mean, sum of squared deviations. Equal means give exactly that
    mean."""
    n, mean, squares = moments.unbind(-1)
    centre = mean[n.argmax()]
    total = n.sum()
    merged = centre + (n * (mean - centre)).sum() / total.clamp(min=1)
    return torch.stack((total, merged, (squares + n * (mean - merged).square()).sum()))


@op(mutates=("advantages",))
def gae_whiten_(advantages: Tensor, mask: Tensor, moments: Tensor) -> None:
    """Standardise the live advantages in place by the moments (K, 3) of all of them."""
    if moments.shape[0] == 0:
        return
    n, mean, squares = merge_moments(moments).unbind()
    white = (advantages.double() - mean) * (squares / (n - 1).clamp(min=1) + EPS).rsqrt()
    advantages.copy_(white.masked_fill(~mask, 0.0))


@gae_whiten_.fake
def _(*args):
    return None


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The layout that the kernels take: (B, T) with unit stride along T, or (1, N)."""
    x = x.to(dtype)
    return dense_rows(x if x.dim() == 2 else x[None])


@gae_fwd.backend("native")  # csrc/cpu/gae.cpp, csrc/cuda/gae.cu
def _(rewards, values, mask, cu_seqlens, gamma, lam, with_moments):
    if _result_dtype(rewards, values) != torch.float32:
        return NotImplemented
    advantages = torch.empty_like(rewards, dtype=torch.float32, memory_format=torch.contiguous_format)
    returns = torch.empty_like(advantages)
    sequences = _sequences(rewards, cu_seqlens)
    moments = rewards.new_empty((sequences if with_moments else 0, 3), dtype=torch.float64)
    args = (
        _rows(rewards, torch.float32),
        _rows(values, torch.float32),
        _rows(mask, torch.bool),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        gamma,
        lam,
        _rows(advantages, torch.float32),
        _rows(returns, torch.float32),
        moments if with_moments else None,
    )
    if rewards.device.type == "cuda":
        with torch.cuda.device_of(rewards):
            native.gae_fwd_cuda(*args, torch.cuda.current_stream().cuda_stream)
    else:
        native.gae_fwd(*args, torch.get_num_threads())
    return advantages, returns, moments


@gae_whiten_.backend("native")
def _(advantages, mask, moments):
    if advantages.dtype != torch.float32 or not advantages.is_contiguous():
        return NotImplemented
    args = advantages.view(-1), mask.reshape(-1).contiguous(), moments.contiguous(), EPS
    if advantages.device.type == "cuda":
        with torch.cuda.device_of(advantages):
            native.gae_whiten_cuda(*args, torch.cuda.current_stream().cuda_stream)
    else:
        native.gae_whiten(*args, torch.get_num_threads())
