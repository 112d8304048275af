"""Which inputs of a multimodal model have no effect on a batch that is text only, and can be dropped.

Processors give each token a type, which is 0 for text, and TRL's collators pass the types on. If a batch has images but
one of its micro-batches has none, that micro-batch comes with empty image tensors and with counts of 0.
"""

import logging
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from flashpo._causal_lm import CausalLM
from flashpo._precision import one_at_a_time
from flashpo._twin import small_twin
from flashpo.packing import images
from flashpo.packing.images import COUNTS, FIELDS
from flashpo.rollout.support import facts

log = logging.getLogger("flashpo")
TYPES = ("token_type_ids", images.TYPES)
IMAGES = (*FIELDS, "image_position_ids")
CHANGED = 1e-3  # relative difference of logits, far above what rounding in fp32 causes
_answers: dict[Hashable, bool] = {}


def beside_text(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of the batch that have an effect: without those that are None, empty, or known to change nothing."""
    return {name: x for name, x in batch.items() if not _says_nothing(model, name, x)}


def _says_nothing(model: Any, name: str, x: Any) -> bool:
    if x is None:
        return True
    if name in IMAGES:
        return len(x) == 0
    if name in COUNTS:
        return not any(x)
    return name in TYPES and _all_zero(x) and zeros_change_nothing(model, name)


def _all_zero(types: Any) -> bool:
    return not types.any() if isinstance(types, Tensor) else not any(map(any, types))


def zeros_change_nothing(model: Any, name: str) -> bool:
    """Whether types of 0 under that name have the same effect on `model` as no types.

    The model's small twin is asked, once per process for each class and config. In PaliGemma, types of 0 do have an
    effect: they let the tokens of a prompt attend in both directions.
    """
    return _says_twin(model, name, lambda ids: {name: torch.zeros_like(ids)}, text_alone=False)


def padding_changes_nothing(model: Any) -> bool:
    """Whether adding a constant to all positions, as padding on the left may do, changes nothing for `model`.

    This is so if only the distances between tokens matter. It is not so in GPT-2 and other models that have an
    embedding for each position. The small twin is asked, as in `zeros_change_nothing`.
    """
    shifted = lambda ids: {"position_ids": torch.arange(5, 5 + ids.shape[1])[None]}  # noqa: E731
    return _says_twin(model, "position_ids", shifted, text_alone=True)


def _says_twin(model: Any, name: str, more: Callable[[Tensor], dict[str, Tensor]], text_alone: bool) -> bool:
    """Whether the small twin says that the keywords of `more` change nothing.

    text_alone: accept the answer also if the twin is only the part of the model that reads text.
    """
    base: Any = CausalLM.of(model).base
    key = type(base), facts(base.config), name
    with one_at_a_time:
        if key not in _answers:
            _answers[key] = _changes_nothing(base, more, text_alone)
        return _answers[key]


def _changes_nothing(base: Any, more: Callable[[Tensor], dict[str, Tensor]], text_alone: bool) -> bool:
    ids = torch.arange(2, 18, device=base.device)[None]
    try:
        twin: Any = small_twin(base).train()
        with torch.no_grad(), torch.random.fork_rng(), torch.autocast(base.device.type, enabled=False):
            logits = []
            for given in ({}, more(ids)):
                torch.manual_seed(0)  # for dropout
                given = {name: x.to(ids.device) for name, x in given.items()}
                logits.append(twin(input_ids=ids, use_cache=False, **given).logits)
    except Exception as error:  # any exception, because the model's own code runs here
        log.debug("%s are not known to change nothing in %s: %s", [*more(ids)], type(base).__name__, error)
        return False
    plain, other = logits
    whole = text_alone or isinstance(base, type(twin))  # FSDP2 makes a subclass of the model's class
    return whole and bool((plain - other).abs().max() <= CHANGED * plain.abs().max())
