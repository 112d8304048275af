"""The images of a batch: which tokens stand for which image, and which images are equal.

A processor puts placeholder tokens into the rows and returns the images in separate fields. We distinguish placeholders
by their image and by their place in the image, so that rows share a prefix across an image only if its pixels and sizes
are equal. A field consists of entries. An entry is one image, one tile of an image, or, if the processor pads images,
all images of a row.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashpo._causal_lm import CausalLM

FIELDS = ("pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes")
COUNTS = ("num_images", "num_tiles")  # how many each row has; TRL passes these
TYPES = "mm_token_type_ids"
GENERATED, SCORED = "images_generated", "images_scored"
shared: Counter[str] = Counter()  # batches of trainers in which equal images were computed once
SCORED_BEHIND, ROWS = 8, 3  # of a comparison: how many tokens of each row follow the images, and how many rows
SAMPLES = 64  # images are compared in full only if about so many of their numbers are equal


class Unit(NamedTuple):
    """Entries whose features are consecutive, and where their features begin among those of all distinct units."""

    entries: range
    start: int
    length: int


class TreeImages(NamedTuple):
    """The distinct images of a token tree."""

    fields: dict[str, Tensor]  # what the processor gave for these images
    feature: Tensor  # (P,): the index of each placeholder's feature among the features of these images, in flat order
    features: int  # the number of features
    rows: dict[str, Tensor]  # the padded batch, from which a model computes the positions of its tokens
    sample: "ImageRows"  # rows on which a model is compared before it runs such trees

    def spread(self, features: Any) -> Any:
        """The features that a model computed from the images, repeated for all placeholders of the tree.

        Raises:
            ValueError: the number of features is not that of the images for which the placeholders stand.
        """
        flat = flattened(features)
        if len(flat) != self.features:
            raise ValueError(
                f"pixel_values: the images make {len(flat)} features, {self.features} tokens stand for them"
            )
        flat = flat[self.feature.to(flat.device)]
        return (flat,) if isinstance(features, list | tuple) else flat


def flattened(features: Any) -> Tensor:
    """Features as (features, H), whether a model returns a tensor for each image or one for all."""
    if isinstance(features, list | tuple):
        return torch.cat([x.flatten(0, -2) for x in features])
    return features.flatten(0, -2)


def image_token(model: Any) -> int | None:
    """The placeholder's id; None of a model whose configuration names none."""
    config, names = CausalLM.of(model).base.config, ("image_token_id", "image_token_index")
    return next((x for name in names if isinstance(x := getattr(config, name, None), int)), None)


