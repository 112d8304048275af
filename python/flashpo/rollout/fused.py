"""A faster forward for the backbones of Llama-like models: five operators in each layer, besides the projections.

transformers runs about fifty operators in each layer. Here norms, rotation, cache and activation run in our operators,
which round in the same way. The projections are called as the model's own modules, so that adapters and swapped
forwards on them take effect. Projections of the same input whose shadow weights are contiguous are one product.
Consecutive layers with packed projections are one operator in a decode step.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flashpo.ops.decode_layer import ACTIVATIONS, add_rms_norm_fwd, gated_activation_fwd, rope_append_
from flashpo.ops.decode_step import decode_layers_
from flashpo.ops.packed_linear import ROWS
from flashpo.rollout.packed_linear import PackedLinear
from flashpo.rollout.weights import ShadowLinear, joined

# Decoder layers that compute h += attention(norm(h)); h += mlp(norm(h)), and whose rotation pairs the halves of a head.
LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "Qwen3MoeDecoderLayer")
ATTENTIONS = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention", "Qwen3MoeAttention")
MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "Qwen3MoeMLP")
ACTIVATION_OF = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh"}
PIECES = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
# Forwards, by Liger or by us, that compute what the classes do
SAME = ("LigerRMSNorm.forward", "LigerSwiGLUMLP.forward", "fused_norm_forward", "compiled_layer_forward")


class Cached(Protocol):
    """A decode step or a prefill: its tokens, their slots in the cache, and their attention over the cache."""

    token: Tensor  # (N,)
    position: Tensor  # (N,)
    slot: Tensor  # (N,)
    cache: Any

    @property
    def tables(self) -> tuple[Tensor, ...] | None: ...  # the tables of decode_attention; None in a prefill

    def attend_cached(self, layer: int, query: Tensor, scale: float) -> Tensor: ...


class FusedBackbone:
    """`fused(step)` gives the last hidden states (N, H) that the model's own backbone would compute."""

    def __init__(self, backbone: Any):
        self.backbone = backbone
        layers = [_Layer(layer) for layer in backbone.layers]
        stacks = itertools.groupby(layers, lambda layer: (layer.linears is not None, layer.activation, layer.scale))
        self.parts = [_Stack(list(stack)) if packed else _Modules(list(stack)) for (packed, *_), stack in stacks]

    def __call__(self, step: Cached) -> Tensor:
        backbone: Any = self.backbone
        embedded = backbone.embed_tokens(step.token)
        position = step.position[:, None].long()
        turn = tuple(x[:, 0] for x in backbone.rotary_emb(embedded[:, None], position_ids=position))
        x, residual = embedded, None
        for part in self.parts:
            x, residual = part(x, residual, turn, step)
        return add_rms_norm_fwd(x, residual, backbone.norm.weight, _eps(backbone.norm), False)[0]


class _Layer:
    def __init__(self, layer: Any):
        self.attn, self.module = layer.self_attn, layer.mlp
        self.index, self.scale = self.attn.layer_idx, self.attn.scaling
        self.norms, self.head_norms = _norms(layer)[:2], _norms(layer)[2:]
        self.eps = [*(_eps(norm) for norm in self.norms), _eps(self.attn.q_norm) if self.head_norms else 0.0]
        name = ACTIVATION_OF.get(type(getattr(self.module, "act_fn", None)).__name__)
        self.activation = name if type(self.module).__name__ in MLPS and name in ACTIVATIONS else None
        self.linears = self._packed()
        self.qkv, self.gate_up = self._together(self.attn, "qkv"), self._together(self.module, ("gate", "up"))

    def _packed(self) -> list[PackedLinear] | None:
        """The projections q, k, v, o, gate, up and down, if each of them is a packed product without hooks."""
        if self.activation is None:
            return None
        modules = [getattr(self.attn, f"{name}_proj") for name in "qkvo"]
        modules += [getattr(self.module, f"{name}_proj") for name in ("gate", "up", "down")]
        linears = [m.__dict__.get("forward") for m in modules if not m._forward_hooks and not m._forward_pre_hooks]
        packed = [linear for linear in linears if isinstance(linear, PackedLinear)]
        return packed if len(packed) == len(modules) else None

    def _together(self, block: Any, names: Iterable[str]) -> ShadowLinear | None:
        """One product in place of several with the same input, if their shadow weights allow it."""
        linears = [getattr(block, f"{name}_proj", None) for name in names]
        if any(m is None or m._forward_hooks or m._forward_pre_hooks for m in linears):
            return None
        return joined([m.__dict__.get("forward") for m in linears])

    def __call__(
        self, x: Tensor, residual: Tensor | None, turn: tuple[Tensor, ...], step: Cached
    ) -> tuple[Tensor, Tensor]:
        before, between = self.norms
        x, residual = add_rms_norm_fwd(x, residual, before.weight, self.eps[0], False)
        x, residual = add_rms_norm_fwd(self.attention(x, turn, step), residual, between.weight, self.eps[1], False)
        return self.mlp(x), residual

    def attention(self, x: Tensor, turn: tuple[Tensor, ...], step: Cached) -> Tensor:
        attn = self.attn
        weights = [norm.weight for norm in self.head_norms] or (None, None)
        caches = step.cache.keys[self.index], step.cache.values[self.index]
        if self.qkv is None:
            projected = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
        else:
            whole = self.qkv(x.to(self.qkv.weight.dtype))
            keys = caches[0].shape[1] * caches[0].shape[2]
            projected = whole.split([whole.shape[1] - 2 * keys, keys, keys], 1)
        q = rope_append_(*projected, *turn, *weights, self.eps[2], False, *caches, step.slot)
        return attn.o_proj(step.attend_cached(self.index, q, self.scale).flatten(1))

    def mlp(self, x: Tensor) -> Tensor:
        if self.activation is None:  # a mixture of experts
            return self.module(x[:, None])[:, 0]
        mlp = self.module
        if self.gate_up is None:
            gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        else:
            gate, up = self.gate_up(x.to(self.gate_up.weight.dtype)).chunk(2, 1)
        return mlp.down_proj(gated_activation_fwd(gate, up, self.activation))


