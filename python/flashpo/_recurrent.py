"""Token trees for layers that read their tokens in order: short convolutions, gated delta nets, state space models.

The modules of transformers compute these by calling functions of a few names, whose code is the same in all families.
`install` permanently replaces each function by one that looks for a tree; without a tree it calls the original. So the
gates, norms and projections around the recurrence remain the family's own code. In a decode step each row reads one
token: `ONE_TOKEN_EACH` takes the place of the tree, and the functions that a family calls for a single token are ours.

    causal_conv1d_fn                LFM2's layers, and the short convolution before each of the following
    torch_chunk_gated_delta_rule    Gated DeltaNet: Qwen3-Next, Qwen3.5, OLMo hybrid
    chunk_kimi_delta_attention      Kimi Delta Attention
    mamba2_chunk_scan               Mamba-2: Granite 4, Nemotron-H, Falcon-H1, Bamba, Zamba 2
    mamba_selective_scan            Mamba: Jamba, Falcon-Mamba

For a single token these are torch_recurrent_gated_delta_rule, recurrent_kimi_delta_attention and
mamba2_selective_state_update. Falcon-H1 gives the last one no keywords, so there it stays the original.

The tree is passed as a keyword argument, which a model passes on to its layers and these to such functions. Layers that
do not pass on keywords get the tree in place of their mask, which they apply to their input before anything else.
Mamba's scan gets neither; it uses the tree of the convolution that its layer has called just before. In a family that
loses the tree on the way, all rows run as one; the comparison with padded rows detects that.
"""

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from flashpo.ops import _fla as fla
from flashpo.ops._lineage import Lineage, is_tree
from flashpo.ops.recurrence_step import DTYPE, recurrence_step
from flashpo.ops.tree_conv import tree_conv
from flashpo.ops.tree_recurrence import tree_recurrence
from flashpo.ops.tree_scan import tree_scan

KEYWORD = "flashpo_lineage"
ONE_TOKEN_EACH = "one token each"  # given by that keyword in place of a tree; states are then written over
CONVOLUTION = "causal_conv1d_fn"
SCAN = "mamba_selective_scan"
L2_EPS = 1e-6  # what all these families add to a squared length


def install(backbone: nn.Module) -> None:
    """Make such layers of the backbone's families accept token trees. A second call does nothing."""
    for scope in _scopes(backbone):
        last = threading.local()  # `masked` and `convolved`: the tree in this thread's last call of these functions
        for name, wrap in WRAPPERS.items():
            original = getattr(scope, name, None)
            if original is not None and not hasattr(original, "takes_trees"):
                wrapped: Any = functools.wraps(original)(wrap(original, last))
                wrapped.takes_trees = True
                setattr(scope, name, wrapped)


def keywords(backbone: nn.Module, segments: Tensor, parents: Tensor, device: torch.device) -> dict[str, Lineage]:
    """The keyword arguments by which such layers get a tree; empty if the backbone's families have none."""
    if not any(hasattr(scope, CONVOLUTION) for scope in _scopes(backbone)):
        return {}
    return {KEYWORD: Lineage(segments, parents, device)}


def step_keywords(backbone: nn.Module) -> dict[str, str]:
    """The keyword arguments of a decode step; empty if they do not reach the layers, or without `install`."""
    installed = any(hasattr(getattr(scope, CONVOLUTION, None), "takes_trees") for scope in _scopes(backbone))
    return {KEYWORD: ONE_TOKEN_EACH} if installed and reached_by_keyword(backbone) else {}


def refusals(backbone: nn.Module, kinds: list[str]) -> Iterator[str]:
    """Yield a reason for each kind of layer that is not supported here. `kinds` are those in the configuration."""
    names = {name for scope in _scopes(backbone) for name in WRAPPERS if hasattr(scope, name)}
    for kind in dict.fromkeys(kinds):
        if not (CONVOLUTION in names if kind == "conv" else names & RECURRENCES):
            yield f"it has layers of {kind}"
    for module in backbone.modules():
        known = hasattr(sys.modules[type(module).__module__], CONVOLUTION)
        if not known and any(isinstance(child, nn.Conv1d) for child in module.children()):
            yield f"{type(module).__name__} has convolutions over its tokens"


def _scopes(backbone: nn.Module) -> list[ModuleType]:
    return [sys.modules[name] for name in dict.fromkeys(type(m).__module__ for m in backbone.modules())]


def reached_by_keyword(backbone: nn.Module) -> bool:
    """Whether keywords bring a tree to all layers. Those of Mamba pass on no keywords and need it as a mask."""
    return not any(hasattr(scope, SCAN) for scope in _scopes(backbone))


def reads_in_order(backbone: nn.Module) -> bool:
    """Whether all layers read their tokens in order, so that no token needs a position."""
    scopes = _scopes(backbone)
    attends = any(hasattr(scope, "eager_attention_forward") for scope in scopes)
    return not attends and any(hasattr(scope, CONVOLUTION) for scope in scopes)


