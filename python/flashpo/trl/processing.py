"""Runs the processor of a trainer once for each distinct prompt with images.

TRL gives the processor each prompt as many times as it is to be completed, and the processor resizes and cuts up the
prompt's images each time. Here the processor gets each distinct prompt once, and its results are repeated for the
copies. The first results are compared with those for all copies, because a processor may draw random numbers, for
example.
"""

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from flashpo._causal_lm import CausalLM, Unsupported
from flashpo.packing.images import FIELDS, TYPES, Images
from flashpo.packing.support import why_no_images
from flashpo.rollout.images import padded
from flashpo.trl._fallback import Fallback
from flashpo.trl.images import counted

OF_TOKENS = ("input_ids", "attention_mask", "token_type_ids", TYPES)  # these results have a row for each prompt


class DistinctPrompts:
    """The calls of one trainer's processor."""

    def __init__(self) -> None:
        self._agreed: set[Hashable] = set()  # the options of calls whose results have been compared
        self._refuse = Fallback("FlashPO leaves the processor to TRL, which runs it for each completion: {reason}.")

    @contextlib.contextmanager
    def processed_once(self, trainer: Any) -> Iterator[None]:
        """Within the block, the trainer has a copy of its processor that gets each distinct prompt once."""
        processor = trainer.processing_class
        if not isinstance(processor, ProcessorMixin) or not _reads_images(trainer.model):
            yield
            return
        trainer.processing_class = self._copy(processor, trainer.model)
        try:
            yield
        finally:
            trainer.processing_class = processor

    def _copy(self, processor: ProcessorMixin, model: Any) -> ProcessorMixin:
        """A processor of a subclass, because `apply_chat_template` calls the class's `__call__`. It shares all
        attributes with the original."""
        kind: Any = type(processor)

        @functools.wraps(kind.__call__)
        def call(_, *args, **given):
            return self._call(functools.partial(kind.__call__, processor), model, *args, **given)

        copy: Any = object.__new__(type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__}))
        vars(copy).update(vars(processor))
        return copy

    def _call(self, process: Callable, model: Any, *args: Any, images: Any = None, text: Any = None, **options: Any):
        everything = functools.partial(process, *args, images=images, text=text, **options)
        if self._refuse.first or args or not _are_rows(images, text):
            return everything()
        try:
            first, which = distinct(text, images)
            if len(first) == len(text):
                return everything()
            shown = [images[i] for i in first]
            once = process(images=shown, text=[text[i] for i in first], **options)
            results = repeated(model, once, shown, which)
        except Exception as error:  # any exception, because the processor's own code runs here
            plain = everything()  # raises it again if the input is wrong
            self._refuse(f"{type(error).__name__}: {error}")
            return plain
        key = repr(sorted(options.items()))
        if key not in self._agreed:
            plain = everything()
            if not _same(results, plain):
                self._refuse("its results for a prompt depend on the prompts beside it, or are random")
                return plain
            self._agreed.add(key)
        return results


def _reads_images(model: Any) -> bool:
    """Whether FlashPO runs the model on images. If not, another fallback says so."""
    try:
        return not why_no_images(CausalLM.of(model).backbone)
    except Unsupported:
        return False


def _are_rows(images: Any, text: Any) -> bool:
    """Whether there is a list of images for each text."""
    rows = isinstance(images, list) and isinstance(text, list) and len(images) == len(text)
    return rows and all(isinstance(own, list) for own in images)


def distinct(text: Sequence[str], images: Sequence[Sequence[Any]]) -> tuple[list[int], list[int]]:
    """The first of each group of equal rows, and for each row the number of its group.

    Rows are equal if their texts and all of their images are. Images are compared exactly.
    """
    first: list[int] = []
    which: list[int] = []
    alike: dict[Hashable, list[int]] = {}  # text and number of images -> groups
    for row, own in enumerate(images):
        others = alike.setdefault((text[row], len(own)), [])
        group = next((i for i in others if all(map(_equal, images[first[i]], own))), len(first))
        if group == len(first):
            first.append(row)
            others.append(group)
        which.append(group)
    return first, which


def _equal(a: Any, b: Any) -> bool:
    """Whether two images, or two results of a processor, are known to be equal."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Image.Image):
        a.load()  # a part of the info may come with the pixels
        b.load()
        return a == b  # pixels, palette, and info such as the orientation
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return isinstance(a, str | int) and a == b


def repeated(model: Any, once: BatchFeature, images: Sequence[Sequence[Any]], which: list[int]) -> BatchFeature:
    """The results of a processor, repeated: row i becomes what row which[i] is in `once`.

    images: those of each row of `once`.

    Raises:
        TypeError, ValueError: it is not known which part of a result belongs to which row.
    """
    fields = {name: x for name, x in once.items() if name not in OF_TOKENS}
    if unknown := fields.keys() - {*FIELDS}:
        raise ValueError(f"what belongs to which prompt is not known of {', '.join(sorted(unknown))}")
    ids, live = padded([torch.as_tensor(x).tolist() for x in once["input_ids"]], torch.device("cpu"))
    taken = Images.of(model, ids, live, fields | counted(fields, images)).fields_of_rows(which)
    results: dict[str, Any] = {}
    for name, x in once.items():
        if name in taken:
            results[name] = _as_given(taken[name], x)
        else:
            results[name] = [list(x[i]) for i in which] if isinstance(x, list) else x[which]
    return type(once)(results)


def _as_given(taken: Tensor, given: Any) -> Any:
    """A tensor in the form in which the processor gives it: an array, a tensor or a list of them."""
    if isinstance(given, list):
        return [_as_given(x, given[0]) for x in taken]
    return taken.numpy() if isinstance(given, np.ndarray) else taken


def _same(a: BatchFeature, b: BatchFeature) -> bool:
    return type(a) is type(b) and a.keys() == b.keys() and all(_equal(x, b[name]) for name, x in a.items())
