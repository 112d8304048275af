"""`ImageTrial`: scores a few rows with images as padded rows and as a token tree, to compare the two."""

from typing import Any

import torch
from torch import Tensor, nn

from flashpo.packing.images import ROWS, ImageRows, Images
from flashpo.packing.tree import TokenTree, pack
from flashpo.packing.trial import Trial


class ImageTrial(Trial):
    """A `Trial` whose rows have images.

    sample: the row of a batch from which the rows are made.
    """

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
    """The image fields of some of the rows."""
    # contiguous, as processors return them, because some models view them in another shape
    return {name: x.unflatten(0, (ROWS, -1))[rows].flatten(0, 1).contiguous() for name, x in images.items()}
