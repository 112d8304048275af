"""Log-probs and entropies of a batch by one forward over its token tree.

A model is called as it is wrapped, so that DDP and FSDP see a forward of theirs. Inside of it the innermost model finds
the tree among its keywords and runs `forward_here` in the place of its own `forward`.
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

_shown: WeakSet[nn.Module] = WeakSet()  # models that were compared on images


class TreeScores(NamedTuple):
    stats: TokenStats  # (B, C)
    aux_loss: Tensor | None  # of a mixture of experts, where it was asked for


def score(
    model: nn.Module,
    tree: TokenTree,
    *,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = ("entropy",),
    fp32_head: bool = False,
) -> TokenStats:
    """Log-probs and side statistics of the tokens that `pack` was told to score, over (B, C), 0 at other places.

    The backbone runs once over (1, N) tokens; only rows that predict a scored token reach the head. The gradient of a
    shared token is the sum over its rows. Positions count from a row's first token.

    Args:
        model: a causal language model of transformers, also a multimodal one, and wrapped by PEFT, DDP, FSDP2 or
            torch.compile. It keeps our attention from then on, which leaves everything but token trees to the one it
            had.
        temperature: the logits are divided by it.
        outputs: names of the `TokenStats` fields wanted besides `logprob`.
        fp32_head: run the head in fp32 whatever the model's dtype, also under autocast.

    Raises:
        Unsupported: with the reason that `packable` gives, or what a comparison of rows with images finds.
        TypeError, ValueError: the message names the argument.
    """
    return forward(model, tree, temperature=temperature, outputs=outputs, fp32_head=fp32_head).stats


def forward(model: nn.Module, tree: TokenTree, *, aux_loss: bool = False, **options: Any) -> TreeScores:
    """`score` with the load-balancing loss of a mixture of experts: that of the padded batch, each token counting as
    often as rows hold it. It takes a tree that is not pruned.
    """
    if not isinstance(tree, TokenTree):
        raise TypeError(f"tree must be a TokenTree, as pack makes them, got {type(tree).__name__}")
    prepare(model)
    if tree.images is not None:
        _prepare_for_images(model, tree.images.sample)
    return model(flashpo_tree=tree, aux_loss=aux_loss, **options)


def prepare(model: nn.Module) -> None:
    """Let `model` take token trees, and run its norms as one operator each on GPUs; `score` does it, too. Later calls
    do nothing.

    Raises:
        Unsupported: with the reason that `packable(model, check=True)` gives.
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
    """`prepare` without a question, also of a backbone (`head=False`), which takes a tree in the place of its mask."""
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
    """For code that already is inside of the wrapped model's forward; `model` is prepared."""
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
    """transformers weights tokens by its mask: ours tells how many rows hold each."""
    from flashpo._hosts.transformers import load_balancing_loss

    base = lm.base  # it knows the numbers under one name, its configuration under several
    return load_balancing_loss(router_logits, base.num_experts, base.num_experts_per_tok, tree.copies[None])
