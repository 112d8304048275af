"""All decoder layers of a decode step in one operator, for Llama-like layers with packed weights.

Between two kernels, the Python of an operator takes little time by itself, but tens of microseconds after a product
that has read all weights and so has evicted everything else from the caches. One call for all layers avoids that, and
its threads stay awake from the first layer to the last.
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
    x: Tensor,  # (N, H): the output of the previous layer's MLP
    residual: Tensor | None,  # (N, H); None before the first layer of a model
    # Four per layer: before attention, before the MLP, of queries, of keys (the last two may be None)
    norms: Sequence[Tensor | None],
    eps: Sequence[float],  # per layer: of the norm before attention, of the one before the MLP, of queries and keys
    linears: Sequence[Tensor],  # seven per layer, packed: q, k, v, o, gate, up, down
    biases: Sequence[Tensor | None],
    activation: str,
    cos: Tensor,  # cos, sin, slot and the caches are as rope_append takes them
    sin: Tensor,
    k_caches: Sequence[Tensor],  # one per layer
    v_caches: Sequence[Tensor],
    slot: Tensor,
    rows: Tensor,  # the tables are as decode_attention takes them
    start: Tensor,
    length: Tensor,
    blocks: Tensor,
    position: Tensor,
    scale: float,
    windows: Sequence[int],  # one per layer
) -> tuple[Tensor, Tensor]:
    """Return (the output of the last MLP, the residual stream before it is added), both (N, H). Each layer computes

    h = x + residual      t = h + o(attention(q, k, v of norm(h)))      x = down(activation(gate(norm(t))) up(norm(t)))

    and hands x and t on to the next layer as x and residual.
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