class _Modules:
    """Runs layers one by one and calls their projections as the model's modules."""

    def __init__(self, layers: Sequence[_Layer]):
        self.layers = layers

    def __call__(self, x: Tensor, residual: Tensor | None, turn: tuple[Tensor, ...], step: Cached) -> Any:
        for layer in self.layers:
            x, residual = layer(x, residual, turn, step)
        return x, residual


class _Stack(_Modules):
    """Runs layers with packed projections as one operator. Except for their windows, the layers have equal options."""

    def __init__(self, layers: Sequence[_Layer]):
        super().__init__(layers)
        norms = [norm and norm.weight for layer in layers for norm in layer.norms + (layer.head_norms or [None] * 2)]
        eps = [eps for layer in layers for eps in layer.eps]
        linears = [linear for layer in layers for linear in layer.linears or ()]
        self.weights = norms, eps, [linear.packed for linear in linears], [linear.bias for linear in linears]

    def __call__(self, x: Tensor, residual: Tensor | None, turn: tuple[Tensor, ...], step: Cached) -> Any:
        if step.tables is None or x.shape[0] > ROWS:
            return super().__call__(x, residual, turn, step)
        cache, indices = step.cache, [layer.index for layer in self.layers]
        caches = [cache.keys[i] for i in indices], [cache.values[i] for i in indices]
        windows = [cache.layers[i].window for i in indices]
        options = *self.weights, self.layers[0].activation, *turn, *caches, step.slot, *step.tables
        return decode_layers_(x, residual, *options, self.layers[0].scale, windows)


def _norms(layer: Any) -> list[Any]:
    """The norms before attention and after it, then those of queries and keys where a family has them."""
    attn = layer.self_attn
    heads = [attn.q_norm, attn.k_norm] if hasattr(attn, "q_norm") else []
    return [layer.input_layernorm, layer.post_attention_layernorm, *heads]


def fused_backbone(backbone: nn.Module, dtype: torch.dtype) -> FusedBackbone | None:
    """The fused forward of a backbone whose cache has the given dtype; None where it would not compute the same.

    This is so for models of another structure, for norms of other dtypes, and for hooks or replaced forwards on modules
    that the fused forward does not call.
    """
    layers = getattr(backbone, "layers", None)
    if not isinstance(layers, nn.ModuleList) or any(type(layer).__name__ not in LAYERS for layer in layers):
        return None
    pieces = [getattr(layer, name) for layer in layers for name in PIECES]
    if any(type(layer.self_attn).__name__ not in ATTENTIONS for layer in layers):
        return None
    norms = [backbone.norm, *(norm for layer in layers for norm in _norms(layer))]
    if not all(type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon") for norm in norms):
        return None
    bypassed = [backbone, *layers, *pieces, *norms]
    if any(m._forward_hooks or m._forward_pre_hooks or _does_something_else(m) for m in bypassed):
        return None
    fused = FusedBackbone(backbone)
    dtypes = {norm.weight.dtype for norm in norms}
    if dtypes == {dtype}:
        return fused
    # Under autocast the residual stream is fp32, and routers read fp32 norms. Our norms return the dtype of the
    # products instead, so models with routers keep their own forward.
    plain = all(layer.activation is not None for part in fused.parts for layer in part.layers)
    return fused if dtypes == {torch.float32} and plain else None


def _does_something_else(module: nn.Module) -> bool:
    """Whether somebody has put a forward on the instance that computes something else than its class does.

    The forwards in `SAME` compute the same.
    """
    forward = module.__dict__.get("forward")
    name = getattr(getattr(forward, "__func__", None), "__qualname__", None)
    return forward is not None and name not in SAME


def _eps(norm: Any) -> float:
    return float(norm.variance_epsilon)
