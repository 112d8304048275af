"""A transformers causal language model split into its parts: logits = cap(scale * head(backbone(...)))."""

import inspect
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# For these layer types, keys and values are all that the next token needs
CACHED = ("full_attention", "sliding_attention")
WITH_ATTENTION = ("hybrid", "hybrid_sliding")  # these keep a state besides keys and values
STATEFUL = ("linear_attention", "conv", *WITH_ATTENTION)
CHUNKED = "chunked_attention"  # attention to the tokens of a sequence's own chunk
INDEXED = "indexed_attention"  # attention to the keys that a smaller attention has picked
LOGIT_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
ALONE = ("mlp", "moe")  # these see each token by itself


class Unsupported(RuntimeError):
    """The model does something that FlashPO does not reproduce; the message says what."""


class CausalLM(NamedTuple):
    base: Any  # the PreTrainedModel inside of all wrappers
    backbone: nn.Module
    head: Any
    scale: float
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, H) -> (N, V). The head is called as a module, so that adapters and replaced forwards on it take
        effect."""
        logits = self.head(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits

    @property
    def text(self) -> Any:
        """The part of the backbone that reads text."""
        return text_model(self.backbone)

    @property
    def vocabulary(self) -> int:
        """The number of token ids that the model embeds."""
        layer = self.base.get_input_embeddings()
        while not hasattr(layer, "num_embeddings"):  # wrapped by PEFT
            layer = layer.base_layer if hasattr(layer, "base_layer") else layer.original_module
        return layer.num_embeddings

    @classmethod
    def of(cls, model: nn.Module) -> "CausalLM":
        """Take a model apart, looking through torch.compile, DistributedDataParallel, DeepSpeed and PEFT.

        Raises:
            Unsupported: there is no backbone with a head.
        """
        from transformers import PreTrainedModel

        *_, base = layers_of_wrapping(model)
        if not isinstance(base, PreTrainedModel):
            raise Unsupported(f"{type(base).__name__} is no model of transformers")
        backbone, head = base.base_model, base.get_output_embeddings()
        if backbone is base:  # base_model_prefix may be the name in a larger model of which this is a part
            backbone = getattr(base, "model", base)
        if backbone is base or head is None:
            raise Unsupported(f"{type(base).__name__} has no language model head")
        config = base.config.get_text_config()
        scale = _logit_scale(config)
        if config is not base.config and not _reads(type(base), LOGIT_SCALES):
            scale = 1.0
        return cls(base, backbone, head, scale, getattr(config, "final_logit_softcapping", None))


def text_model(backbone: Any) -> Any:
    """The part of a multimodal backbone that reads text; without images only its layers run. Any other backbone is
    returned as it is."""
    return backbone if backbone.config.get_text_config() is backbone.config else backbone.get_decoder()


def masks_windows(module: nn.Module) -> bool:
    """Whether the module's family ever asks transformers for the mask of a sliding window. A config may have a window
    that the family does not use."""
    return hasattr(sys.modules[type(module).__module__], "create_sliding_window_causal_mask")


def layers_of_wrapping(model: Any) -> Iterator[Any]:
    """Yield the model, the model that it wraps, and so on to the innermost one."""
    while model is not None:
        yield model
        model = _wrapped(model)


def _wrapped(model: Any) -> nn.Module | None:
    if hasattr(model, "get_base_model"):
        return model.get_base_model()
    return next((getattr(model, name) for name in ("_orig_mod", "module") if hasattr(model, name)), None)


def _reads(kind: Any, names: tuple[str, ...]) -> bool:
    """Whether the class's forward reads one of these names. A multimodal class may omit what its text model's class
    does with the logits; for instance, Aya Vision omits Cohere's scale."""
    return not {*names}.isdisjoint(inspect.unwrap(kind.forward).__code__.co_names)


def _logit_scale(config: Any) -> float:
    """The factor by which the family multiplies its logits, whatever the config calls it."""
    *factors, divisor = LOGIT_SCALES
    for name in factors:
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, divisor, None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / scaling
