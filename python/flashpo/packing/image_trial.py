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
        device, differentiable = self.ids.device, self.differentiable and not parameters
        pixels = sample.fields["pixel_values"].to(device, torch.float32)
        self.images = {name: torch.cat([x] * ROWS).to(device) for name, x in sample.fields.items()}
        self.images["pixel_values"] = torch.cat([pixels, pixels, pixels * -0.5]).requires_grad_(differentiable)
        self.beside = [self.images["pixel_values"]] if differentiable else []

    def _rows(self, config: Any) -> tuple[Tensor, Tensor, Tensor]:
        head, tail = self.sample.head, self.sample.tail
        other = tail.flip(0)
        other[0] = tail[0] - 1 if tail[0] > 2 else tail[0] + 1  # parts at once
        ids = torch.stack([torch.cat([head, end]) for end in (tail, other, tail)])
        scored = torch.zeros_like(ids)
        scored[:, len(head) :] = 1
        return ids, torch.ones_like(ids), scored

    def _beside(self, rows: slice, ids: Tensor) -> dict[str, Any]:
        own = {name: x.unflatten(0, (ROWS, -1))[rows].flatten(0, 1) for name, x in self.images.items()}
        return own | self._types(ids)

    def _types(self, ids: Tensor) -> dict[str, Tensor]:
        if self.sample.types is None:
            return {}
        types = torch.zeros_like(ids, dtype=self.sample.types.dtype)
        types[:, : len(self.sample.types)] = self.sample.types.to(ids.device)
        return {TYPES: types}

    def _of_distinct(self, gradient: Tensor) -> Tensor:
        first, again, other = gradient.unflatten(0, (ROWS, -1))
        return torch.stack([first + again, other])

    def _pack(self, ids: Tensor, live: Tensor, scored: Tensor) -> TokenTree:
        fields = {name: x[: len(x) // ROWS * len(ids)] for name, x in self.images.items()}
        images = Images.of(self.model, ids, live, fields | self._types(ids))
        return pack(ids, live, scored, min_saved=1, images=images)
