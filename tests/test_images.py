"""Token trees of rows with images: what is shared, that the model's results do not change, and that errors show."""

import pytest
import torch

from flashpo._causal_lm import CausalLM, Unsupported
from flashpo.bench.tiny_images import TOKEN, image_model, pictures, type_ids
from flashpo.bench.tiny_models import tiny_multimodal
from flashpo.packing import Images, forward, inputs, pack, parity, score, split_by_tokens
from flashpo.packing import images as packing_images
from flashpo.packing.images import ImageRows, TreeImages
from flashpo.packing.scoring import accept_trees

SHOWN = [[0], [0], [1], [], [0, 0]]  # the images of each row, by their seeds
WORDS = torch.randint(2, 90, (40,), generator=torch.Generator().manual_seed(0)).tolist()


GRIDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "paddleocr_vl")
FAMILIES = (*GRIDS, "smolvlm", "idefics3", "llava_next", "llava_onevision", "mistral3", "internvl", "lfm2_vl", "llava")


class Rows:
    """Rows that begin alike, padded on the left, with the images SHOWN; scored are their last tokens."""

    def __init__(self, model, shown=SHOWN):
        self.shown = shown
        self.fields, tokens = pictures(model, shown)
        image = [TOKEN] * tokens
        rows = []
        for i, own in enumerate(shown):
            row = WORDS[:5]
            for _ in own:
                row = row + image + WORDS[5:8]
            rows.append(row + WORDS[8 : 20 + i])
        width = max(map(len, rows))
        self.ids, self.live = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(2))
        for i, row in enumerate(rows):
            self.ids[i, width - len(row) :] = torch.tensor(row)
            self.live[i, width - len(row) :] = 1
        self.scored = torch.ones_like(self.ids[:, -6:])
        self.types = type_ids(model, self.ids)
        self.fields = {
            k: x.to(next(model.parameters()).dtype) if x.is_floating_point() else x for k, x in self.fields.items()
        }

    def images(self, model, **other) -> Images:
        counts = {"num_images": [len(own) for own in self.shown]} if "image_sizes" in self.fields else {}
        return Images.of(model, self.ids, self.live, self.fields | self.types | counts | other)

    def pack(self, model, **options):
        return pack(self.ids, self.live, self.scored, images=self.images(model), min_saved=1, **options)

    def padded(self, model):
        positions = {} if self.types else {"position_ids": (self.live.cumsum(1) - 1).clamp(min=0)}
        out = model(
            input_ids=self.ids, attention_mask=self.live, use_cache=False, **self.fields, **self.types, **positions
        )
        logprobs = out.logits[:, :-1].log_softmax(-1).gather(-1, self.ids[:, 1:, None])[..., 0]
        return logprobs[:, -self.scored.shape[1] :]


@pytest.mark.parametrize("family", FAMILIES)
def test_trees_give_what_padded_rows_give(family):
    model = image_model(family).double()
    rows = Rows(model)
    accept_trees(model)
    tree = rows.pack(model)
    assert len(tree.tokens) < rows.live.sum() - 2 * len(rows.fields)
    expected, ours = rows.padded(model), forward(model, tree, outputs=()).stats.logprob
    tolerance = 1e-5 if family == "qwen3_5" else 1e-9  # its recurrences are in fp32
    torch.testing.assert_close(ours, expected.to(ours.dtype), rtol=tolerance, atol=tolerance)
    upstream = torch.randn_like(expected)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(*(gradients(x, upstream, parameters) for x in (ours, expected))):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-9


def gradients(values, upstream, parameters):
    loss = (values * upstream).sum()
    return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)


def towers_patches(model, run) -> int:
    """How many patches the tower of a Qwen model has seen."""
    seen = []
    hook = model.model.visual.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    run()
    hook.remove()
    return sum(seen)


def test_the_tower_sees_each_image_of_scored_rows_once():
    model = image_model("qwen2_5_vl")
    rows = Rows(model)
    accept_trees(model)
    patches = len(rows.fields["pixel_values"]) // sum(map(len, SHOWN))
    forward(model, rows.pack(model), outputs=())  # compares first
    assert towers_patches(model, lambda: forward(model, rows.pack(model), outputs=())) == 2 * patches
    rows.scored[2] = 0  # the only row of its image
    assert towers_patches(model, lambda: forward(model, rows.pack(model), outputs=())) == patches
    rows.scored[:] = 0
    assert rows.pack(model).images is None


def test_a_frozen_tower_has_no_backward():
    model = image_model("qwen3_vl")
    rows = Rows(model)
    accept_trees(model)
    model.model.visual.requires_grad_(False)
    forward(model, rows.pack(model), outputs=())  # compares first
    seen = []
    model.model.visual.merger.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    forward(model, rows.pack(model), outputs=()).stats.logprob.sum().backward()
    assert seen == [False]