def _asking(ours: Callable) -> Callable:
    """Wrap a function that gets the tree as a keyword."""
    ours = torch.compiler.disable(ours)

    def wrap(original: Callable, last: Any) -> Any:
        def function(*args: Any, **options: Any) -> Any:
            lineage = options.pop(KEYWORD, None)
            return original(*args, **options) if lineage is None else ours(lineage, *args, **options)

        return function

    return wrap


def _stepping(ours: Callable) -> Callable:
    """Wrap a function for a single token of each row. Ours declines what it does not know."""

    def wrap(original: Callable, last: Any) -> Any:
        def function(*args: Any, **options: Any) -> Any:
            step = options.pop(KEYWORD, None)
            done = ours(*args, **options) if step == ONE_TOKEN_EACH else NotImplemented
            return original(*args, **options) if done is NotImplemented else done

        return function

    return wrap


def _following(ours: Callable, leader: str) -> Callable:
    """Wrap a function that gets no keywords; it uses the tree of `leader`, which the same layer has called before."""

    def wrap(original: Callable, last: Any) -> Any:
        function = _asking(ours)(original, last)
        return lambda *args, **options: function(*args, **options | {KEYWORD: getattr(last, leader, None)})

    return wrap


def _leading(original: Callable, last: Any) -> Any:
    """Wrap the convolution, whose tree the functions called after it use."""
    convolution = _asking(_convolution)(original, last)

    def function(*args: Any, **options: Any) -> Any:
        last.convolved = options.pop(KEYWORD, None) or getattr(last, "masked", None)
        return convolution(*args, **options | {KEYWORD: last.convolved})

    return function


def _making_masks(original: Callable, last: Any) -> Any:
    """Wrap transformers' mask creation, which would not return a mask of four dimensions for such layers."""

    def function(*args: Any, **options: Any) -> Any:
        mask = options.get("attention_mask")
        return mask if is_tree(mask) else original(*args, **options)

    return function


def _masking(original: Callable, last: Any) -> Any:
    def function(hidden_states: Tensor, attention_mask: Any) -> Tensor:
        last.masked = Lineage.of_mask(attention_mask) if is_tree(attention_mask) else None
        return original(hidden_states, attention_mask) if last.masked is None else hidden_states

    return function


def _convolution(
    lineage: Lineage,
    hidden_states: Tensor,  # (1, C, N)
    weight: Tensor,  # (C, K)
    bias: Tensor | None = None,
    activation: str | None = None,
    **options: Any,
) -> Tensor:
    x = hidden_states[0].T
    out = tree_conv(x.to(weight.dtype), weight, bias, lineage)
    if lineage.keeps:
        ends = lineage.ends()
        last = torch.cat([ends[None], lineage.ancestors(weight.shape[1] - 1)[:, ends]])
        lineage.keep("conv", F.pad(x, (0, 0, 0, 1))[last.flip(0)].permute(1, 2, 0))
    if activation is not None:
        out = ACT2FN[activation](out)
    return out.to(hidden_states.dtype).T[None]


