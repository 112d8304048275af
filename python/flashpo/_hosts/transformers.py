"""transformers: what FlashPO uses there that is not public or that differs between versions."""

import contextlib
import functools
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, modeling_utils
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_layers import GradientCheckpointingLayer as DecoderLayer  # noqa: F401

# The attribute of a config that names its attention. The public property also walks sub-configs and checks the name.
ATTENTION = "_attn_implementation_internal"
# The attribute of a model that is True once it has the hooks that capture hidden states and the outputs of routers.
# These hooks are never removed.
HOOKED = "_output_capturing_hooks_installed"
_CHECKPOINTING = "forward_with_checkpointing"  # name of the forward that transformers gives to decoder layers

_OF_KINDS = {  # the types of layers to which an option applies
    "sliding_window": ("sliding_attention", "chunked_attention", "hybrid_sliding"),
    "number_of_states": ("conv", "linear_attention", "hybrid", "hybrid_sliding"),
}


def attends_in_blocks(model: Any) -> bool:
    """Whether the model's family can let the tokens of a block, for example of an image, see each other in both
    directions."""
    return _mentions_blocks(type(model).__module__)


@functools.cache
def _mentions_blocks(module: str) -> bool:
    source = inspect.getsource(sys.modules[module])
    return "block_sequence_ids" in source or "or_mask_function" in source  # the second one in earlier versions


@contextlib.contextmanager
def models_stay_whole() -> Iterator[None]:
    """Within it, new models have all of their weights. Otherwise transformers shards every new model under ZeRO-3.

    Raises:
        ValueError: ZeRO-3 is on, and this transformers cannot make whole models.
    """
    flag = "_is_ds_init_called"  # tells transformers that somebody else takes care of sharding new models
    before = getattr(modeling_utils, flag, None)
    if before is None and is_deepspeed_zero3_enabled():
        raise ValueError("DeepSpeed would shard its weights")
    if before is None:
        yield
        return
    setattr(modeling_utils, flag, True)
    try:
        yield
    finally:
        setattr(modeling_utils, flag, before)


def name_or_path(config: PreTrainedConfig) -> str:
    """The name or path that the model was loaded from; empty if it was not loaded."""
    return getattr(config, "_name_or_path", "")


def layer_types(config: PreTrainedConfig) -> tuple[list[str], list[dict[str, Any]]]:
    """The type of each layer, and the options with which the layer's cache is made."""
    types, options = get_layer_types_and_kwargs(config)
    if isinstance(options, dict):  # before 5.19 there is one dict for all layers
        options = [{name: x for name, x in options.items() if kind in _OF_KINDS.get(name, types)} for kind in types]
    return list(types), list(options)


def merged_generation_config(model: PreTrainedModel, config: GenerationConfig) -> GenerationConfig:
    """`config` as `generate` would read it: options that it does not set come from the model's generation config."""
    return model._prepare_generation_config(config)[0]  # type: ignore[operator]


def default_generation_params() -> dict[str, Any]:
    return GenerationConfig()._get_default_generation_params()


def takes_attentions(model: PreTrainedModel) -> bool:
    """Whether the model's layers look their attention function up by the name in the config."""
    return model._can_set_attn_implementation()


def without_checkpointing(forward: Any) -> Any:
    """The own forward of a layer's class, from `forward`, which wraps it for gradient checkpointing.

    It can be wrapped twice, because the class that FSDP2 makes of the layer's class wraps it again.
    """
    while forward.__code__.co_name == _CHECKPOINTING:
        forward = forward.__wrapped__
    return forward


def checkpoints(layer: Any) -> bool:
    """Whether the forward of the layer's class would use gradient checkpointing now.

    In other versions of transformers not the forward but the call of the layer around it does the checkpointing.
    """
    wraps = type(layer).forward.__code__.co_name == _CHECKPOINTING
    return wraps and layer.gradient_checkpointing and layer.training and torch.is_grad_enabled()


def load_balancing_loss(router_logits: Any, experts: int, of_token: int, mask: Any) -> Any:
    """The load-balancing loss of a mixture of experts. All families use Mixtral's function."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    return load_balancing_loss_func(router_logits, experts, of_token, mask)