def test_only_equal_images_are_shared():
    model = image_model("qwen2_vl")
    rows = Rows(model)
    assert len(rows.images(model).units) == 2
    near = rows.fields["pixel_values"].clone()
    near[1, 7] += 1e-7  # in the first row's image alone
    assert len(rows.images(model, pixel_values=near).units) == 3
    wide = rows.fields["image_grid_thw"].clone()
    wide[0] = torch.tensor([1, 2, 8])  # the same patches, laid out otherwise
    assert len(rows.images(model, image_grid_thw=wide).units) == 3


def test_parts_of_a_batch_are_its_rows():
    """`split_by_tokens` keeps rows over the same image together, which text alone would not tell."""
    model = image_model("qwen2_5_vl")
    rows = Rows(model, [[0], [1], [0], [1]])
    accept_trees(model)
    images = rows.images(model)
    parts = split_by_tokens(rows.ids, rows.live, rows.scored, 40, min_saved=1, images=images)
    assert sorted(sorted(part.tolist()) for part in parts) == [[0, 2], [1, 3]]
    whole = forward(model, rows.pack(model), outputs=()).stats.logprob
    for part in parts:
        batch = (x[part] for x in (rows.ids, rows.live, rows.scored))
        tree = pack(*batch, images=images.rows(part))
        torch.testing.assert_close(forward(model, tree, outputs=()).stats.logprob, whole[part])


def test_rows_tell_whose_images_they_are_where_nothing_else_does():
    model = image_model("qwen3_vl")
    rows = Rows(model)
    counted = rows.images(model, num_images=[len(own) for own in SHOWN])
    assert (
        rows.images(model).of_rows
        == counted.of_rows
        == [range(0, 1), range(1, 2), range(2, 3), range(3, 3), range(3, 5)]
    )


