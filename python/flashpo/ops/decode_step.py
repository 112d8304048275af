"""The decoder layers of a decode step in one operator, for layers of Llama's form with packed weights.

Between two kernels, an operator's Python costs little by itself and tens of microseconds behind a product that has sent
all weights through the caches. One call for all layers leaves that out, and its threads stay awake from first to last.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flashpo._op import native, op
from flashpo.ops.decode_attention import decode_attention_fwd
from flashpo.ops.decode_layer import ACTIVATIONS, add_rms_norm_fwd, gated_activation_fwd, rope_append_
from flashpo.ops.packed_linear import depth_of, packed_linear_fwd, packs_dtype


@op(mutates=("k_caches", "v_caches"))
def decode_layers_(
    x: Tensor,  # (N, H), what the last layer's mlp gave
    residual: Tensor | None,  # (N, H); None before the first layer of a model
    norms: Sequence[Tensor | None],  # a layer's: before attention, before mlp, of queries, of keys (both may be None)
    eps: Sequence[float],  # a layer's: of the first two, and of the last two
    linears: Sequence[Tensor],  # a layer's, packed: q, k, v, o, gate, up, down
    biases: Sequence[Tensor | None],
    activation: str,
    cos: Tensor,  # and sin, slot, caches: as rope_append takes them
    sin: Tensor,
    k_caches: Sequence[Tensor],  # a layer's
    v_caches: Sequence[Tensor],
    slot: Tensor,
    rows: Tensor,  # and the other tables: as decode_attention takes them
    start: Tensor,
    length: Tensor,
    blocks: Tensor,
    position: Tensor,
    scale: float,
    windows: Sequence[int],  # a layer's
) -> tuple[Tensor, Tensor]:
    """(what the last mlp gives, the residual stream without it), both (N, H). Of each layer:

    h = x + residual      t = h + o(attention(q, k, v of norm(h)))      down(activation(gate(norm(t))) up(norm(t))), t
    """
    hidden, tables, total = x.shape[1], (rows, start, length, blocks, position), residual

    def linear(y, weight, columns):
        return packed_linear_fwd.reference(y, *weight, columns)

    for i, (k_cache, v_cache, window) in enumerate(zip(k_caches, v_caches, windows, strict=True)):
        before, between, of_queries, of_keys = norms[4 * i : 4 * i + 4]
        weights = zip(linears[7 * i : 7 * i + 7], biases[7 * i : 7 * i + 7], strict=True)
        q_linear, k_linear, v_linear, o_linear, gate_linear, up_linear, down_linear = weights
        keys, queries, inner = k_cache.shape[1] * k_cache.shape[2], depth_of(o_linear[0]), depth_of(down_linear[0])
        y, total = add_rms_norm_fwd.reference(x, total, before, eps[3 * i], False)
        qkv = linear(y, q_linear, queries), linear(y, k_linear, keys), linear(y, v_linear, keys)
        options = cos, sin, of_queries, of_keys, eps[3 * i + 2], False
        q = rope_append_.reference(*qkv, *options, k_cache, v_cache, slot)
        y = decode_attention_fwd.reference(q, k_cache, v_cache, *tables, scale, window, 0.0, None)[0]
        y = linear(y.flatten(1), o_linear, hidden)
        y, total = add_rms_norm_fwd.reference(y, total, between, eps[3 * i + 1], False)
        y = gated_activation_fwd.reference(linear(y, gate_linear, inner), linear(y, up_linear, inner), activation)
        x = linear(y, down_linear, hidden)
    assert total is not None, "there is a layer"
    return x, total


@decode_layers_.fake
def _(x, *rest):
    return torch.empty_like(x), torch.empty_like(x)


@decode_layers_.backend("native")  # csrc/decode_layer.cpp
def _(
    x, residual, norms, eps, linears, biases, activation, cos, sin, k_caches, v_caches, slot,
    rows, start, length, blocks, position, scale, windows,
):  # fmt: skip
    if x.device.type != "cpu" or not packs_dtype(x.dtype):
        return NotImplemented
    threads, queries, (count, hidden) = torch.get_num_threads(), depth_of(linears[3]), x.shape
    cache_blocks, heads, features = k_caches[0].shape[:3]
    query_heads, inner = queries // features, depth_of(linears[6])
    sizes = cache_blocks, heads, query_heads // heads, threads
    tables = rows, start, length, blocks, position
    plans = {window: native.DecodePlan(*tables, window, *sizes) for window in set(windows)}
    scratches = [native.decode_attention_scratch(plan, k_caches[0], v_caches[0]) for plan in plans.values()]
    lse = x.new_empty((count, query_heads), dtype=torch.float32)
    work = x.new_empty(count * (3 * hidden + 2 * queries + 2 * heads * features + 2 * inner))
    out, total = x.new_empty(count, hidden), x.new_empty(count, hidden)
    native.decode_layers(
        x, residual, norms, eps, linears, biases, cos, sin, k_caches, v_caches, slot,
        [plans[window] for window in windows], scale, ACTIVATIONS.index(activation),
        out, total, work, lse, lse.new_empty(max(scratches)), threads,
    )  # fmt: skip
    return out, total
