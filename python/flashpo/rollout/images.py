"""Prompts with images in a rollout: which images are equal, their features, and the positions of their tokens.

For the prefix tree, the id of an image token is replaced by a code that stands for the image and the token's place in
it. Prompts therefore share cached tokens of images only where the images are equal. A prefill replaces the codes by the
features of the vision tower.
"""

import contextlib
import inspect
import types
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flashpo._causal_lm import CausalLM, Unsupported
from flashpo.packing.images import TYPES, Distinct, Images, Unit, flattened
from flashpo.packing.inputs import features_by, positions_of

CODES = 1 << 40  # the smallest code: larger than the token ids of any vocabulary
PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index", "audio_token_id")


def of_prompts(model: Any, prompts: Sequence[Sequence[int]], fields: Mapping[str, Any]) -> Images:
    """The Images of prompts without padding.

    Args:
        fields: The tensors that the processor returned for the prompts besides their ids.

    Raises:
        TypeError, ValueError: See `Images.of`.
    """
    device = next(model.parameters()).device
    ids, live = padded(prompts, device)
    given = dict(fields)
    if given.get(TYPES) is not None:
        given[TYPES] = padded([_of_prompt(own, prompt) for own, prompt in zip(given[TYPES], prompts)], device)[0]
    images = Images.of(model, ids, live, given)
    if hasattr(CausalLM.of(model).backbone, "compute_3d_position_ids"):
        images = images._replace(types=(images.code >= 0).long().to(ids.device))
    return images


def _of_prompt(types: Any, prompt: Sequence[int]) -> list[int]:
    """The types of a prompt's tokens, which the processor may have padded on the left."""
    return torch.as_tensor(types).tolist()[-len(prompt) :]


def padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, mask) of prompts padded on the right with -1."""
    width = max(map(len, prompts))
    ids = torch.tensor([[*prompt, *[-1] * (width - len(prompt))] for prompt in prompts], device=device)
    return ids, (ids >= 0).long()


def placeholders(config: Any) -> tuple[int, ...]:
    """The ids that stand for images, videos or audio. They are never sampled."""
    return tuple(x for name in PLACEHOLDERS if isinstance(x := getattr(config, name, None), int))


class Shown:
    """The images of a call, or of all calls of a session, with their features.

    Args:
        most: The largest number of image tokens whose images the vision tower computes at once.
    """

    def __init__(self, parts: CausalLM, most: int):
        self.parts, self.most = parts, most
        self.distinct = Distinct()
        self.token = 0
        self._features: dict[tuple[Hashable, int], list[Tensor]] = {}  # (adapters, unit) -> pooled, then deepstack
        self._in_parts = False  # whether the model returns features image by image
        self._device = next(parts.base.parameters()).device

    def told_apart(self, prompts: Sequence[Sequence[int]], images: Images) -> list[list[int]]:
        """The prompts with codes in place of image tokens."""
        self.token = images.token
        codes = torch.zeros(sum(unit.length for unit in images.units), dtype=torch.int64, device="cpu")
        for unit in images.units:
            parts = {name: x.clone() for name, x in images.fields_of(unit.entries).items()}
            found = self.distinct.unit(parts, range(0), unit.length)
            codes[unit.start : unit.start + unit.length] = CODES + found.start + torch.arange(unit.length, device="cpu")
        coded = []
        for prompt, code in zip(prompts, images.code):
            own = code[: len(prompt)].tolist()
            coded.append([token if c < 0 else int(codes[c]) for token, c in zip(prompt, own)])
        return coded

    def embed(self, space: Hashable) -> None:
        """Runs the vision tower on the images that it has not yet computed under the adapters of `space`."""
        missing = [i for i in range(len(self.distinct.units)) if (space, i) not in self._features]
        while missing:
            some, length = missing[:1], self.distinct.units[missing[0]].length
            shapes = self._shapes(some[0])
            for i in missing[1:]:
                length += self.distinct.units[i].length
                if length > self.most or self._shapes(i) != shapes:
                    break
                some.append(i)
            self._embed(space, some)
            missing = missing[len(some) :]

    def _shapes(self, i: int) -> dict[str, torch.Size]:
        return {name: x.shape[1:] for name, x in self.distinct.parts[i].items()}

    def _embed(self, space: Hashable, some: list[int]) -> None:
        backbone: Any = self.parts.backbone
        fields = {name: torch.cat([self.distinct.parts[i][name] for i in some]) for name in self.distinct.parts[0]}
        known = inspect.signature(backbone.get_image_features).parameters
        given = {name: x.to(self._device) for name, x in fields.items() if name in known}
        out = backbone.get_image_features(**given, return_dict=True)
        self._in_parts = isinstance(out.pooler_output, list | tuple)
        layers = [flattened(x) for x in (out.pooler_output, *(getattr(out, "deepstack_features", None) or ()))]
        sizes = [self.distinct.units[i].length for i in some]
        if len(layers[0]) != sum(sizes):
            raise Unsupported(f"its images make {len(layers[0])} features, {sum(sizes)} tokens stand for them")
        for i, *own in zip(some, *(layer.split(sizes) for layer in layers)):
            self._features[space, i] = own

    @contextlib.contextmanager
    def placed(self, token: Tensor, space: Hashable) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Within it, a forward of the yielded ids and keywords uses the image features where `token` has codes."""
        shown = token >= CODES
        if not shown.any():
            yield token, {}
            return
        code = (token[shown] - CODES).cpu()
        starts = torch.tensor([unit.start for unit in self.distinct.units], device="cpu")
        unit = torch.searchsorted(starts, code, right=True) - 1
        used, which = unit.unique(return_inverse=True)
        own = [self._features[space, i] for i in used.tolist()]
        lengths = torch.tensor([self.distinct.units[i].length for i in used.tolist()], device="cpu")
        place = (code - starts[unit] + (lengths.cumsum(0) - lengths)[which]).to(token.device)
        pooled, *deeper = (torch.cat(layer)[place] for layer in zip(*own))
        out = types.SimpleNamespace(pooler_output=(pooled,) if self._in_parts else pooled)
        if deeper:
            out.deepstack_features = [(x,) for x in deeper]
        with features_by(self.parts.backbone, lambda *args, **keywords: out):
            yield token.masked_fill(shown, self.token), {"pixel_values": torch.zeros(1, device=token.device)}

    def turns(self, path: Sequence[int], begin: int) -> Tensor | None:
        """Rotary positions (axes, tokens) of the tokens path[begin:]; None where they simply count tokens.

        Args:
            path: All tokens of a sequence from its first one on, with codes in place of image tokens.
        """
        whole = [*path, *self._rest_of_the_last(path)]
        ids = torch.tensor([whole], device=self._device)
        shown = ids >= CODES
        if not shown.any():
            return None
        grids = [parts.get("image_grid_thw") for parts in self._along(whole)]
        rows = {"input_ids": ids.masked_fill(shown, self.token), "attention_mask": torch.ones_like(ids)}
        rows[TYPES] = shown.int()
        if grids and grids[0] is not None:
            rows["image_grid_thw"] = torch.cat([x for x in grids if x is not None]).to(self._device)
        found = positions_of(self.parts.backbone, rows)
        return None if found is None else found[:, 0, begin : len(path)]

    def ahead(self, path: Sequence[int]) -> int:
        """The rotary position of the token after the path, minus the number of tokens in the path."""
        turns = self.turns(path, 0)
        return 0 if turns is None else int(turns.max()) + 1 - len(path)

    def _units_at(self, code: int) -> tuple[int, Unit]:
        starts = [unit.start for unit in self.distinct.units]
        i = next(i for i in reversed(range(len(starts))) if starts[i] <= code)
        return i, self.distinct.units[i]

    def _rest_of_the_last(self, path: Sequence[int]) -> range:
        """The remaining codes of an image, if the path ends in the middle of that image."""
        if path[-1] < CODES:
            return range(0)
        _, unit = self._units_at(path[-1] - CODES)
        return range(path[-1] + 1, CODES + unit.start + unit.length)

    def _along(self, path: Sequence[int]) -> list[dict[str, Tensor]]:
        """The tensors of the images on a path, in their order."""
        begins = {unit.start: i for i, unit in enumerate(self.distinct.units)}
        return [self.distinct.parts[begins[x - CODES]] for x in path if x - CODES in begins]
