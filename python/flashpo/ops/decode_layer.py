"""The operations of a decoder layer between its matrix products, each in one pass, for a decode step without gradient.

The results are rounded where transformers' modules round, so that a decode step computes what the trainer's forward
pass computes. Under autocast the products are in 16 bits, while the norms' weights, the rotations and the residual
stream are fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flashpo._op import native, op
from flashpo.ops._check import KERNEL_DTYPES, check_choice, check_device, check_float, check_that
from flashpo.ops._wide import wide, wide_dtype
from flashpo.ops.kv_append import BLOCK, check_caches

ACTIVATIONS = ("silu", "gelu_tanh")


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """Add the residual and normalise the sum: h = x + residual, RMSNorm(h) = h / sqrt(mean(h^2) + eps) * weight.

    See arXiv 1910.07467. With `unit_offset` the factor is (1 + weight) instead of weight, as in Gemma.

    Args:
        x: (N, H): the output of the previous block.
        residual: (N, H): the residual stream, or None for the first layer.
        weight: (H,). residual and weight have x's dtype, or are fp32 as under autocast.
        eps: added to the mean of squares.
        unit_offset: see above.

    Returns:
        (norm, h), both (N, H): the norm in x's dtype, as the next product takes it, and h in the residual's dtype (x's
        dtype without a residual).

    Raises:
        TypeError, ValueError: the message names the argument.
    """
    check_float("x", x)
    if x.dim() != 2:
        raise ValueError(f"x must be (N, H), got {tuple(x.shape)}")
    for name, other, shape in (("residual", residual, x.shape), ("weight", weight, x.shape[1:])):
        if other is not None:
            if other.shape != shape or other.dtype not in (x.dtype, wide_dtype(x.dtype)):
                raise ValueError(
                    f"{name} must be {tuple(shape)} {x.dtype} as x is, or fp32, got {tuple(other.shape)} {other.dtype}"
                )
            check_device(name, other, "x", x)
    return add_rms_norm_fwd(x, residual, weight, float(eps), unit_offset)


@op
def add_rms_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, unit_offset: bool
) -> tuple[Tensor, Tensor]:
    total = x.clone() if residual is None else x + residual
    return _rms_norm(total, weight, eps, unit_offset).to(x.dtype), total


def _rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    x32 = wide(x)
    unit = x32 * (x32.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (unit * (1 + weight.to(unit.dtype))).to(x.dtype) if unit_offset else weight * unit.to(x.dtype)


@add_rms_norm_fwd.fake
def _(x, residual, weight, eps, unit_offset):
    return _like(x, residual)


def _like(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=(x if residual is None else residual).dtype)


@add_rms_norm_fwd.backend("native")  # csrc/cpu/decode_layer.cpp
def _(x, residual, weight, eps, unit_offset):
    if x.device.type != "cpu" or x.dtype not in KERNEL_DTYPES:
        return NotImplemented
    x, residual, weight = (None if t is None else t.contiguous() for t in (x, residual, weight))
    out, total = _like(x, residual)
    native.add_rms_norm(x, residual, weight, eps, unit_offset, out, total, torch.get_num_threads())
    return out, total


@add_rms_norm_fwd.backend("triton")  # kernels/decode_layer.py
def _(x, residual, weight, eps, unit_offset):
    from flashpo.kernels import decode_layer as kernels

    if x.dtype not in KERNEL_DTYPES or x.shape[1] > kernels.LONGEST:
        return NotImplemented
    x, residual, weight = (None if t is None else t.contiguous() for t in (x, residual, weight))
    out, total = _like(x, residual)
    kernels.add_rms_norm(x, residual, weight, eps, unit_offset, out, total)
    return out, total


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    unit_offset: bool = False,
) -> Tensor:
    """Normalise and rotate the queries and keys of a decode step, and write keys and values into the caches.

    Each head of queries and keys first passes an RMSNorm with q_weight or k_weight, if these are given (Qwen3). Then
    its first R features x = (x1, x2), split in halves, are rotated: x cos + (-x2, x1) sin (arXiv 2104.09864). cos,
    sin and the weights have q's dtype, or are fp32 as under autocast.

    Args:
        q: (N, Hq D). Rows may be strided, as slices of one product are.
        k, v: (N, Hkv D), likewise.
        cos, sin: (N, R), R <= D and even. Both halves are equal, as transformers' rotary embeddings return them.
        k_cache, v_cache: (blocks, Hkv, D, 64) and (blocks, Hkv, 64, D); written to.
        slot: (N,) int64: where the tokens go, as in `kv_append`.
        q_weight, k_weight: (D,): the weights of the norms; both or neither.
        eps, unit_offset: the norms' options, see `add_rms_norm`.

    Returns:
        The queries for `decode_attention`, (N, Hq, D) in q's dtype.

    Raises:
        TypeError, ValueError: the message names the argument.
    """
    check_caches(k_cache, v_cache)
    check_float("q", q)
    heads, features = k_cache.shape[1:3]
    if v_cache.shape[3] != features:
        raise ValueError(f"v_cache must have the {features} features of k_cache, got {v_cache.shape[3]}")
    if k_cache.dtype != q.dtype:
        raise TypeError(f"k_cache must be {q.dtype} as q is, got {k_cache.dtype}")
    if q.dim() != 2 or q.shape[1] % (heads * features):
        raise ValueError(f"q must be (N, a multiple of {heads} * {features}), got {tuple(q.shape)}")
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight must be given both or neither")
    rows = q.shape[0]
    if cos.dim() != 2 or cos.shape[1] > features or cos.shape[1] % 2:
        raise ValueError(f"cos must be ({rows}, an even number up to {features}), got {tuple(cos.shape)}")
    of_head, of_row = (features,), (rows, heads * features)
    wanted = [("k", k, of_row), ("v", v, of_row), ("cos", cos, (rows, cos.shape[1])), ("sin", sin, cos.shape),
              ("q_weight", q_weight, of_head), ("k_weight", k_weight, of_head)]  # fmt: skip
    for name, x, shape in wanted:
        if x is None:
            continue
        widest = q.dtype if name in ("k", "v") else wide_dtype(q.dtype)
        if x.shape != shape or x.dtype not in (q.dtype, widest):
            raise ValueError(f"{name} must be {tuple(shape)} {q.dtype}, got {tuple(x.shape)} {x.dtype}")
        check_device(name, x, "q", q)
    if slot.dtype != torch.int64 or slot.shape != (rows,):
        raise ValueError(f"slot must be ({rows},) int64, got {tuple(slot.shape)} {slot.dtype}")
    return rope_append_(q, k, v, cos, sin, q_weight, k_weight, float(eps), unit_offset, k_cache, v_cache, slot)


@op(mutates=("k_cache", "v_cache"))
def rope_append_(
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
) -> Tensor:
    check_that((slot < k_cache.shape[0] * BLOCK).all(), "slot holds values beyond the cache")
    q, k, v = (x.unflatten(1, (-1, k_cache.shape[2])) for x in (q, k, v))
    if q_weight is not None and k_weight is not None:
        q, k = _rms_norm(q, q_weight, eps, unit_offset), _rms_norm(k, k_weight, eps, unit_offset)
    live = slot >= 0
    block, offset = slot[live] // BLOCK, slot[live] % BLOCK
    k_cache[block, :, :, offset] = _rotate(k, cos, sin)[live].to(k_cache.dtype)
    v_cache[block, :, offset] = v[live]
    return _rotate(q, cos, sin).to(v.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, rest = x.split([cos.shape[1], x.shape[2] - cos.shape[1]], 2)
    first, second = turned.chunk(2, 2)
    turned = turned * cos[:, None] + torch.cat([-second, first], 2) * sin[:, None]
    return torch.cat([turned, rest], 2)


@rope_append_.fake
def _(q, k, v, cos, sin, q_weight, k_weight, eps, unit_offset, k_cache, v_cache, slot):
    return q.new_empty(q.shape[0], q.shape[1] // k_cache.shape[2], k_cache.shape[2])


@rope_append_.backend("native")  # csrc/cpu/decode_layer.cpp
def _(q, *rest):
    _, _, cos, sin, q_weight, k_weight, *_ = rest
    if q.device.type != "cpu" or q.dtype not in KERNEL_DTYPES or cos.dtype != sin.dtype:
        return NotImplemented
    if q_weight is not None and q_weight.dtype != k_weight.dtype:
        return NotImplemented
    arguments, out = _laid_out(q, *rest)
    native.rope_append(*arguments, out, torch.get_num_threads())
    return out


@rope_append_.backend("triton")  # kernels/decode_layer.py
def _(q, *rest):
    if q.dtype not in KERNEL_DTYPES:
        return NotImplemented
    from flashpo.kernels import decode_layer as kernels

    arguments, out = _laid_out(q, *rest)
    kernels.rope_append(*arguments, out)
    return out


def _laid_out(q, k, v, cos, sin, q_weight, k_weight, eps, unit_offset, k_cache, v_cache, slot):
    """The arguments in the layout that both kernels read, and the tensor for their result."""
    rows = (x if x.stride(1) == 1 else x.contiguous() for x in (q, k, v))
    dense = (x if x is None else x.contiguous() for x in (cos, sin, q_weight, k_weight))
    out = q.new_empty(q.shape[0], q.shape[1] // k_cache.shape[2], k_cache.shape[2])
    return (*rows, *dense, eps, unit_offset, k_cache, v_cache, slot.contiguous()), out


def gated_activation(gate: Tensor, up: Tensor, *, activation: str = "silu") -> Tensor:
    """activation(gate) * up, as in SwiGLU and GeGLU (arXiv 2002.05202).

    Args:
        gate, up: (N, I). Rows may be strided, as the halves of one product are.
        activation: "silu" or "gelu_tanh".

    Returns:
        (N, I) in the dtype of gate.

    Raises:
        TypeError, ValueError: the message names the argument.
    """
    check_float("gate", gate)
    check_choice("activation", activation, ACTIVATIONS)
    if gate.dim() != 2:
        raise ValueError(f"gate must be (N, I), got {tuple(gate.shape)}")
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(f"up must be {tuple(gate.shape)} {gate.dtype}, got {tuple(up.shape)} {up.dtype}")
    check_device("up", up, "gate", gate)
    return gated_activation_fwd(gate, up, activation)


@op
def gated_activation_fwd(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return ((F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up).contiguous()


@gated_activation_fwd.fake
def _(gate, up, activation):
    return gate.new_empty(gate.shape)


@gated_activation_fwd.backend("native")  # csrc/cpu/decode_layer.cpp
def _(gate, up, activation):
    if gate.device.type != "cpu" or gate.dtype not in KERNEL_DTYPES:
        return NotImplemented
    out = gate.new_empty(gate.shape)
    rows = (x if x.stride(1) == 1 else x.contiguous() for x in (gate, up))
    native.gated_activation(*rows, ACTIVATIONS.index(activation), out, torch.get_num_threads())
    return out


@gated_activation_fwd.backend("triton")  # kernels/decode_layer.py
def _(gate, up, activation):
    if gate.dtype not in KERNEL_DTYPES:
        return NotImplemented
    from flashpo.kernels import decode_layer as kernels

    out = gate.new_empty(gate.shape)
    rows = (x if x.stride(1) == 1 else x.contiguous() for x in (gate, up))
    kernels.gated_activation(*rows, activation == "gelu_tanh", out)
    return out
