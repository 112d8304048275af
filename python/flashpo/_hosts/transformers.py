"""transformers: what FlashPO reads and calls there that is not public, or that was another way in earlier versions."""

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

# Of a config: the name of its attention. The public property walks sub-configs and checks names.
ATTENTION = "_attn_implementation_internal"
# Of a model: that the hooks are there which capture hidden states and routers' outputs. They stay for good.
HOOKED = "_output_capturing_hooks_installed"
_CHECKPOINTING = "forward_with_checkpointing"  # the forward that a decoder layer's class gets

_OF_KINDS = {  # which layers an option is for
    "sliding_window": ("sliding_attention", "chunked_attention", "hybrid_sliding"),
    "number_of_states": ("conv", "linear_attention", "hybrid", "hybrid_sliding"),
}


def attends_in_blocks(model: Any) -> bool:
    """Whether its family ever lets the tokens of a block, such as those of an image, see each other both ways."""
    return _mentions_blocks(type(model).__module__)


@functools.cache
def _mentions_blocks(module: str) -> bool:
    source = inspect.getsource(sys.modules[module])
    return "block_sequence_ids" in source or "or_mask_function" in source  # the latter in earlier versions


@contextlib.contextmanager
def models_stay_whole() -> Iterator[None]:
    """Within it models are made with all of their weights; under ZeRO-3 transformers shards every model that it makes.

    Raises:
        ValueError: ZeRO-3 is on, and this transformers has no way around it.
    """
    flag = "_is_ds_init_called"  # whether someone else has seen to the sharding of what is made
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
    """Where the model was loaded from, empty where it was not."""
    return getattr(config, "_name_or_path", "")


def layer_types(config: PreTrainedConfig) -> tuple[list[str], list[dict[str, Any]]]:
    """The type of each layer, and what the layer's cache is made with."""
    types, options = get_layer_types_and_kwargs(config)
    if isinstance(options, dict):  # before 5.19 one for all layers
        options = [{name: x for name, x in options.items() if kind in _OF_KINDS.get(name, types)} for kind in types]
    return list(types), list(options)


def merged_generation_config(model: PreTrainedModel, config: GenerationConfig) -> GenerationConfig:
    """`config` with the model's own defaults for what it does not set, as `generate` would read it."""
    return model._prepare_generation_config(config)[0]  # type: ignore[operator]


def default_generation_params() -> dict[str, Any]:
    return GenerationConfig()._get_default_generation_params()


def takes_attentions(model: PreTrainedModel) -> bool:
    """Whether its layers look their attention up by the name in the config."""
    return model._can_set_attn_implementation()


def without_checkpointing(forward: Any) -> Any:
    """A layer class's own forward, of that which checkpoints it; FSDP2 makes a class that wraps it once more."""
    while forward.__code__.co_name == _CHECKPOINTING:
        forward = forward.__wrapped__
    return forward


def checkpoints(layer: Any) -> bool:
    """Whether its class's forward is about to checkpoint it. In other versions of transformers calling the layer does,
    around its forward."""
    wraps = type(layer).forward.__code__.co_name == _CHECKPOINTING
    return wraps and layer.gradient_checkpointing and layer.training and torch.is_grad_enabled()


def load_balancing_loss(router_logits: Any, experts: int, of_token: int, mask: Any) -> Any:
    """Of a mixture of experts: the function that every family takes from Mixtral's."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    return load_balancing_loss_func(router_logits, experts, of_token, mask)
