"""`score`: log-probs and entropies of a batch by one forward over its token tree.

The wrapped model is called, so that DDP and FSDP run their own forwards. The innermost model finds the tree among its
keywords and then runs `forward_here` instead of its own `forward`.
"""

import contextlib
import functools
import types
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from flashpo._causal_lm import CausalLM, Unsupported, text_model
from flashpo.ops.linear_logprob import linear_logprob
from flashpo.ops.token_stats import TokenStats
from flashpo.packing.images import ImageRows
from flashpo.packing.tree import TokenTree

_shown: WeakSet[nn.Module] = WeakSet()  # models that passed the comparison on images


class TreeScores(NamedTuple):
    """What `forward` returns."""

    stats: TokenStats  # (B, C), 0 at tokens that are not scored
    aux_loss: Tensor | None  # the load-balancing loss of a mixture of experts, if it was asked for


def score(
    model: nn.Module,
    tree: TokenTree,
    *,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = ("entropy",),
    fp32_head: bool = False,
) -> TokenStats:
    """Log-probs and other statistics of the scored tokens of a token tree.

    The backbone runs once over the N tokens of the tree, (1, N). Only the hidden states that predict a scored token
    reach the head. The gradient of a shared token is the sum over its rows. Positions count from each row's first
    token.

    The first call with a model compares a token tree with padded rows on a few short rows, as
    `packable(model, check=True)` does, and gives the model our attention, which it keeps. Without a token tree this
    attention calls the one that the model had before.

    Args:
        model: a causal language model of transformers. It may be multimodal, and may be wrapped by PEFT, DDP, FSDP2 or
            torch.compile.
        tree: the token tree that `pack` made.
        temperature: the logits are divided by it.
        outputs: the names of the fields of `TokenStats` to compute in addition to `logprob`.
        fp32_head: compute the head in fp32, whatever the model's dtype, even under autocast.

    Returns:
        TokenStats, each field (B, C); 0 at tokens that are not scored.

    Raises:
        Unsupported: token trees are not right for this model; the message has the reason that `packable` gives, or the
            result of comparing rows with images.
        TypeError, ValueError: an argument is wrong; the message names it.
    """
    return forward(model, tree, temperature=temperature, outputs=outputs, fp32_head=fp32_head).stats


def forward(model: nn.Module, tree: TokenTree, *, aux_loss: bool = False, **options: Any) -> TreeScores:
    """`score`, and the load-balancing loss of a mixture of experts if `aux_loss` is true.

    The loss is that of the padded batch: each token counts once for each row that contains it.

    Args:
        aux_loss: compute the load-balancing loss. The tree must be packed with prune=False.
        options: those of `score`.

    Raises:
        Unsupported, TypeError, ValueError: as in `score`.
    """
    if not isinstance(tree, TokenTree):
        raise TypeError(f"tree must be a TokenTree, as pack makes them, got {type(tree).__name__}")
    prepare(model)
    if tree.images is not None:
        _prepare_for_images(model, tree.images.sample)
    return model(flashpo_tree=tree, aux_loss=aux_loss, **options)


def prepare(model: nn.Module) -> None:
    """Let `model` take token trees, and run each of its norms as one operator on GPUs.

    `score` calls this. A second call does nothing.

    Raises:
        Unsupported: token trees are not right for this model; the message has the reason that
            `packable(model, check=True)` gives.
    """
    from flashpo.packing.parity import check_parity
    from flashpo.packing.support import check_packable

    if getattr(CausalLM.of(model).base.forward, "takes_trees", False):
        return
    check_packable(model)
    check_parity(model)
    accept_trees(model)


def _prepare_for_images(model: nn.Module, sample: ImageRows) -> None:
    from flashpo.packing.parity import image_parity

    base = CausalLM.of(model).base
    if base in _shown:
        return
    if reason := image_parity(model, sample):
        raise Unsupported(reason)
    _shown.add(base)


def accept_trees(model: nn.Module, head: bool = True) -> None:
    """`prepare` without any check. With head=False, `model` is a backbone, which takes a tree instead of its mask."""
    from flashpo import _recurrent
    from flashpo.packing.attention import install
    from flashpo.packing.norms import fuse_norms

    backbone = CausalLM.of(model).backbone if head else model
    install(backbone)
    _recurrent.install(text_model(backbone))
    fuse_norms(text_model(backbone))
    if not head:
        return
    base = CausalLM.of(model).base
    original = base.forward.__func__
    if getattr(original, "takes_trees", False):
        return

    @functools.wraps(original)  # `generate` reads the signature
    def forward(self, *args, flashpo_tree: TokenTree | None = None, **keywords):
        if flashpo_tree is None:
            return original(self, *args, **keywords)
        given = {name: x for name, x in keywords.items() if x is not None}  # PEFT adds inputs that are None
        return forward_here(self, flashpo_tree, **given)

    forward.takes_trees = True  # type: ignore[attr-defined]
    base.forward = types.MethodType(forward, base)


def forward_here(
    model: nn.Module,
    tree: TokenTree,
    *,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = ("entropy",),
    fp32_head: bool = False,
    aux_loss: bool = False,
) -> TreeScores:
    """`forward` for code that already runs inside the wrapped model's forward.

    Args:
        model: the innermost model, to which `prepare` or `accept_trees` was applied.
        tree, temperature, outputs, fp32_head, aux_loss: as for `score` and `forward`.

    Raises:
        ValueError: `aux_loss` is true and the tree is pruned.
    """
    from flashpo.packing.attention import install, installed
    from flashpo.packing.head import gathering, parameters
    from flashpo.packing.inputs import run

    if aux_loss and tree.pruned:
        raise ValueError("aux_loss: the tree lacks tokens that count in it, pack with prune=False")
    lm = CausalLM.of(model)
    if not installed(lm.backbone):
        install(lm.backbone)
    router = {"output_router_logits": True} if aux_loss else {}
    states = run(tree, lm.backbone, **router)
    hidden = states.last_hidden_state.squeeze(0)
    gather = gathering(lm.head)
    with gather() if gather else contextlib.nullcontext():
        weight, bias = parameters(lm.head)
        hidden = hidden[tree.source.to(hidden.device)].to(weight.device)
        with torch.autocast(hidden.device.type, enabled=False) if fp32_head else contextlib.nullcontext():
            stats = linear_logprob(
                hidden.float() if fp32_head else hidden,
                weight,
                tree.target.to(hidden.device),
                bias,
                temperature=temperature,
                logit_scale=lm.scale,
                softcap=lm.softcap,
                outputs=outputs,
                gather=gather,
            )
    stats = TokenStats(*(None if x is None else tree.unpack(x) for x in stats))
    return TreeScores(stats, _aux_loss(lm, states.router_logits, tree) if aux_loss else None)


def _aux_loss(lm: CausalLM, router_logits: Any, tree: TokenTree) -> Any:
    """The load-balancing loss of transformers. It weights tokens by a mask; ours is how many rows have each token."""
    from flashpo._hosts.transformers import load_balancing_loss

    base = lm.base  # it has these numbers under the same names in all families; its configuration does not
    return load_balancing_loss(router_logits, base.num_experts, base.num_experts_per_tok, tree.copies[None])
