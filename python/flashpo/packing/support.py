"""Which models can run on token trees: those in which tokens affect each other only in ways that follow the tree, such
as causal attention."""

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from flashpo._causal_lm import ALONE, CACHED, CHUNKED, INDEXED, STATEFUL, CausalLM, Unsupported, text_model
from flashpo._hosts.peft import is_tuner_layer, why_not_trained_by_layers


class Packable(NamedTuple):
    """The answer of `packable`."""

    ok: bool
    reason: str  # why it cannot run on token trees; empty if it can


def packable(model: nn.Module, *, check: bool = False) -> Packable:
    """Whether `score` can run `model`, as far as its configuration and modules tell.

    Args:
        model: a causal language model of transformers, which may be wrapped.
        check: also run the model on a few short rows, and compare a token tree with padded rows. This is done once per
            process for each kind of model. `score` does it before it first runs a model, and the trainers before they
            train. All ranks of a sharded model have to call this together.

    Returns:
        (ok, reason); the reason is empty if the model can run.
    """
    from flashpo.packing.parity import parity

    try:
        check_packable(model)
    except Unsupported as error:
        return Packable(False, str(error))
    reason = parity(model) if check else ""
    return Packable(not reason, reason)


def why_not_packable(backbone: nn.Module) -> str:
    """Why a model without a head cannot run on token trees; empty if it can."""
    return next(iter((*_configuration(backbone.config), *_layers(backbone), "")))


def why_no_images(backbone: Any) -> str:
    """Why rows with images cannot run on token trees; empty if nothing is known against it. `image_parity` may still
    find something."""
    from flashpo._hosts.transformers import attends_in_blocks  # imports transformers

    if not hasattr(backbone, "get_image_features"):
        return f"{type(backbone).__name__} has no get_image_features: how it reads images is not known"
    if attends_in_blocks(backbone):
        return "tokens of an image see each other in both directions"
    return ""


def check_packable(model: nn.Module) -> None:
    """Raise Unsupported with the reason if `packable(model)` is not ok."""
    lm = CausalLM.of(model)
    for reason in (*_head(lm.head), *_adapters(model), *_configuration(lm.base.config), *_layers(lm.backbone)):
        raise Unsupported(f"{lm.base.config.model_type}: {reason}")


def _head(head: Any) -> Iterator[str]:
    from flashpo._hosts.sharding import wraps_in_fsdp1  # imports transformers

    if is_tuner_layer(head):
        yield "there is an adapter on the language model head, which a fused head does not apply"
    elif wraps_in_fsdp1(head):
        yield "FSDP1 wraps the language model head by itself, and gathers it in a forward that a fused head leaves out"
    elif not hasattr(head, "weight"):
        yield f"the language model head is a {type(head).__name__} without a weight"


def _adapters(model: nn.Module) -> Iterator[str]:
    if reason := why_not_trained_by_layers(model):
        yield reason


def _configuration(config: Any) -> Iterator[str]:
    if config.is_encoder_decoder:
        yield "it is an encoder and a decoder"
    config = config.get_text_config()
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        yield "its attention is bidirectional"
    for kind in getattr(config, "layer_types", None) or ():
        if kind not in (*CACHED, CHUNKED, INDEXED, *STATEFUL, *ALONE):
            yield f"it has layers of {kind}"


def _layers(backbone: nn.Module) -> Iterator[str]:
    from flashpo import _recurrent
    from flashpo.packing import dense

    text = text_model(backbone)  # not the towers of images and sounds, which may attend both ways: no tree runs there
    told = "position_ids" in inspect.signature(backbone.forward).parameters
    if not told and not dense.biases(text) and not _recurrent.reads_in_order(text):
        yield "its backbone takes no position_ids"
    for module in text.modules():
        if not getattr(module, "is_causal", True):
            yield f"{type(module).__name__} is not causal"
    kinds = getattr(text.config, "layer_types", None) or []
    yield from _recurrent.refusals(text, [kind for kind in kinds if kind in STATEFUL])
