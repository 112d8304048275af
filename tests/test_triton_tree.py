"""Triton's `tree_attention` against attention by rows, on a CPU: TRITON_INTERPRET=1 pytest tests/test_triton_tree.py"""

import os
from dataclasses import replace

import pytest
import torch
from inputs import DTYPES
from tree_inputs import OPTIONS, TREES, Attention, Tree, check, group, ours, run

import flashpo

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the interpreter is chosen when Triton is imported: set TRITON_INTERPRET=1", allow_module_level=True)

from flashpo.kernels import tree_attention, tree_attention_backward, tree_tiles
from flashpo.ops._masked_attention import visible

pytestmark = pytest.mark.usefixtures("poisoned")
FEW_HEADS = {name: replace(x, heads=8, kv_heads=4) if x.heads > 8 else x for name, x in OPTIONS.items()}


@pytest.mark.parametrize("attention", FEW_HEADS.values(), ids=FEW_HEADS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(attention, dtype):
    check(attention, TREES["two groups"], "triton", dtype)


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
@pytest.mark.parametrize("name", ["plain", "window"])
def test_trees(name, tree):
    check(OPTIONS[name], tree, "triton", torch.float32)


@pytest.fixture
def small_tiles(monkeypatch):
    """Many tiles from few tokens."""
    table = {dim: ((32, 16, 1, 4),) for dim in (64, 128, 256)}
    for module in (tree_attention, tree_attention_backward):
        monkeypatch.setattr(module, "TILES_32_BIT", table)
    monkeypatch.setattr(tree_tiles, "CHUNK", 4)


MANY_TILES = Tree.of(group(50, 40, 3, 1), (20, (15, (5,), (35,)), (2,)), (1,))


@pytest.mark.parametrize("name", ["plain", "window", "everything"])
@pytest.mark.usefixtures("small_tiles")
def test_many_tiles(name):
    window = 37 if OPTIONS[name].window else 0
    check(replace(OPTIONS[name], window=window, heads=4, kv_heads=2), MANY_TILES, "triton", torch.float32)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.usefixtures("small_tiles")
def test_random_trees(seed):
    tree = Tree.random(roots=3, depth=3, children=3, tokens=20)
    check(Attention(heads=2, kv_heads=1, window=(0, 30)[seed % 2]), tree, "triton", torch.float32)


@pytest.mark.usefixtures("small_tiles")
def test_same_twice():
    attention = Attention(heads=2, kv_heads=1)
    inputs = attention.make(len(MANY_TILES), torch.float32)
    upstream = torch.randn(len(MANY_TILES), 2, 16)
    with flashpo.backend("triton"):
        first, second = (run(lambda *x: ours(attention, MANY_TILES, *x), inputs, upstream) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second))


@pytest.mark.usefixtures("small_tiles")
def test_lists_are_made_once_a_tree(monkeypatch):
    """Layers and their backward share them; another tree, or the same tensors with another tree in them, do not."""
    made, make = [], tree_tiles._made
    monkeypatch.setattr(tree_tiles, "_made", lambda *args: made.append(args[2:]) or make(*args))
    tree, other = Tree.of(group(30, 20, 25)), Tree.of(group(60, 5, 10))
    layers = Attention(heads=2, kv_heads=1), Attention(heads=2, kv_heads=1, window=20)
    for _ in range(2):
        [check(layer, tree, "triton", torch.float32) for layer in layers]
    assert len(made) == len(set(made)) == 4  # of queries, which backward shares, and of keys; of each window
    check(layers[0], other, "triton", torch.float32)
    assert len(made) == 6
    other.end.copy_(tree.end)
    other.position.copy_(tree.position)
    check(layers[0], replace(other, rows=tree.rows), "triton", torch.float32)
    assert len(made) == 8


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("window", [None, 1, 20, 64])
@pytest.mark.parametrize(("row", "column"), [(32, 16), (16, 32), (16, 16)])
def test_lists_of_tiles(by_key, window, row, column):
    """Every tile that holds something, once; and nothing unseen in a full one."""
    tree = MANY_TILES
    here = torch.arange(len(tree))
    seen = visible(here, here, tree.end, tree.position, window or 0)
    seen = seen.t() if by_key else seen
    lists, counts = tree_tiles.lists(tree.end, tree.position, window, row, column, by_key)
    assert lists.shape == (-(-len(tree) // row), -(-len(tree) // column))
    for r, (full, others) in enumerate(counts.tolist()):
        of_full = lists[r, :full].tolist()
        of_others = lists[r, lists.shape[1] - others :].tolist()
        assert len({*of_full, *of_others}) == full + others
        for c in range(lists.shape[1]):
            tile = seen[r * row : (r + 1) * row, c * column : (c + 1) * column]
            assert c not in of_full or tile.all()
            assert c in of_full or c in of_others or not tile.any()


@pytest.mark.usefixtures("small_tiles")
def test_skips_what_nobody_sees():
    """Eight completions of 32 after a prompt of 64: a completion's tile visits the prompt's and its own."""
    tree = Tree.of(group(64, *[32] * 8))
    _, counts = tree_tiles.lists(tree.end, tree.position, None, 32, 32, rows_are_keys=False)
    assert counts.tolist() == [[0, 1], [1, 1]] + 8 * [[2, 1]]


def test_lists_are_those_of_the_tree_that_asks(monkeypatch):
    """Another thread may come with its own tree at any moment: here, while ours is compared with the kept one."""
    mine, other = (Tree.of(group(n, 32)) for n in (64, 32))
    kept = tree_tiles._kept(mine.end, mine.position)
    assert tree_tiles._kept(mine.end, mine.position) is kept

    class Address(int):
        def __eq__(self, value):
            monkeypatch.undo()
            tree_tiles._kept(other.end, other.position)
            return int(self) == value

        __hash__ = int.__hash__

    identity, tree, lists = tree_tiles._last
    monkeypatch.setattr(
        tree_tiles, "_last", ((identity[0], (Address(identity[1][0]), *identity[1][1:]), identity[2]), tree, lists)
    )
    assert tree_tiles._kept(mine.end, mine.position) is kept
    tree_tiles.release()
    assert tree_tiles._last is None
