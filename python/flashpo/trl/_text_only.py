"""What TRL hands to a multimodal model beside text, and which of it says nothing where there is no image.

Processors give every token a type, and TRL's collators pass it on: 0 for text. A micro-batch without an image, of a
batch that has some, comes with empty tensors and counts of 0.
"""

import logging
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from flashpo._causal_lm import CausalLM
from flashpo._precision import one_at_a_time
from flashpo.packing import images
from flashpo.packing.images import COUNTS, FIELDS
from flashpo.rollout.support import facts
from flashpo.rollout.twin import small_twin

log = logging.getLogger("flashpo")
TYPES = ("token_type_ids", images.TYPES)
IMAGES = (*FIELDS, "image_position_ids")
CHANGED = 1e-3  # relative: no rounding of fp32 comes near it
_answers: dict[Hashable, bool] = {}


def beside_text(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch without what says nothing about its text."""
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
    """Whether types of 0 under that name are to `model` as none: asked of its small twin once a process for each class
    and config. Not so in PaliGemma, where they let the tokens of a prompt attend both ways.
    """
    return _says_twin(model, name, lambda ids: {name: torch.zeros_like(ids)}, text_alone=False)


def padding_changes_nothing(model: Any) -> bool:
    """Whether rows may begin behind padding that positions count: all that counts is how far apart tokens are. Asked
    as above; not so in GPT-2 and others with an embedding for each position."""
    shifted = lambda ids: {"position_ids": torch.arange(5, 5 + ids.shape[1])[None]}  # noqa: E731
    return _says_twin(model, "position_ids", shifted, text_alone=True)


def _says_twin(model: Any, name: str, more: Callable[[Tensor], dict[str, Tensor]], text_alone: bool) -> bool:
    """Whether `more` keywords change nothing; `text_alone`: also where the twin is the part that reads text."""
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
    except Exception as error:  # of any kind: it is the model's own code
        log.debug("%s are not known to change nothing in %s: %s", [*more(ids)], type(base).__name__, error)
        return False
    plain, other = logits
    whole = text_alone or isinstance(base, type(twin))  # FSDP2 makes a subclass of the model's class
    return whole and bool((plain - other).abs().max() <= CHANGED * plain.abs().max())
