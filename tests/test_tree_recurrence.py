"""Recurrences and convolutions over token trees: against a loop over tokens, and against each row by itself."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate

from flashpo import pack
from flashpo.ops import tree_recurrence as recurrence
from flashpo.ops._lineage import Lineage
from flashpo.ops.tree_conv import tree_conv
from flashpo.ops.tree_recurrence import CHUNK, CHUNK_PER_FEATURE, tree_recurrence

FEATURES, VALUES, SCALE = 8, 6, 0.3
SHARED = [0, 40, 70, 20, 20, 0]  # tokens of each row that are those of the row before


def make_tree(lengths=(90, 90, 90, 33, 21, 1), shared=SHARED):
    """Branches within chunks and on their edges, rows of one token, two roots."""
    width = max(lengths)
    ids = torch.randint(1000, (len(lengths), width))
    for row, n in enumerate(shared):
        ids[row, :n] = ids[row - 1, :n]
    live = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    scored = live.clone()
    scored[:, 0] = 0
    return pack(ids, live, scored, min_saved=1, prune=False)


def lineage_of(tree) -> Lineage:
    return Lineage(tree.segments, tree.parents, torch.device("cpu"))


def make_inputs(tokens, dtype=torch.float64, key_heads=2, heads=4, per_feature=False, delta=True):
    q, k = (torch.randn(tokens, key_heads, FEATURES, dtype=dtype) for _ in "qk")
    v = torch.randn(tokens, heads, VALUES, dtype=dtype)
    decay = -2 * torch.rand(tokens, heads, *([FEATURES] if per_feature else []), dtype=dtype)
    beta = torch.rand(tokens, heads, dtype=dtype) if delta else None
    return [x if x is None else x.requires_grad_() for x in (q, F.normalize(k, dim=-1).detach(), v, decay, beta)]


def token_by_token(q, k, v, decay, beta, parents, scale):
    """The definition; parents: of each token, -1 where it is a first one."""
    repeats = v.shape[1] // q.shape[1]
    q, k = (x.repeat_interleave(repeats, 1) for x in (q, k))
    start = v.new_zeros(v.shape[1], k.shape[2], v.shape[2])
    states, out = [], []
    for t, parent in enumerate(parents):
        factor = decay[t].exp()
        state = (states[parent] if parent >= 0 else start) * (
            factor[..., None] if factor.dim() == 2 else factor[:, None, None]
        )
        u = v[t]
        if beta is not None:
            u = beta[t][:, None] * (u - torch.einsum("hkv,hk->hv", state, k[t]))
        states.append(state + k[t][:, :, None] * u[:, None])
        out.append(scale * torch.einsum("hkv,hk->hv", states[t], q[t]))
    return torch.stack(out)


def parents_of(tree) -> list[int]:
    """From the rows, not from what is tested."""
    parents = [-1] * len(tree.tokens)
    for row in tree.flat.tolist():
        row = [i for i in row if i >= 0]
        for before, here in itertools.pairwise(row):
            parents[here] = before
    return parents


def gradients(out, inputs, upstream):
    return torch.autograd.grad((out * upstream).sum(), [x for x in inputs if x is not None])


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("per_feature", [True, False])
def test_values_and_gradients(per_feature, delta):
    tree = make_tree()
    assert len(tree.parents) > 6
    assert len(tree.tokens) > 4 * max(CHUNK, CHUNK_PER_FEATURE)
    inputs = make_inputs(len(tree.tokens), per_feature=per_feature, delta=delta)
    ours, _ = tree_recurrence(*inputs, lineage_of(tree), scale=SCALE)
    exact = token_by_token(*inputs, parents_of(tree), SCALE)
    upstream = torch.randn_like(exact)
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(ours, inputs, upstream), gradients(exact, inputs, upstream)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("tokens", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_a_chain(tokens):
    tree = make_tree([tokens], [0])
    inputs = make_inputs(tokens)
    exact = token_by_token(*inputs, range(-1, tokens - 1), SCALE)
    ours, _ = tree_recurrence(*inputs, lineage_of(tree), scale=SCALE)
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("per_feature", [True, False])
def test_strong_decay_neither_overflows_nor_loses_gradients(per_feature):
    """exp(G_i - G_j) of a later j would be infinite."""
    tree = make_tree()
    q, k, v, decay, beta = make_inputs(len(tree.tokens), torch.float32, per_feature=per_feature)
    decay = (100 * decay.detach()).requires_grad_()
    inputs = q, k, v, decay, beta
    ours, _ = tree_recurrence(*inputs, lineage_of(tree), scale=SCALE)
    found = gradients(ours, inputs, torch.randn_like(ours))
    assert all(x.isfinite().all() for x in (ours, *found))
    exact = token_by_token(*(x.double() for x in inputs), parents_of(tree), SCALE)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_fp32(dtype):
    tree = make_tree()
    inputs = [x.detach().to(dtype) for x in make_inputs(len(tree.tokens))]
    parents = parents_of(tree)
    ours, _ = tree_recurrence(*inputs, lineage_of(tree), scale=SCALE)
    assert ours.dtype == dtype
    exact = token_by_token(*(x.double() for x in inputs), parents, SCALE)
    baseline = token_by_token(*(x.float() for x in inputs), parents, SCALE).to(dtype)
    assert_as_accurate(ours, exact, baseline)


def test_autocast_changes_nothing():
    tree = make_tree()
    inputs = make_inputs(len(tree.tokens), torch.float32)
    expected, _ = tree_recurrence(*inputs, lineage_of(tree), scale=SCALE)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = tree_recurrence(*inputs, lineage_of(tree), scale=SCALE)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_convolution(width, bias):
    """Of every row by itself; with gradients, for which a shared token counts in each of its rows."""
    tree = make_tree()
    x = torch.randn(len(tree.tokens), 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, width, dtype=torch.float64, requires_grad=True)
    offset = torch.randn(5, dtype=torch.float64, requires_grad=True) if bias else None
    ours = tree_conv(x, weight, offset, lineage_of(tree))
    upstream = torch.randn_like(ours)
    expected = torch.zeros_like(ours)
    for row in tree.flat:
        row = row[row >= 0]
        padded = F.pad(x[row].T, (width - 1, 0))[None]
        expected[row] = F.conv1d(padded, weight[:, None], offset, groups=5)[0].T
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    inputs = x, weight, offset
    for a, b in zip(gradients(ours, inputs, upstream), gradients(expected, inputs, upstream)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_chunks_hold_every_token_once():
    tree = make_tree()
    chunks = lineage_of(tree).chunks(CHUNK)
    assert chunks.token.flatten()[chunks.place].tolist() == list(range(len(tree.tokens)))
    assert sum(chunks.sizes) == len(chunks.token)
    assert (chunks.token[chunks.token < len(tree.tokens)]).unique().numel() == len(tree.tokens)


class LastBranch(torch.autograd.Function):
    """A state whose gradient is that of one of its branches."""

    @staticmethod
    def forward(ctx, behind, before):
        ctx.before, ctx.shape = before, behind.shape
        return behind[before]

    @staticmethod
    def backward(ctx, d):
        return d.new_zeros(ctx.shape).index_copy(0, ctx.before, d), None


def test_a_gradient_that_is_not_summed_is_wrong(monkeypatch):
    """What `test_values_and_gradients` rests on: the state behind a shared segment has a gradient from each branch."""
    monkeypatch.setattr(recurrence, "_handed_on", LastBranch.apply)
    with pytest.raises(AssertionError):
        test_values_and_gradients(False, True)