class Images(NamedTuple):
    """The images of a batch of B rows of T tokens, made by `Images.of` for `pack`."""

    token: int  # the id of the placeholder token
    fields: dict[str, Tensor]  # as they were given
    sizes: dict[str, list[int]]  # how many rows of a field each entry has
    of_rows: list[range]  # the entries of each row
    units: list[Unit]  # distinct units only
    code: Tensor  # (B, T) int64, on the host: a placeholder's index among the features of all units; -1 elsewhere
    types: Tensor | None  # (B, T): mm_token_type_ids

    @classmethod
    def of(cls, model: Any, input_ids: Tensor, attention_mask: Tensor, fields: Mapping[str, Any]) -> "Images":
        """Find out which tokens of a batch stand for which images, and which images are equal.

        Args:
            model: the model that will run the batch. Its configuration names the placeholder token and says how many
                placeholders an image has.
            input_ids, attention_mask: (B, T), as for `pack`.
            fields: the other tensors that the processor or TRL gives, under their names (`pixel_values`,
                `image_grid_thw`, `num_images`, ...). If neither `num_images` nor `num_tiles` says how many images a row
                has, the placeholders must tell.

        Returns:
            Images, for the argument `images` of `pack` and `split_by_tokens`.

        Raises:
            TypeError, ValueError: a field is wrong, or a row's placeholders do not match its images; the message names
                the field or the row.
        """
        config, token = CausalLM.of(model).base.config, image_token(model)
        if token is None:
            raise ValueError(f"{config.model_type} names no image token")
        given = {name: x for name, x in fields.items() if x is not None}
        for name in given.keys() - {*FIELDS, *COUNTS, TYPES}:
            raise ValueError(f"{name} is not known of images; known are {', '.join((*FIELDS, *COUNTS, TYPES))}")
        images = {name: _tensor(name, given[name]) for name in FIELDS if name in given}
        if "pixel_values" not in images:
            raise ValueError(f"pixel_values are missing beside {', '.join(given) or 'nothing'}")
        places = (input_ids == token).cpu()
        if (places & ~attention_mask.bool().cpu()).any():
            raise ValueError("attention_mask: an image token is masked")
        types = _tensor(TYPES, given[TYPES]) if TYPES in given else None
        if types is not None:
            _check_types(types, places, attention_mask, hasattr(CausalLM.of(model).backbone, "compute_3d_position_ids"))
        count = places.sum(1).tolist()
        sizes = _sizes(images)
        tokens = _tokens_of_entries(images, config, sum(count))
        of_rows = _entries_of_rows(images, given, len(sizes["pixel_values"]), tokens, count)
        units, code = _units(images, sizes, of_rows, tokens, places)
        return cls(token, images, sizes, of_rows, units, code, types)

    def rows(self, index: Tensor) -> "Images":
        """The images of the rows with these indices."""
        types = None if self.types is None else self.types[index.to(self.types.device)]
        of_rows = [self.of_rows[i] for i in index.tolist()]
        return self._replace(of_rows=of_rows, code=self.code[index.cpu()], types=types)

    def fields_of(self, entries: range) -> dict[str, Tensor]:
        return self._taken([entries], FIELDS)

    def fields_of_rows(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The fields of the images of these rows, which may be given several times."""
        return self._taken([self.of_rows[row] for row in rows], FIELDS)

    def beside(self, row: int, length: int, copies: int) -> dict[str, Tensor]:
        """The inputs of a model in addition to the first `length` ids of a row, for so many copies of the row."""
        own = self.fields_of(self.of_rows[row])
        if self.types is not None:
            own[TYPES] = self.types[row : row + 1, :length]
        return {name: torch.cat([x] * copies) for name, x in own.items() if len(x)}

    def of_tree(self, code: Tensor, input_ids: Tensor, attention_mask: Tensor) -> TreeImages | None:
        """The images of a tree; None if it has no placeholder.

        code: the codes of the tree's placeholders, in flat order. input_ids, attention_mask: (B, T), the padded rows.
        """
        if len(code) == 0:
            return None
        starts, lengths = (torch.tensor(x, device="cpu") for x in zip(*((u.start, u.length) for u in self.units)))
        unit = torch.searchsorted(starts, code, right=True) - 1
        used, which = unit.unique(return_inverse=True)
        ends = lengths[used].cumsum(0)
        feature = code - starts[unit] + (ends - lengths[used])[which]
        fields = self._taken([self.units[i].entries for i in used.tolist()], FIELDS)
        rows = {"input_ids": input_ids, "attention_mask": attention_mask}
        rows |= self._taken(self.of_rows, ("image_grid_thw",))
        if self.types is not None:
            rows[TYPES] = self.types
        sample = ImageRows.of(self, input_ids, attention_mask)
        assert sample is not None, "a placeholder is in the tree"
        return TreeImages(fields, feature.to(input_ids.device), int(ends[-1]), rows, sample)

    def _taken(self, ranges: Sequence[range], names: Sequence[str]) -> dict[str, Tensor]:
        entries = [*itertools.chain.from_iterable(ranges)]
        return {name: _rows_of(x, self.sizes[name], entries) for name, x in self.fields.items() if name in names}


def _tensor(name: str, x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        try:
            if isinstance(x, list | tuple):  # as processors return images of one size
                x = torch.stack([torch.as_tensor(part) for part in x])
            x = torch.as_tensor(x)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}") from None
    return x


def _check_types(types: Tensor, places: Tensor, attention_mask: Tensor, exact: bool) -> None:
    """Check that `types` mark the image tokens. exact: and no other token, because positions are computed from them."""
    if types.shape != places.shape:
        raise ValueError(f"{TYPES} must be {tuple(places.shape)}, got {tuple(types.shape)}")
    marked = types.cpu() != 0
    wrong = places & ~marked
    if exact:
        wrong |= marked & ~places & attention_mask.bool().cpu()
    for row in wrong.any(1).nonzero()[:1].flatten().tolist():
        raise ValueError(
            f"{TYPES}: row {row} marks other tokens than those of its images; it may be padded on the wrong side"
        )


def _sizes(images: dict[str, Tensor]) -> dict[str, list[int]]:
    """For each field, how many of its rows each entry has."""
    grid = images.get("image_grid_thw")
    sizes = {name: [1] * len(x) for name, x in images.items()}
    if grid is not None:
        sizes["pixel_values"] = grid.prod(1).tolist()
        if sum(sizes["pixel_values"]) != len(images["pixel_values"]):
            patches = len(images["pixel_values"])
            raise ValueError(f"pixel_values: {patches} patches, image_grid_thw tells {sum(sizes['pixel_values'])}")
    for name, size in sizes.items():
        if len(size) != len(sizes["pixel_values"]):
            raise ValueError(f"{name} is of {len(size)} images, pixel_values are of {len(sizes['pixel_values'])}")
    return sizes


def _tokens_of_entries(images: dict[str, Tensor], config: Any, tokens: int) -> list[int] | None:
    """How many placeholders stand for each entry; None if only the model knows."""
    vision = getattr(config, "vision_config", config)
    if (grid := images.get("image_grid_thw")) is not None and hasattr(vision, "spatial_merge_size"):
        return (grid.prod(1) // vision.spatial_merge_size**2).tolist()
    if (shapes := images.get("spatial_shapes")) is not None and hasattr(config, "downsample_factor"):
        return (shapes // config.downsample_factor).prod(1).tolist()
    if (sizes := images.get("image_sizes")) is not None and hasattr(config, "spatial_merge_size"):
        return (sizes // (vision.patch_size * config.spatial_merge_size)).prod(1).tolist()
    pixels = images["pixel_values"]
    if len(images) == 1 and pixels.dim() == 4 and len(pixels):  # images of one size, with equally many placeholders
        if tokens % len(pixels):
            raise ValueError(f"pixel_values: {tokens} image tokens cannot stand for {len(pixels)} images of one size")
        return [tokens // len(pixels)] * len(pixels)
    return None


def _entries_of_rows(
    images: dict[str, Tensor], given: Mapping[str, Any], entries: int, tokens: list[int] | None, count: list[int]
) -> list[range]:
    """The entries of each row. `tokens`: placeholders of each entry, if known; `count`: placeholders of each row."""
    counted = "num_images" if given.get("num_tiles") is None else "num_tiles"
    counts = given.get(counted)
    if images["pixel_values"].dim() == 5 and "image_sizes" not in images:  # padded to equally many images in each row
        if entries != len(count):
            raise ValueError(f"pixel_values are of {entries} rows, the batch has {len(count)}")
        counts = [1] * entries
    elif counts is None and tokens is not None:
        counts = _consumed(tokens, count)
    elif counts is None:
        counts = [int(n > 0) for n in count]
        if sum(counts) != entries:
            raise ValueError(f"pixel_values: nothing says whose the {entries} images of {sum(counts)} rows are")
    if len(counts) != len(count) or sum(counts) != entries:
        numbers = f"{len(count)} numbers for {entries} images in all"
        raise ValueError(f"{counted} must be {numbers}, got {len(counts)} for {sum(counts)}")
    ends = [*itertools.accumulate(counts, initial=0)]
    of_rows = [range(begin, end) for begin, end in itertools.pairwise(ends)]
    for row, (own, n) in enumerate(zip(of_rows, count)):
        wanted = n if tokens is None else sum(tokens[i] for i in own)
        if wanted != n or (n and not own):
            raise ValueError(f"input_ids: row {row} has {n} image tokens, its {len(own)} images have {wanted}")
    return of_rows


def _consumed(tokens: list[int], count: list[int]) -> list[int]:
    """How many entries each row has, if its placeholders stand for the next entries that no earlier row has."""
    left, counts = iter(tokens), []
    for row, n in enumerate(count):
        seen = taken = 0
        while seen < n and (more := next(left, None)) is not None:
            seen, taken = seen + more, taken + 1
        if seen != n:
            raise ValueError(f"input_ids: row {row} has {n} image tokens, its {taken} images have {seen}")
        counts.append(taken)
    if unused := sum(1 for _ in left):
        raise ValueError(f"pixel_values: no row has tokens for the last {unused} images")
    return counts


class ImageRows(NamedTuple):
    """Material for a comparison: a row of a batch up to its last image token, and tokens to append; on the host.

    Three rows are made of it: two that have the same images and differ after them, and a third that is like the first
    but has other images. If images are shared by mistake or not shared, or if positions are wrong, then log-probs or
    gradients differ from those of padded rows.
    """

    head: Tensor  # (T,)
    tail: Tensor  # (SCORED_BEHIND,)
    fields: dict[str, Tensor]
    types: Tensor | None  # (T,)

    @classmethod
    def of(cls, images: Images, input_ids: Tensor, attention_mask: Tensor) -> "ImageRows | None":
        """Made from the row that has the fewest image tokens, but at least one; None if no row has any."""
        shown = (images.code >= 0).sum(1)
        candidates = [row for row in range(len(shown)) if shown[row] > 0]
        if not candidates:
            return None
        row = min(candidates, key=lambda row: int(shown[row]))
        last = int((images.code[row] >= 0).nonzero().max())
        first = int(attention_mask[row].int().argmax())
        ids = input_ids[row].cpu()
        words = ids[attention_mask[row].bool().cpu() & (images.code[row] < 0)]
        tail = words.repeat(SCORED_BEHIND)[-SCORED_BEHIND:] if len(words) else ids[:1].repeat(SCORED_BEHIND)
        types = None if images.types is None else images.types[row, first : last + 1]
        return cls(ids[first : last + 1], tail, images.fields_of(images.of_rows[row]), types)

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return len(self.head) + len(self.tail)

    def ids(self) -> Tensor:
        """The token ids of the three rows, (ROWS, T)."""
        other = self.tail.flip(0)
        other[0] = self.tail[0] - 1 if self.tail[0] > 2 else self.tail[0] + 1  # so that the rows differ at once
        return torch.stack([torch.cat([self.head, end]) for end in (self.tail, other, self.tail)])

    def images(self, device: torch.device, differentiable: bool = False) -> dict[str, Tensor]:
        """The image fields of the three rows."""
        pixels = self.fields["pixel_values"].to(device, torch.float32)
        images = {name: torch.cat([x] * ROWS).to(device) for name, x in self.fields.items()}
        images["pixel_values"] = torch.cat([pixels, pixels, pixels * -0.5]).requires_grad_(differentiable)
        return images

    def types_of(self, ids: Tensor) -> dict[str, Tensor]:
        """The mm_token_type_ids of rows, which may be longer than `types`."""
        if self.types is None:
            return {}
        types = torch.zeros_like(ids, dtype=self.types.dtype)
        types[:, : len(self.types)] = self.types.to(ids.device)
        return {TYPES: types}

    def small(self, twin: Any) -> "ImageRows":
        """The same rows with token ids from the vocabulary of a small twin."""
        config = twin.config
        token, words = config.image_token_id, CausalLM.of(twin).vocabulary - 8
        shown = self.head == self.head[-1]
        return self._replace(head=(2 + self.head % words).masked_fill(shown, token), tail=2 + self.tail % words)


class Distinct:
    """Collects distinct units. Two units are compared in full only if a few of their numbers are equal."""

    def __init__(self) -> None:
        self.units: list[Unit] = []
        self.parts: list[dict[str, Tensor]] = []  # for each unit its part of every field
        self._alike: dict[Any, list[int]] = {}  # sampled numbers -> indices of the units that have them

    @property
    def features(self) -> int:
        return self.units[-1].start + self.units[-1].length if self.units else 0

    def unit(self, parts: dict[str, Tensor], entries: range, length: int) -> Unit:
        """The unit whose parts are equal to these; a new one if there is none."""
        key = (length, *((name, _sample(x)) for name, x in sorted(parts.items())))
        others = self._alike.setdefault(key, [])
        for i in others:
            if all(torch.equal(x, self.parts[i][name]) for name, x in parts.items()):
                return self.units[i]
        others.append(len(self.units))
        self.units.append(Unit(entries, self.features, length))
        self.parts.append(parts)
        return self.units[-1]


def _units(
    images: dict[str, Tensor],
    sizes: dict[str, list[int]],
    of_rows: list[range],
    tokens: list[int] | None,
    places: Tensor,
) -> tuple[list[Unit], Tensor]:
    """The distinct units, and `code` of Images. If `tokens` is None, all images of a row are one unit."""
    distinct = Distinct()
    code = torch.full(places.shape, -1, device="cpu")
    for row, own in enumerate(of_rows):
        if tokens is None:
            runs = [(own, int(places[row].sum()))]
        else:
            runs = [(range(i, i + 1), tokens[i]) for i in own]
        codes = []
        for entries, length in runs:
            if length:
                parts = {name: _rows_of(x, sizes[name], entries) for name, x in images.items()}
                unit = distinct.unit(parts, entries, length)
                codes.append(torch.arange(unit.start, unit.start + length, device="cpu"))
        if codes:
            code[row, places[row]] = torch.cat(codes)
    return distinct.units, code


def _rows_of(x: Tensor, sizes: list[int], entries: Sequence[int]) -> Tensor:
    """The part of a field that belongs to these entries, in their order; a view if they are consecutive."""
    if len(entries) == 0:
        return x[:0]
    ends = [*itertools.accumulate(sizes, initial=0)]
    if [*entries] == [*range(entries[0], entries[-1] + 1)]:
        return x[ends[entries[0]] : ends[entries[-1] + 1]]
    return torch.cat([x[ends[i] : ends[i + 1]] for i in entries])


def _sample(x: Tensor) -> tuple:
    flat = x.reshape(-1)
    step = max(len(flat) // SAMPLES, 1)
    return (tuple(x.shape), *flat[::step].tolist())
