"""Recurrences and convolutions over token trees, against a loop over tokens and against each row by itself."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate
from inputs import DTYPES, backends, sanitized

import flashpo
from flashpo import Lineage, pack, tree_conv, tree_recurrence
from flashpo.ops import _recurrence_reference as reference
from flashpo.ops.tree_recurrence import CHUNK, CHUNK_PER_FEATURE

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


@dataclasses.dataclass(frozen=True)
class Mode:
    """A recurrence as some family has it; `tokens -> inputs`."""

    key_heads: int = 2
    heads: int = 4
    features: int = 24
    values: int = 20
    per_feature: bool = False
    delta: bool = True
    strength: float = 2.0  # of the decay

    def make(self, tokens, dtype, wide=None):
        """Leaves of `dtype`'s precision, kept as `wide`."""
        q, k = (torch.randn(tokens, self.key_heads, self.features, dtype=torch.float64) for _ in "qk")
        v = torch.randn(tokens, self.heads, self.values, dtype=torch.float64)
        last = [self.features] if self.per_feature else []
        decay = -self.strength * torch.rand(tokens, self.heads, *last, dtype=torch.float64)
        beta = torch.rand(tokens, self.heads, dtype=torch.float64)
        beta[::7], beta[1::7] = 0, 1
        inputs = (q, F.normalize(k, dim=-1), v, decay, beta if self.delta else None)
        return [x if x is None else x.to(dtype).to(wide or dtype).requires_grad_() for x in inputs]


MODES = {
    "Qwen3.5": Mode(),
    "Kimi": Mode(4, 4, per_feature=True),
    "Mamba-2": Mode(1, 9, delta=False),  # more heads of one key than a unit of work has
    "per feature, without delta": Mode(per_feature=True, delta=False),
    "many heads of a key": Mode(1, 6, 8, 6),
    "many heads of a key, per feature": Mode(1, 6, 8, 6, per_feature=True),
    "strong decay": Mode(strength=60.0),
    "strong decay, per feature": Mode(per_feature=True, strength=60.0),
    "of whole vectors": Mode(1, 1, 64, 32),
    "one feature": Mode(1, 2, 1, 1),
}
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
WIDE = ([9, 12, 14, 41, 3, 3, 80], [0, 2, 2, 2, 1, 1, 1])  # seven branches of one token
TREES = {
    "branches in chunks and on their edges": ((90, 90, 90, 33, 21, 1), SHARED),
    "chains": ((1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 2), (0,) * 6),
    "many branches": WIDE,
    "one-token segments": (tuple(range(1, 41)), (0, *range(1, 40))),
    "deep": ((400, 399, 398), (0, 390, 397)),
}


def run(lineage, mode, inputs, upstream, d_ends, scale=SCALE):
    """out, the states behind the segments, and all gradients."""
    out, ends = tree_recurrence(*inputs, lineage, scale=scale, ends=True)
    loss = (out * upstream).sum() + (ends * d_ends).sum()
    return [out, ends, *torch.autograd.grad(loss, [x for x in inputs if x is not None])]


def check(mode, tree, backend, dtype):
    """As accurate as the reference in the same dtype, against itself in fp64 on the same numbers."""
    lineage = lineage_of(tree)
    upstream = torch.randn(len(tree.tokens), mode.heads, mode.values).to(dtype)
    d_ends = torch.randn(len(tree.parents), mode.heads, mode.features, mode.values)
    state = torch.get_rng_state()
    results = []
    for used, wide in (("torch", torch.float64), ("torch", dtype), (backend, dtype)):
        torch.set_rng_state(state)
        inputs = mode.make(len(tree.tokens), dtype, wide)
        flashpo.stats(reset=True)
        with flashpo.backend(used):
            results.append(run(lineage, mode, inputs, upstream.to(wide), d_ends))
        assert {name for counts in flashpo.stats().values() for name in counts} == {used}
    for exact, baseline, ours in zip(*results, strict=True):
        assert ours.dtype == baseline.dtype
        assert_as_accurate(ours, exact, baseline)