def _delta_rule(
    lineage: Lineage,
    query: Tensor,  # (1, N, Hk, Dk)
    key: Tensor,
    value: Tensor,  # (1, N, H, Dv)
    g: Tensor,  # (1, N, H), or (1, N, H, Dk) in Kimi's
    beta: Tensor,  # (1, N, H)
    *,
    use_qk_l2norm_in_kernel: bool = False,
    **options: Any,
) -> tuple[Tensor, None]:
    q, k, v, decay, beta = (x.squeeze(0).float() for x in (query, key, value, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = _unit_length(q), _unit_length(k)
    out, ends = _recurrence(query.dtype, q, k, v, decay, beta, lineage, scale=q.shape[-1] ** -0.5)
    lineage.keep("recurrent", ends)
    return out.to(query.dtype)[None], None


def _delta_rule_step(
    query: Tensor,  # (R, 1, Hk, Dk)
    key: Tensor,
    value: Tensor,  # (R, 1, H, Dv)
    g: Tensor,  # (R, 1, H), or (R, 1, H, Dk) in Kimi's
    beta: Tensor,  # (R, 1, H)
    *,
    initial_state: Tensor,  # (R, H, Dk, Dv)
    use_qk_l2norm_in_kernel: bool = False,
    **options: Any,
) -> Any:
    if initial_state.dtype != DTYPE or fla.runs(query):  # then the original is fla's
        return NotImplemented
    q, k, v, decay, beta = (x.squeeze(1).float() for x in (query, key, value, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = _unit_length(q), _unit_length(k)
    out = recurrence_step(initial_state, q, k, v, decay, beta, scale=q.shape[-1] ** -0.5)
    return out.to(query.dtype)[:, None], initial_state


def _recurrence(
    dtype: torch.dtype,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor | None,
    lineage: Lineage,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """By fla's kernels where they run, with q, k and v in `dtype`, in which the family itself would call them."""
    recurrence: Callable = tree_recurrence
    if fla.runs(q):
        recurrence, (q, k, v) = fla.tree_recurrence, (x.to(dtype) for x in (q, k, v))
    return recurrence(q, k, v, decay, beta, lineage, scale=scale, ends=lineage.keeps)


def _unit_length(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def _mamba2(
    lineage: Lineage,
    hidden_states: Tensor,  # (1, N, H, Dv)
    dt: Tensor,  # (1, N, H)
    A: Tensor,  # (H,)
    B: Tensor,  # (1, N, Hk, Dk)
    C: Tensor,  # (1, N, Hk, Dk)
    chunk_size: int,
    D: Tensor | None = None,  # (H,)
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **options: Any,
) -> Tensor:
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(*dt_limit).squeeze(0).float()
    x, k, q = (x.squeeze(0).float() for x in (hidden_states, B, C))
    out, ends = _recurrence(x.dtype, q, k, x * dt[..., None], A.float() * dt, None, lineage)
    lineage.keep("recurrent", None if ends is None else ends.mT)  # Mamba-2 keeps states as (Dv, Dk)
    return (out if D is None else out + D[:, None] * x)[None]


def _mamba2_step(
    state: Tensor,  # (R, H, Dv, Dk)
    hidden_states: Tensor,  # (R, H, Dv)
    dt: Tensor,  # (R, H, Dv), A (H, Dv, Dk), D and dt_bias (H, Dv): expanded from one number a head
    A: Tensor,
    B: Tensor,  # (R, Hk, Dk)
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    **options: Any,
) -> Any:
    of_heads = dt.stride(-1) == 0 and A.stride()[1:] == (0, 0) and (dt_bias is None or dt_bias.stride(-1) == 0)
    if state.dtype != DTYPE or not of_heads:
        return NotImplemented
    dt = dt[..., 0]
    if dt_bias is not None:
        dt = dt + dt_bias[:, 0].to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    x, k, q, dt = (y.float() for y in (hidden_states, B, C, dt))
    out = recurrence_step(state.mT, q, k, x * dt[..., None], A[:, 0, 0].float() * dt, None)
    if D is not None:
        out = out + D * x
    return (out if z is None else out * F.silu(z)).to(hidden_states.dtype)


def _mamba(
    lineage: Lineage,
    hidden_states: Tensor,  # (1, D, N)
    dt: Tensor,  # (1, D, N)
    A: Tensor,  # (D, K)
    B: Tensor,  # (1, K, N)
    C: Tensor,  # (1, K, N)
    D: Tensor | None = None,  # (D,)
    z: Tensor | None = None,  # (1, D, N)
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    **options: Any,
) -> Tensor:
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[:, None]
    if delta_softplus:
        dt = F.softplus(dt)
    x, dt, b, c = (y.squeeze(0).T.float() for y in (hidden_states, dt, B, C))
    decay, update = (dt[..., None] * A.float()).exp(), (dt * x)[..., None] * b[:, None]
    states = tree_scan(decay.flatten(1), update.flatten(1), lineage).view_as(decay)
    if lineage.keeps:
        lineage.keep("recurrent", states[lineage.ends()])
    out = (states @ c[..., None]).squeeze(-1).T
    if D is not None:
        out = out + D.float()[:, None] * x.T
    return (out if z is None else out * F.silu(z.squeeze(0)))[None]


def _no_fusion(*args: Any, **options: Any) -> None:
    """Refuse to fuse convolution, recurrence and projections; the layer then calls them one by one."""


WRAPPERS: dict[str, Callable[[Callable, Any], Any]] = {
    CONVOLUTION: _leading,
    "torch_chunk_gated_delta_rule": _asking(_delta_rule),
    "chunk_kimi_delta_attention": _asking(_delta_rule),
    "mamba2_chunk_scan": _asking(_mamba2),
    "mamba2_split_conv1d_scan_combined": _asking(_no_fusion),
    "torch_recurrent_gated_delta_rule": _stepping(_delta_rule_step),
    "recurrent_kimi_delta_attention": _stepping(_delta_rule_step),
    "mamba2_selective_state_update": _stepping(_mamba2_step),
    SCAN: _following(_mamba, "convolved"),
    "mamba_inner_fn": _following(_no_fusion, "masked"),
    "create_recurrent_attention_mask": _making_masks,
    "apply_mask_to_padding_states": _masking,
}
RECURRENCES = {"torch_chunk_gated_delta_rule", "chunk_kimi_delta_attention", "mamba2_chunk_scan", SCAN}
