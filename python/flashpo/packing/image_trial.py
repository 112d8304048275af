"""A few rows with images, scored as padded rows and as a token tree: the trial of a model that reads images."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flashpo._causal_lm import CausalLM
from flashpo.packing.images import TYPES, Images
from flashpo.packing.tree import TokenTree, pack
from flashpo.packing.trial import Trial

SCORED = 8  # tokens behind the images of each row
ROWS = 3


class ImageRows(NamedTuple):
    """The beginning of a row of a batch, up to its last image token, and what follows it; on the host.

    Three rows are made of it: two that part behind the same images, and one like the first with other images, so that
    images which are shared by mistake, or are not, or positions that are off, give other log-probs or gradients.
    """

    head: Tensor  # (T,)
    tail: Tensor  # (SCORED,)
    fields: dict[str, Tensor]
    types: Tensor | None  # (T,)

    @classmethod
    def of(cls, images: Images, input_ids: Tensor, attention_mask: Tensor) -> "ImageRows | None":
        """Of the shortest row that has an image; None where no row has one."""
        shown = (images.code >= 0).sum(1)
        candidates = [row for row in range(len(shown)) if shown[row] > 0]
        if not candidates:
            return None
        row = min(candidates, key=lambda row: int(shown[row]))
        last = int((images.code[row] >= 0).nonzero().max())
        first = int(attention_mask[row].int().argmax())
        ids = input_ids[row].cpu()
        words = ids[attention_mask[row].bool().cpu() & (images.code[row] < 0)]
        tail = words.repeat(SCORED)[-SCORED:] if len(words) else ids[:1].repeat(SCORED)
        types = None if images.types is None else images.types[row, first : last + 1]
        return cls(ids[first : last + 1], tail, images.fields_of(images.of_rows[row]), types)

    def ids(self) -> Tensor:
        """(ROWS, T)"""
        other = self.tail.flip(0)
        other[0] = self.tail[0] - 1 if self.tail[0] > 2 else self.tail[0] + 1  # parts at once
        return torch.stack([torch.cat([self.head, end]) for end in (self.tail, other, self.tail)])

    def images(self, device: torch.device, differentiable: bool = False) -> dict[str, Tensor]:
        """Fields of all rows."""
        pixels = self.fields["pixel_values"].to(device, torch.float32)
        images = {name: torch.cat([x] * ROWS).to(device) for name, x in self.fields.items()}
        images["pixel_values"] = torch.cat([pixels, pixels, pixels * -0.5]).requires_grad_(differentiable)
        return images

    def types_of(self, ids: Tensor) -> dict[str, Tensor]:
        """Of rows that may go on behind these."""
        if self.types is None:
            return {}
        types = torch.zeros_like(ids, dtype=self.types.dtype)
        types[:, : len(self.types)] = self.types.to(ids.device)
        return {TYPES: types}

    def small(self, twin: Any) -> "ImageRows":
        """The same with the vocabulary of a small twin."""
        config = twin.config
        token, words = config.image_token_id, CausalLM.of(twin).vocabulary - 8
        shown = self.types.cpu() != 0 if self.types is not None else self.head == self.head[-1]
        return self._replace(head=(2 + self.head % words).masked_fill(shown, token), tail=2 + self.tail % words)


class ImageTrial(Trial):
    """`Trial` on such rows."""

    def __init__(self, model: nn.Module, sample: ImageRows, parameters: bool = False):
        self.sample = sample
        super().__init__(model, parameters=parameters)
        differentiable = self.differentiable and not parameters
        self.images = sample.images(self.ids.device, differentiable)
        self.beside = [self.images["pixel_values"]] if differentiable else []

    def _rows(self, config: Any) -> tuple[Tensor, Tensor, Tensor]:
        ids = self.sample.ids()
        scored = torch.zeros_like(ids)
        scored[:, len(self.sample.head) :] = 1
        return ids, torch.ones_like(ids), scored

    def _beside(self, rows: slice, ids: Tensor) -> dict[str, Any]:
        return rows_of(self.images, rows) | self.sample.types_of(ids)

    def _of_distinct(self, gradient: Tensor) -> Tensor:
        first, again, other = gradient.unflatten(0, (ROWS, -1))
        return torch.stack([first + again, other])

    def _pack(self, ids: Tensor, live: Tensor, scored: Tensor) -> TokenTree:
        fields = {name: x[: len(x) // ROWS * len(ids)] for name, x in self.images.items()}
        images = Images.of(self.model, ids, live, fields | self.sample.types_of(ids))
        return pack(ids, live, scored, min_saved=1, images=images)


def rows_of(images: dict[str, Tensor], rows: slice | list[int]) -> dict[str, Tensor]:
    """The fields of some of the rows."""
    return {name: x.unflatten(0, (ROWS, -1))[rows].flatten(0, 1) for name, x in images.items()}