@every_mode
@pytest.mark.parametrize("backend", [b for b in backends() if b == "native"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.native
@pytest.mark.usefixtures("poisoned")
def test_as_accurate_as_the_reference(mode, backend, dtype):
    check(mode, make_tree(), backend, dtype)


@pytest.mark.parametrize("name", ["Qwen3.5", "Kimi", "Mamba-2"])
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.native
@pytest.mark.usefixtures("poisoned")
def test_trees(name, tree):
    check(MODES[name], make_tree(*tree), "native", torch.float32)


@every_mode
@pytest.mark.native
def test_the_same_bits_from_any_number_of_threads(mode, monkeypatch):
    tree = make_tree()
    inputs = mode.make(len(tree.tokens), torch.float32)
    upstream, d_ends = torch.randn(len(tree.tokens), mode.heads, mode.values), torch.tensor(0.5)
    results = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        with flashpo.backend("native"):
            results.append(run(lineage_of(tree), mode, inputs, upstream, d_ends))
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0]))


@sanitized
@pytest.mark.parametrize("name", ["Qwen3.5", "Kimi"])
@pytest.mark.usefixtures("poisoned")
def test_without_gradients_and_ends(name, backend):
    """Where no states are kept, the result is the same."""
    mode, tree = MODES[name], make_tree()
    if backend == "triton" and mode.per_feature:
        pytest.skip("not implemented")
    inputs = mode.make(len(tree.tokens), torch.float32)
    with flashpo.backend(backend):
        expected, _ = tree_recurrence(*inputs, lineage_of(tree), scale=SCALE)
        with torch.no_grad():
            out, none = tree_recurrence(*inputs, lineage_of(tree), scale=SCALE)
            again, ends = tree_recurrence(*inputs, lineage_of(tree), scale=SCALE, ends=True)
    assert none is None
    assert ends.shape == (len(tree.parents), mode.heads, mode.features, mode.values)
    assert torch.equal(out, expected)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("per_feature", [True, False])
@pytest.mark.parametrize("delta", [True, False])
def test_gradcheck(per_feature, delta):
    """With the gradients of the states behind the segments."""
    tree = make_tree((9, 8, 4), (0, 5, 0))
    inputs = Mode(1, 2, 3, 2, per_feature, delta).make(len(tree.tokens), torch.float64)
    lineage = lineage_of(tree)

    def function(*some):
        return tree_recurrence(*some, *([] if delta else [None]), lineage, scale=SCALE, ends=True)

    assert torch.autograd.gradcheck(function, [x for x in inputs if x is not None])


def test_the_states_alone_have_gradients():
    tree = make_tree()
    inputs = make_inputs(len(tree.tokens), torch.float32)
    for backend in ("native", "torch") if "native" in backends() else ("torch",):
        with flashpo.backend(backend):
            _, ends = tree_recurrence(*inputs, lineage_of(tree), ends=True)
            dq, dk, *_ = torch.autograd.grad(ends.square().sum(), inputs)
        assert (dq == 0).all()
        assert (dk != 0).any()


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


def convolved_by_rows(tree, x, weight, bias):
    """Every row by itself: a shared token counts in each of its rows."""
    out = torch.zeros_like(x)
    for row in tree.flat:
        row = row[row >= 0]
        padded = F.pad(x[row].T, (weight.shape[1] - 1, 0))[None]
        out[row] = F.conv1d(padded, weight[:, None], bias, groups=x.shape[1])[0].T
    return out


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_convolution(width, bias):
    tree = make_tree()
    x = torch.randn(len(tree.tokens), 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, width, dtype=torch.float64, requires_grad=True)
    offset = torch.randn(5, dtype=torch.float64, requires_grad=True) if bias else None
    ours = tree_conv(x, weight, offset, lineage_of(tree))
    upstream = torch.randn_like(ours)
    expected = convolved_by_rows(tree, x, weight, offset)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    inputs = x, weight, offset
    for a, b in zip(gradients(ours, inputs, upstream), gradients(expected, inputs, upstream)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "features", "bias"), [(1, 3, True), (2, 64, False), (4, 77, True), (8, 200, True)])
