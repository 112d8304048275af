"""`pack` against a trie built token by token."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashpo.packing import pack, split_by_tokens
from flashpo.packing.tree import TokenTree

TOKENS = 3  # few, so that rows share a lot


@dataclasses.dataclass
class Rows:
    """Rows of tokens, padding on both sides, and which tokens are scored."""

    tokens: list[list[int]]
    left: list[int]
    scored: list[list[bool]]  # never a row's first token

    def tensors(self, junk: int = 0) -> tuple[torch.Tensor, ...]:
        width = max(len(row) + left for row, left in zip(self.tokens, self.left)) + 1
        ids, live, scored = (torch.full((len(self.tokens), width), x) for x in (junk, 0, 0))
        for i, (row, left, flags) in enumerate(zip(self.tokens, self.left, self.scored)):
            here = slice(left, left + len(row))
            ids[i, here], live[i, here], scored[i, here] = (
                torch.tensor(x, dtype=torch.int64) for x in (row, [1] * len(row), flags)
            )
        return ids, live, scored

    def needed(self, prune: bool) -> list[list[int]]:
        if not prune:
            return self.tokens
        return [
            row[: max((t for t, flag in enumerate(flags) if flag), default=0)]
            for row, flags in zip(self.tokens, self.scored)
        ]


@st.composite
def rows(draw):
    tokens = draw(st.lists(st.lists(st.integers(0, TOKENS - 1), max_size=9), min_size=1, max_size=7))
    if draw(st.booleans()):  # a shared prompt
        prompt = draw(st.lists(st.integers(0, TOKENS - 1), min_size=1, max_size=9))
        tokens = [prompt + row for row in tokens]
    left = [draw(st.integers(0, 4)) for _ in tokens]
    scored = [[False] * min(len(row), 1) + [draw(st.booleans()) for _ in row[1:]] for row in tokens]
    return Rows(tokens, left, scored)


def check(tree: TokenTree, given: Rows, prune: bool) -> None:
    """Everything that must hold whatever was shared."""
    ids, _, scored = given.tensors()
    needed, n = given.needed(prune), len(tree.tokens)
    visible = [{j for j in range(n) if j <= i < tree.end[j]} for i in range(n)]
    paths = []
    for b, (row, left) in enumerate(zip(needed, given.left)):
        at = tree.flat[b]
        path = at[left : left + len(row)].tolist()
        assert (at[:left] == -1).all()
        assert (at[left + len(row) :] == -1).all()
        assert tree.tokens[path].tolist() == row
        assert tree.position[path].tolist() == list(range(len(row)))
        assert all(visible[i] == set(path[: t + 1]) for t, i in enumerate(path))
        paths.append(path)
    assert tree.copies.tolist() == [sum(i in path for path in paths) for i in range(n)]
    assert tree.pair.shape == scored.shape
    for b, t in scored.nonzero().tolist():
        pair = tree.pair[b, t]
        assert tree.source[pair] == tree.flat[b, t - 1]
        assert tree.target[pair] == ids[b, t]
    assert (tree.pair[scored == 0] == len(tree.source)).all()
    pairs = list(zip(tree.source.tolist(), tree.target.tolist()))
    assert len(set(pairs)) == len(pairs) == len(tree.pair[scored == 1].unique())
    assert tree.source.tolist() == sorted(tree.source.tolist())
    values = torch.rand(len(pairs), 2)
    unpacked = tree.unpack(values, fill=-1)
    assert unpacked.shape == (*scored.shape, 2)
    torch.testing.assert_close(unpacked[scored == 1], values[tree.pair[scored == 1]])
    assert (unpacked[scored == 0] == -1).all()
    check_segments(tree)


def check_segments(tree: TokenTree) -> None:
    """They cover the tokens in order, and tell `end` and who descends from whom."""
    begin, stop, end = tree.segments.unbind(1)
    assert begin[0] == 0
    assert stop[-1] == len(tree.tokens)
    assert (stop[:-1] == begin[1:]).all()
    assert (end.repeat_interleave(stop - begin) == tree.end).all()
    for (b, _, e), parent in zip(tree.segments.tolist(), tree.parents.tolist()):
        if parent < 0:
            assert tree.position[b] == 0
        else:
            assert tree.segments[parent, 0] < b < e <= tree.segments[parent, 2]
            assert tree.position[tree.segments[parent, 1] - 1] == tree.position[b] - 1


@given(rows(), st.booleans())
@settings(max_examples=300, deadline=None)
def test_every_distinct_token_once(given, prune):
    tree = pack(*given.tensors(), min_saved=1, prune=prune)
    needed = given.needed(prune)
    distinct = {tuple(row[: t + 1]) for row in needed for t in range(len(row))}
    if not distinct:
        assert (tree.tokens.tolist(), tree.end.tolist(), tree.copies.tolist()) == ([0], [1], [0])
        assert (tree.flat == -1).all()
        assert len(tree.source) == 0
        assert (tree.unpack(torch.rand(0)) == 0).all()
        return
    assert len(tree.tokens) == len(distinct)
    check(tree, given, prune)


@given(rows(), st.booleans(), st.integers(2, 20))
@settings(max_examples=200, deadline=None)
def test_short_stretches_apart(given, prune, min_saved):
    tree = pack(*given.tensors(), min_saved=min_saved, prune=prune)
    if any(given.needed(prune)):
        check(tree, given, prune)


@given(rows(), st.randoms())
@settings(max_examples=100, deadline=None)
def test_order_and_padding_do_not_matter(given, random):
    order = list(range(len(given.tokens)))
    random.shuffle(order)
    moved = Rows(
        [given.tokens[i] for i in order], [random.randrange(5) for _ in order], [given.scored[i] for i in order]
    )
    a, b = pack(*given.tensors(), min_saved=4), pack(*moved.tensors(junk=1), min_saved=4)
    for name in ("tokens", "position", "end", "copies", "source", "target", "segments", "parents"):
        assert getattr(a, name).equal(getattr(b, name)), name


def tree_of(*rows: list[int], **options) -> TokenTree:
    given = Rows(list(rows), [0] * len(rows), [[False] + [True] * (len(row) - 1) for row in rows])
    return pack(*given.tensors(), **options)


def test_levels():
    prompt, turn, other = list(range(10, 30)), list(range(40, 60)), list(range(70, 90))
    tree = tree_of(prompt + turn + [1] * 20, prompt + turn + [2] * 20, prompt + other, prune=False)
    assert tree.segments.tolist() == [[0, 20, 100], [20, 40, 80], [40, 60, 60], [60, 80, 80], [80, 100, 100]]
    assert tree.parents.tolist() == [-1, 0, 1, 1, 0]


def test_min_saved_counts_what_a_segment_saves():
    """Two rows that share 5 tokens save 5, four rows save 15."""
    rows = [[7] * 5 + [i] * 9 for i in range(4)]
    assert len(tree_of(*rows[:2], min_saved=6, prune=False).tokens) == 28
    assert len(tree_of(*rows, min_saved=15, prune=False).tokens) == 5 + 36
    assert len(tree_of(*rows, min_saved=16, prune=False).tokens) == 56


def test_a_short_stretch_between_branchings_goes_to_both():
    prompt = list(range(10, 40))
    tree = tree_of([*prompt, 1, 2, 3], [*prompt, 1, 2, 4], [*prompt, 5], prune=False)
    assert tree.segments.tolist() == [[0, 30, 37], [30, 33, 33], [33, 36, 36], [36, 37, 37]]


def test_what_no_scored_token_needs_is_left_out():
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6], [7, 8, 9, 9]])
    live, scored = torch.ones_like(ids), torch.tensor([[0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    assert pack(ids, live, scored, min_saved=1).tokens.tolist() == [1, 2, 5]
    assert len(pack(ids, live, scored, min_saved=1, prune=False).tokens) == 10


def test_scored_among_the_last_columns():
    ids = torch.tensor([[0, 1, 2, 3], [1, 2, 4, 0]])
    live = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    tree = pack(ids, live, torch.tensor([[1, 1], [1, 0]]), min_saved=1)
    assert tree.tokens.tolist() == [1, 2]
    assert tree.source.tolist() == [0, 1, 1]
    assert tree.target.tolist() == [2, 3, 4]
    assert tree.pair.tolist() == [[0, 1], [2, 3]]


@given(rows(), st.booleans(), st.integers(9, 40), st.sampled_from([1, 6]))
@settings(max_examples=200, deadline=None)
def test_micro_batches(given, prune, budget, min_saved):
    tensors, options = given.tensors(), {"min_saved": min_saved, "prune": prune}
    longest = max(map(len, given.needed(prune)))
    if longest > budget:
        with pytest.raises(ValueError, match="max_tokens"):
            split_by_tokens(*tensors, budget, **options)
        return
    parts = split_by_tokens(*tensors, budget, **options)
    assert torch.cat(parts).sort().values.tolist() == list(range(len(given.tokens)))
    trees = [pack(*(x[part] for x in tensors), **options) for part in parts]
    assert all(len(tree.tokens) <= budget for tree in trees)
    if min_saved == 1 and len(pack(*tensors, **options).tokens) <= budget:  # else more rows can make fewer tokens
        assert len(parts) == 1


def test_micro_batches_keep_groups_whole():
    prompts = [[5] * 4 + [i] * 16 for i in range(6)]
    groups = [[prompt + [10 + j] * 10 for j in range(4)] for prompt in prompts]
    mixed = [groups[i][j] for j in range(4) for i in range(6)]
    scored = [[False] * 20 + [True] * 10 for _ in mixed]
    tensors = Rows(mixed, [0] * len(mixed), scored).tensors()
    parts = split_by_tokens(*tensors, 2 * (20 + 4 * 10))
    assert [sorted(row % 6 for row in part.tolist()) for part in parts] == [[i] * 4 + [i + 1] * 4 for i in (0, 2, 4)]
    parts = split_by_tokens(*tensors, 20 + 2 * 10)  # too few for a group
    assert [len({row % 6 for row in part.tolist()}) for part in parts] == [1] * 12


ONES = torch.ones(2, 4, dtype=torch.int64)
MASK = torch.tensor([[0, 1, 1, 1]] * 2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((ONES.float(), ONES, MASK), "input_ids must be int64"),
        ((ONES[0], ONES, MASK), "input_ids must be"),
        ((ONES[:0], ONES[:0], MASK[:0]), "input_ids must hold at least one row"),
        ((-ONES, ONES, MASK), "input_ids must be at least 0"),
        ((ONES, ONES[:1], MASK), "attention_mask must be"),
        ((ONES, ONES * 2, MASK), "attention_mask must hold 0 and 1"),
        ((ONES, torch.tensor([[1, 0, 1, 1]] * 2), MASK * 0), "attention_mask: .* gap"),
        ((ONES, ONES, MASK[:1]), "completion_mask must be"),
        ((ONES, ONES, MASK.repeat(1, 2)), "completion_mask must be"),
        ((ONES, ONES, -MASK), "completion_mask must hold 0 and 1"),
        ((ONES, torch.tensor([[1, 1, 1, 0]] * 2), MASK), "completion_mask: padding"),
        ((ONES, ONES, ONES), "completion_mask: a row's first token"),
        (([[1]], ONES, ONES), "input_ids must be a torch.Tensor"),
    ],
)
def test_bad_input(args, message):
    with pytest.raises((TypeError, ValueError), match=message):
        pack(*args)
