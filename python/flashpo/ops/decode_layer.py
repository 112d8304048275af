"""What a decoder layer does between its matrix products, each in one pass: for the rows of a decode step, no gradient.

The results carry the roundings of transformers' modules, so that a step gives what the trainer's forward pass gives.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flashpo._op import native, op
from flashpo.ops._check import check_choice, check_device, check_float, check_that
from flashpo.ops.kv_append import BLOCK, check_caches

ACTIVATIONS = ("silu", "gelu_tanh")
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """h = x + residual and RMSNorm(h) = h / sqrt(mean h^2 + eps) * weight (arXiv 1910.07467), or (1 + weight).

    Args:
        x: (N, H), what the last block computed. residual: (N, H) likewise, or None for the first layer.
        weight: (H,). unit_offset: Gemma's norm, (1 + weight).

    Returns:
        The norm and h, (N, H) in x's dtype.
    """
    check_float("x", x)
    if x.dim() != 2:
        raise ValueError(f"x must be (N, H), got {tuple(x.shape)}")
    for name, other, shape in (("residual", residual, x.shape), ("weight", weight, x.shape[1:])):
        if other is not None:
            if other.shape != shape or other.dtype != x.dtype:
                raise ValueError(
                    f"{name} must be {tuple(shape)} {x.dtype} as x is, got {tuple(other.shape)} {other.dtype}"
                )
            check_device(name, other, "x", x)
    return add_rms_norm_fwd(x, residual, weight, float(eps), unit_offset)


@op
def add_rms_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, unit_offset: bool
) -> tuple[Tensor, Tensor]:
    total = x.clone() if residual is None else x + residual
    return _rms_norm(total, weight, eps, unit_offset), total


def _rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    unit = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (unit * (1 + weight.to(unit.dtype))).to(x.dtype) if unit_offset else weight * unit.to(x.dtype)


@add_rms_norm_fwd.fake
def _(x, residual, weight, eps, unit_offset):
    return torch.empty_like(x), torch.empty_like(x)


@add_rms_norm_fwd.backend("native")
def _(x, residual, weight, eps, unit_offset):
    if x.device.type != "cpu" or x.dtype not in NATIVE_DTYPES:
        return NotImplemented
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    out, total = torch.empty_like(x), torch.empty_like(x)
    native.add_rms_norm(x, residual, weight.contiguous(), eps, unit_offset, out, total, torch.get_num_threads())
    return out, total


def rope_append(
    qkv: Tensor,
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
    """Queries, ready for `decode_attention`, of one product qkv; its keys and values go into the caches.

    Of each head of queries and keys: RMSNorm with q_weight or k_weight where given (Qwen3), then the rotation by halves
    x cos + (-x2, x1) sin of its first R features (arXiv 2104.09864).

    Args:
        qkv: (N, (Hq + 2 Hkv) D): the heads of queries, then of keys, then of values.
        cos, sin: (N, R) in qkv's dtype, R <= D, even: both halves alike, as transformers' rotary embeddings give them.
        k_cache: (blocks, Hkv, D, 64), v_cache: (blocks, Hkv, 64, D), written at slot (N,) int64 as by `kv_append`.
        q_weight, k_weight: (D,); both or none. eps, unit_offset: of their norm.

    Returns:
        (N, Hq, D).
    """
    check_caches(k_cache, v_cache)
    check_float("qkv", qkv)
    heads, features = k_cache.shape[1:3]
    if v_cache.shape[3] != features:
        raise ValueError(f"v_cache must have the {features} features of k_cache, got {v_cache.shape[3]}")
    if qkv.dim() != 2 or qkv.shape[1] % features or qkv.shape[1] // features <= 2 * heads:
        raise ValueError(f"qkv must be (N, (Hq + 2 * {heads}) * {features}), got {tuple(qkv.shape)}")
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight: both or none")
    rows = qkv.shape[0]
    if cos.dim() != 2 or cos.shape[1] > features or cos.shape[1] % 2:
        raise ValueError(f"cos must be ({rows}, an even number up to {features}), got {tuple(cos.shape)}")
    wanted = [("cos", cos, (rows, cos.shape[1])), ("sin", sin, cos.shape), ("q_weight", q_weight, (features,)),
              ("k_weight", k_weight, (features,))]  # fmt: skip
    for name, x, shape in wanted:
        if x is None:
            continue
        if x.shape != shape or x.dtype != qkv.dtype:
            raise ValueError(f"{name} must be {tuple(shape)} {qkv.dtype}, got {tuple(x.shape)} {x.dtype}")
        check_device(name, x, "qkv", qkv)
    if k_cache.dtype != qkv.dtype:
        raise TypeError(f"k_cache must be {qkv.dtype} as qkv is, got {k_cache.dtype}")
    if slot.dtype != torch.int64 or slot.shape != (rows,):
        raise ValueError(f"slot must be ({rows},) int64, got {tuple(slot.shape)} {slot.dtype}")
    return rope_append_(qkv, cos, sin, q_weight, k_weight, float(eps), unit_offset, k_cache, v_cache, slot)


@op(mutates=("k_cache", "v_cache"))
def rope_append_(
    qkv: Tensor,
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
    heads, features = k_cache.shape[1:3]
    q, k, v = qkv.unflatten(1, (-1, features)).split([qkv.shape[1] // features - 2 * heads, heads, heads], 1)
    if q_weight is not None and k_weight is not None:
        q, k = _rms_norm(q, q_weight, eps, unit_offset), _rms_norm(k, k_weight, eps, unit_offset)
    live = slot >= 0
    block, offset = slot[live] // BLOCK, slot[live] % BLOCK
    k_cache[block, :, :, offset] = _rotate(k, cos, sin)[live]
    v_cache[block, :, offset] = v[live]
    return _rotate(q, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, rest = x.split([cos.shape[1], x.shape[2] - cos.shape[1]], 2)
    first, second = turned.chunk(2, 2)
    turned = turned * cos[:, None] + torch.cat([-second, first], 2) * sin[:, None]
    return torch.cat([turned, rest], 2)


@rope_append_.fake
def _(qkv, cos, sin, q_weight, k_weight, eps, unit_offset, k_cache, v_cache, slot):
    heads, features = k_cache.shape[1:3]
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // features - 2 * heads, features)


@rope_append_.backend("native")
def _(qkv, cos, sin, q_weight, k_weight, eps, unit_offset, k_cache, v_cache, slot):
    if qkv.device.type != "cpu" or qkv.dtype not in NATIVE_DTYPES:
        return NotImplemented
    heads, features = k_cache.shape[1:3]
    q = qkv.new_empty(qkv.shape[0], qkv.shape[1] // features - 2 * heads, features)
    dense = (x if x is None else x.contiguous() for x in (qkv, cos, sin, q_weight, k_weight))
    native.rope_append(*dense, eps, unit_offset, k_cache, v_cache, slot.contiguous(), q, torch.get_num_threads())
    return q


def gated_activation(x: Tensor, *, activation: str = "silu") -> Tensor:
    """activation(gate) * up of x = (gate, up): SwiGLU, GeGLU (arXiv 2002.05202).

    Args:
        x: (N, 2 I), from one product. activation: "silu" or "gelu_tanh".

    Returns:
        (N, I).
    """
    check_float("x", x)
    check_choice("activation", activation, ACTIVATIONS)
    if x.dim() != 2 or x.shape[1] % 2:
        raise ValueError(f"x must be (N, 2 I), got {tuple(x.shape)}")
    return gated_activation_fwd(x, activation)


@op
def gated_activation_fwd(x: Tensor, activation: str) -> Tensor:
    gate, up = x.chunk(2, 1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


@gated_activation_fwd.fake
def _(x, activation):
    return x.new_empty(x.shape[0], x.shape[1] // 2)


@gated_activation_fwd.backend("native")
def _(x, activation):
    if x.device.type != "cpu" or x.dtype not in NATIVE_DTYPES:
        return NotImplemented
    out = x.new_empty(x.shape[0], x.shape[1] // 2)
    native.gated_activation(x.contiguous(), ACTIVATIONS.index(activation), out, torch.get_num_threads())
    return out