@pytest.mark.usefixtures("poisoned")
def test_convolution_as_accurate_as_the_reference(width, features, bias, dtype, monkeypatch):
    tree = make_tree(*TREES["deep"])
    lineage, upstream = lineage_of(tree), torch.randn(len(tree.tokens), features).to(dtype)
    plain = [torch.randn(len(tree.tokens), features), torch.randn(features, width), torch.randn(features)]
    plain = [x.to(dtype) for x in plain[: 3 if bias else 2]]
    results = []
    ways = [("torch", torch.float64, 1), ("torch", dtype, 1), ("native", dtype, 1), ("native", dtype, 3)]
    for backend, wide, threads in ways:
        inputs = [x.to(wide).requires_grad_() for x in plain]
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        with flashpo.backend(backend):
            out = tree_conv(*inputs, *([] if bias else [None]), lineage)
            results.append([out, *gradients(out, inputs, upstream.to(wide))])
    for exact, baseline, ours, with_threads in zip(*results, strict=True):
        assert_as_accurate(ours, exact, baseline)
        assert torch.equal(ours, with_threads)


def test_chunks_hold_every_token_once():
    tree = make_tree()
    chunks = lineage_of(tree).chunks(CHUNK)
    assert chunks.token.flatten()[chunks.place].tolist() == list(range(len(tree.tokens)))
    assert sum(chunks.sizes) == len(chunks.token)
    assert (chunks.token[chunks.token < len(tree.tokens)]).unique().numel() == len(tree.tokens)


def last_branch(d_behind, d_state, before):
    """A state whose gradient is that of one of its branches."""
    d_behind[before] = d_state


def no_state(behind, before):
    return torch.zeros_like(behind[before])


@pytest.mark.parametrize(("name", "mistake"), [("_summed", last_branch), ("_handed_on", no_state)])
def test_a_mistake_with_states_is_found(name, mistake, monkeypatch):
    """What `test_values_and_gradients` rests on: a state is handed on, and has a gradient from each of its branches."""
    monkeypatch.setattr(reference, name, mistake)
    with pytest.raises(AssertionError):
        test_values_and_gradients(False, True)


segments, parents = torch.tensor([[0, 2], [2, 5]]), torch.tensor([-1, 0])


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("segments must be int64", {"segments": segments.int()}),
        ("segments must be a torch.Tensor, got list", {"segments": [[0, 2]]}),
        ("segments must be on the host", {"segments": segments.to("meta")}),
        (r"segments must be \(segments, 2 or more\) with at least one", {"segments": segments[:0]}),
        ("segments must follow each other from token 0 on", {"segments": segments + 1}),
        ("segments must follow each other", {"segments": torch.tensor([[0, 2], [3, 5]])}),
        ("none of them empty", {"segments": torch.tensor([[0, 2], [2, 2]])}),
        ("parents must be one number for each of 2 segments", {"parents": parents[:1]}),
        ("parents must be earlier segments, or -1", {"parents": torch.tensor([-1, 1])}),
        ("parents must be earlier segments, or -1", {"parents": torch.tensor([-2, 0])}),
    ],
)
def test_a_lineage_that_is_none(message, change):
    with pytest.raises((TypeError, ValueError), match=message):
        Lineage(**({"segments": segments, "parents": parents} | change))


def test_a_lineage_of_other_tokens():
    inputs = make_inputs(4, torch.float32)
    with pytest.raises(ValueError, match="lineage has 5 tokens, q has 4"):
        tree_recurrence(*inputs, Lineage(segments, parents))
    with pytest.raises(ValueError, match="lineage is on meta, x on cpu"):
        tree_conv(torch.zeros(5, 2), torch.zeros(2, 2), None, Lineage(segments, parents, "meta"))
