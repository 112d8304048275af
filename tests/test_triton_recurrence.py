"""Triton's tree_recurrence against the reference, on CPU: TRITON_INTERPRET=1 pytest tests/test_triton_recurrence.py"""

import os

import pytest
import torch
from inputs import DTYPES
from test_tree_recurrence import Mode, check, lineage_of, make_tree

import flashpo

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the interpreter is chosen when Triton is imported: set TRITON_INTERPRET=1", allow_module_level=True)

from flashpo.kernels import tree_recurrence

MODES = {
    "delta rule": Mode(1, 2, 8, 6),
    "without delta": Mode(1, 2, 8, 6, delta=False),
    "strong decay": Mode(1, 1, 16, 5, strength=60.0),
    "heads of their own": Mode(2, 2, 3, 16),
}
TREES = {
    "branches": ((42, 41, 38, 4, 1), (0, 40, 36, 3, 0)),  # on the edge of a chunk and inside, roots of few tokens
    "a chain": ((70,), (0,)),
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.usefixtures("poisoned")
def test_modes(mode):
    check(mode, make_tree(*TREES["branches"]), "triton", torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_narrow_dtypes(dtype):
    check(MODES["delta rule"], make_tree(*TREES["a chain"]), "triton", dtype)


@pytest.mark.usefixtures("poisoned")
def test_several_blocks_of_values(monkeypatch):
    monkeypatch.setattr(tree_recurrence, "BLOCK_V", 16)
    check(Mode(1, 1, 5, 35), make_tree(*TREES["a chain"]), "triton", torch.float32)


def test_without_gradients_no_states_are_kept():
    mode, tree = MODES["delta rule"], make_tree(*TREES["branches"])
    inputs = mode.make(len(tree.tokens), torch.float32)
    with flashpo.backend("triton"), torch.no_grad():
        out, ends = flashpo.tree_recurrence(*inputs, lineage_of(tree))
        again, states = flashpo.tree_recurrence(*inputs, lineage_of(tree), ends=True)
    assert ends is None
    assert torch.equal(out, again)
    assert states.shape == (len(tree.parents), 2, 8, 6)


def test_a_decay_for_each_feature_is_for_other_backends():
    tree = make_tree(*TREES["a chain"])
    inputs = Mode(1, 1, 4, 4, per_feature=True).make(len(tree.tokens), torch.float32)
    with flashpo.backend("triton"), pytest.raises(NotImplementedError, match="triton"):
        flashpo.tree_recurrence(*inputs, lineage_of(tree))
    with torch.no_grad():
        flashpo.tree_recurrence(*inputs, lineage_of(tree))
