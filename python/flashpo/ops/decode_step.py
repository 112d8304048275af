"""A whole decoder layer of a decode step in one operator, for layers of Llama's form with packed weights.

Between two kernels, an operator's Python costs little by itself and tens of microseconds behind a product that has sent
all weights through the caches. One call for a layer leaves that out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flashpo._op import native, op
from flashpo.ops.decode_attention import decode_attention_fwd
from flashpo.ops.decode_layer import ACTIVATIONS, add_rms_norm_fwd, gated_activation_fwd, rope_append_
from flashpo.ops.packed_linear import depth_of, packed_linear_fwd, packs_dtype


@op(mutates=("k_cache", "v_cache"))
def decode_layer_(
    x: Tensor,  # (N, H), what the last layer's mlp gave
    residual: Tensor | None,  # (N, H); None in the first layer
    norms: Sequence[Tensor | None],  # before attention, before mlp, of queries, of keys; the last two may be None
    eps: Sequence[float],  # the first two's and that of the last two
    linears: Sequence[Tensor],  # packed: q, k, v, o, gate, up, down
    biases: Sequence[Tensor | None],
    activation: str,
    cos: Tensor,  # and sin, slot, caches: as rope_append takes them
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: Tensor,
    rows: Tensor,  # and the other tables: as decode_attention takes them
    start: Tensor,
    length: Tensor,
    blocks: Tensor,
    position: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """(what the mlp gives, the residual stream without it), both (N, H).

    h = x + residual      t = h + o(attention(q, k, v of norm(h)))      down(activation(gate(norm(t))) up(norm(t))), t
    """
    q_linear, k_linear, v_linear, o_linear, gate_linear, up_linear, down_linear = zip(linears, biases)
    hidden, keys = x.shape[1], k_cache.shape[1] * k_cache.shape[2]
    queries, inner = depth_of(linears[3]), depth_of(linears[6])

    def linear(y, weight, columns):
        return packed_linear_fwd.reference(y, *weight, columns)

    y, total = add_rms_norm_fwd.reference(x, residual, norms[0], eps[0], False)
    qkv = linear(y, q_linear, queries), linear(y, k_linear, keys), linear(y, v_linear, keys)
    q = rope_append_.reference(*qkv, cos, sin, norms[2], norms[3], eps[2], False, k_cache, v_cache, slot)
    tables = rows, start, length, blocks, position
    y = decode_attention_fwd.reference(q, k_cache, v_cache, *tables, scale, window, 0.0, None)[0]
    y, total = add_rms_norm_fwd.reference(linear(y.flatten(1), o_linear, hidden), total, norms[1], eps[1], False)
    y = gated_activation_fwd.reference(linear(y, gate_linear, inner), linear(y, up_linear, inner), activation)
    return linear(y, down_linear, hidden), total


@decode_layer_.fake
def _(x, *rest):
    return torch.empty_like(x), torch.empty_like(x)


@decode_layer_.backend("native")  # csrc/decode_layer.cpp
def _(
    x, residual, norms, eps, linears, biases, activation, cos, sin, k_cache, v_cache, slot,
    rows, start, length, blocks, position, scale, window,
):  # fmt: skip
    if x.device.type != "cpu" or not packs_dtype(x.dtype):
        return NotImplemented
    threads, queries, (count, hidden) = torch.get_num_threads(), depth_of(linears[3]), x.shape
    cache_blocks, heads, features = k_cache.shape[:3]
    query_heads, inner = queries // features, depth_of(linears[6])
    tables = rows, start, length, blocks, position
    plan = native.DecodePlan(*tables, window, cache_blocks, heads, query_heads // heads, threads)
    lse = x.new_empty((count, query_heads), dtype=torch.float32)
    scratch = lse.new_empty(native.decode_attention_scratch(plan, k_cache, v_cache))
    work = x.new_empty(count * (3 * hidden + 2 * queries + 2 * heads * features + 2 * inner))
    out, total = x.new_empty(count, hidden), x.new_empty(count, hidden)
    native.decode_layer(
        x, residual, norms, eps, linears, biases, cos, sin, k_cache, v_cache, slot, plan, scale,
        ACTIVATIONS.index(activation), out, total, work, lse, scratch, threads,
    )  # fmt: skip
    return out, total