WRONG = {
    "another number of images": (
        dict(num_images=[1, 1, 1, 0, 1]),
        "num_images must be 5 numbers for 5 images in all, got 5 for 4",
    ),
    "an image of another row": (dict(num_images=[2, 0, 1, 0, 2]), "row 0 has 4 image tokens, its 2 images have 8"),
    "a larger image": (dict(image_grid_thw="larger"), "pixel_values: 80 patches, image_grid_thw tells"),
    "fewer images": (dict(drop=1), "row 4 has 8 image tokens, its 1 images have 4"),
    "more images": (dict(more=1), "no row has tokens for the last 1 images"),
    "videos": (dict(video_grid_thw=torch.ones(1, 3)), "video_grid_thw is not known"),
    "types of other rows": (dict(mm_token_type_ids=torch.ones(1, 3)), "mm_token_type_ids must be"),
    "no pixels": (dict(pixel_values=None), "pixel_values are missing"),
    "a field of other images": (
        dict(image_sizes=torch.ones(2, 2)),
        "image_sizes is of 2 images, pixel_values are of 5",
    ),
    "no tensor": (dict(pixel_values="cat.png"), "pixel_values must be a tensor, got str"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_named(what):
    model = image_model("qwen2_5_vl")
    rows = Rows(model)
    change, message = WRONG[what]
    change = dict(change)
    pixels, grid = rows.fields["pixel_values"], rows.fields["image_grid_thw"]
    if change.pop("drop", 0):
        change |= {"pixel_values": pixels[:64], "image_grid_thw": grid[:4]}
    if change.pop("more", 0):
        change |= {"pixel_values": torch.cat([pixels, pixels[:16]]), "image_grid_thw": torch.cat([grid, grid[:1]])}
    if change.get("image_grid_thw") == "larger":
        change["image_grid_thw"] = grid * torch.tensor([1, 2, 1])
    with pytest.raises((TypeError, ValueError), match=message):
        rows.images(model, **change)


def types_padded_on_the_right(rows):
    """trl#5785"""
    own = [x[live.bool()] for x, live in zip(rows.types["mm_token_type_ids"], rows.live)]
    rows.types = {"mm_token_type_ids": torch.nn.utils.rnn.pad_sequence(own, batch_first=True)}


def types_of_a_text_token(rows):
    rows.types["mm_token_type_ids"][2, -1] = 1


def expanded_twice(rows):
    """trl#6294, trl#6401: each image token of a prompt became as many as its image has."""
    again = [torch.cat([x.repeat(4) if x == TOKEN else x[None] for x in row]) for row in rows.ids]
    rows.ids = torch.nn.utils.rnn.pad_sequence(again, batch_first=True, padding_side="left")
    rows.live, rows.types = (rows.ids != 0).long(), type_ids(image_model("qwen3_vl"), rows.ids)


def drawn_in_a_completion(rows):
    """trl#3847: TRL marks all tokens of a completion as text."""
    rows.ids[1, -2] = TOKEN


def drawn_where_nothing_marks_it(rows):
    rows.ids[1, -2], rows.types = TOKEN, {}


def cut_within_an_image(rows):
    """As truncation on the left does it."""
    rows.ids, rows.live = rows.ids[:, 7:], rows.live[:, 7:]
    rows.types = {name: x[:, 7:] for name, x in rows.types.items()}


def without_its_image(rows):
    rows.fields = {
        "pixel_values": rows.fields["pixel_values"][:64],
        "image_grid_thw": rows.fields["image_grid_thw"][:4],
    }
    rows.shown = [*SHOWN[:4], [0]]


OTHERS = "marks other tokens than those of its images"
TRAPS = {
    types_padded_on_the_right: f"mm_token_type_ids: row 0 {OTHERS}",
    types_of_a_text_token: f"mm_token_type_ids: row 2 {OTHERS}",
    expanded_twice: "row 0 has 16 image tokens, its 1 images have 4",
    drawn_in_a_completion: f"mm_token_type_ids: row 1 {OTHERS}",
    drawn_where_nothing_marks_it: "row 1 has 5 image tokens, its 1 images have 4",
    cut_within_an_image: "row 4 has 6 image tokens, its 2 images have 8",
    without_its_image: "row 4 has 8 image tokens, its 1 images have 4",
}


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.__name__)
def test_rows_that_do_not_match_their_images_are_named(trap):
    model = image_model("qwen3_vl")
    rows = Rows(model)
    trap(rows)
    with pytest.raises(ValueError, match=TRAPS[trap]):
        rows.images(model, num_images=[len(own) for own in rows.shown])


def test_images_of_unknown_size_need_to_be_told():
    """Only the model knows how many tokens an image of LLaVA-Next has."""
    model = image_model("llava_next")
    rows = Rows(model)
    with pytest.raises(ValueError, match="nothing says whose the 5 images of 4 rows are"):
        rows.images(model, num_images=None)
    assert len(rows.images(model).units) == 3  # the last row's two images are one unit


def sample(model) -> ImageRows:
    rows = Rows(model, [[0], [1]])
    found = ImageRows.of(rows.images(model), rows.ids, rows.live)
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def asked_anew():
    parity._answers.clear()


@pytest.mark.parametrize("family", ["qwen3_5", "smolvlm", "llava_next"])
def test_a_right_model_passes_the_comparison(family):
    model = image_model(family)
    before = {name: x for name, x in vars(CausalLM.of(model).backbone).items() if name != "_modules"}
    assert parity.image_parity(model, sample(model)) == ""
    assert vars(CausalLM.of(model).backbone).keys() - {"_modules"} == before.keys()
    assert parity.image_parity(model, None) == "", "asked once for every kind of model"


def shared_by_mistake(monkeypatch):
    monkeypatch.setattr(packing_images, "_sample", lambda x: tuple(x.shape))
    monkeypatch.setattr(packing_images.torch, "equal", lambda a, b: True)


def positions_of_text(monkeypatch):
    monkeypatch.setattr(inputs, "_positions", lambda *args: None)


def positions_off_by_one(monkeypatch):
    right = inputs._positions

    def wrong(*args):
        position = right(*args)
        position[1, 0, -9:] += 1
        return position

    monkeypatch.setattr(inputs, "_positions", wrong)


def features_of_a_neighbour(monkeypatch):
    right = TreeImages.spread
    monkeypatch.setattr(TreeImages, "spread", lambda self, x: right(self._replace(feature=self.feature.roll(1)), x))


def features_without_gradient(monkeypatch):
    right = TreeImages.spread

    def wrong(self, features):
        out = right(self, features)
        return tuple(x.detach() for x in out) if isinstance(out, tuple) else out.detach()

    monkeypatch.setattr(TreeImages, "spread", wrong)


FAULTS = (
    shared_by_mistake, positions_of_text, positions_off_by_one, features_of_a_neighbour, features_without_gradient,
)  # fmt: skip


@pytest.mark.parametrize("with_twin", [True, False], ids=["twin", "model"])
def test_a_wrong_one_is_found(with_twin, monkeypatch):
    """By the small twin, and by the model itself where there is none."""
    model = image_model("qwen3_vl")
    rows = sample(model)
    if not with_twin:
        monkeypatch.setattr(parity, "_twin_with_images_differs", lambda *args: "")
    for fault in FAULTS:
        parity._answers.clear()
        with monkeypatch.context() as within:
            fault(within)
            assert "of a token tree differ from those of padded rows" in parity.image_parity(model, rows), fault


def test_a_comparison_comes_before_the_first_tree_with_images(monkeypatch):
    model = image_model("qwen3_vl")
    rows = Rows(model)
    features_of_a_neighbour(monkeypatch)
    with pytest.raises(Unsupported, match="of a token tree differ from those of padded rows"):
        score(model, rows.pack(model))
    monkeypatch.undo()
    parity._answers.clear()
    score(model, rows.pack(model))


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_tokens_that_see_each_other_both_ways_are_refused(family):
    model = tiny_multimodal(family)
    assert parity.image_parity(model, None) == "tokens of an image see each other in both directions"
