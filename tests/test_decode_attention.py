"""decode_attention against a dense softmax over each row's own keys in float64. Unused cache slots hold NaN."""

import dataclasses

import pytest
import torch
from accuracy import assert_as_accurate, assert_equal_to_rounding
from decode_inputs import FORESTS, plant
from inputs import DTYPES, backends, sanitized

import flashpo
from flashpo import decode_attention

every_backend = pytest.mark.parametrize("backend", backends())
pytestmark = pytest.mark.usefixtures("poisoned")


def compare(problem, backend, dtype):
    flashpo.stats(reset=True)
    with flashpo.backend(backend):
        out, lse = problem.ours(dtype)
    assert flashpo.stats() == {"decode_attention_fwd": {backend: 1}}
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    exact, exact_lse = problem.dense(dtype, torch.float64)
    plain, plain_lse = problem.dense(dtype, torch.float32)
    assert_as_accurate(out, exact, plain)
    some = exact_lse > -torch.inf
    assert torch.equal(lse > -torch.inf, some)
    assert_as_accurate(lse[some], exact_lse[some], plain_lse[some])


@sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("forest", FORESTS)
def test_trees(backend, dtype, forest):
    compare(plant(FORESTS[forest]), backend, dtype)


@sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "rep", "features", "value_features"), [
    (1, 1, 8, 8), (3, 1, 64, 128), (2, 4, 80, 80), (1, 8, 128, 64), (2, 3, 96, 96), (2, 7, 256, 256), (1, 2, 13, 37),
    (1, 16, 192, 128), (1, 1, 1, 1),
])  # fmt: skip
def test_heads_and_features(backend, dtype, heads, rep, features, value_features):
    compare(plant([(130, 3, 64, 65), 70], heads, rep, features, value_features), backend, dtype)


@sanitized
@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 90, 130, 10_000])
def test_windows(backend, window):
    """They end within a segment, at its border, before the prefix; rows of one group at different positions."""
    for forest in ("ragged groups", "three levels", "rows without own tokens"):
        compare(plant(FORESTS[forest], window=window), backend, torch.float32)


@sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softcap_and_sinks(backend, dtype):
    for options in (
        {"softcap": 3.0, "spread": 3.0},  # logits to +-30: far in the tanh
        {"softcap": 50.0},
        {"sinks": torch.randn(4)},
        {"sinks": torch.tensor([30.0, -30.0, -torch.inf, 0.0])},
        {"softcap": 5.0, "sinks": torch.randn(4), "window": 70, "spread": 2.0, "scale": 0.3},
    ):
        compare(plant(FORESTS["three levels"], **options), backend, dtype)
    sinks = torch.randn(4).to(torch.bfloat16)
    compare(plant(FORESTS["rows without own tokens"], sinks=sinks), backend, dtype)


@every_backend
def test_large_logits(backend):
    """Thousands apart: nothing overflows, and the largest takes it all. Of integers, so that fp32 has them exactly."""
    problem = plant(FORESTS["ragged groups"], spread=30.0, scale=0.125)
    for x in (problem.q, *(s.k for s in problem.segments)):
        x.round_()
    compare(problem, backend, torch.float32)


@sanitized
def test_rows_that_nobody_covers(backend):
    problem = plant([(70, 3, 4), 5, 6])
    problem.segments = [s for s in problem.segments if not s.begin <= 2 < s.end]
    compare(problem, backend, torch.float32)
    for sinks in (None, torch.randn(4)):
        problem.options["sinks"] = sinks
        with flashpo.backend(backend):
            out, lse = problem.ours(torch.float32)
        assert (out[2] == 0).all()
        assert torch.equal(lse[2], torch.full((4,), -torch.inf) if sinks is None else sinks)


@every_backend
def test_a_poisoned_prefix_outside_of_the_window(backend):
    problem = plant([(200, 70, 80, 90)], window=60)
    expected = problem.dense(torch.float32, torch.float64)
    problem.segments[0].v[:] = torch.nan
    problem.segments[0].k[:] = torch.nan
    with flashpo.backend(backend):
        out, lse = problem.ours(torch.float32)
    torch.testing.assert_close(out.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-5, atol=1e-5)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_row(backend, dtype):
    """NaN in a query, in a key or in a value of its own: this row is NaN, every other as it was."""
    problem = plant([(70, 3, 4, 5), (20, 6, 2)])
    with flashpo.backend(backend):
        expected = problem.ours(dtype)
        for spoil in ("q", "k", "v"):
            spoiled = dataclasses.replace(problem, q=problem.q.clone(), segments=list(problem.segments))
            if spoil == "q":
                spoiled.q[1] = torch.nan
            else:
                i = next(i for i, s in enumerate(problem.segments) if s.end - s.begin == 1 and s.begin == 1)
                bad = getattr(problem.segments[i], spoil).clone()
                bad[2] = torch.nan
                spoiled.segments[i] = dataclasses.replace(problem.segments[i], **{spoil: bad})
            out, lse = spoiled.ours(dtype)
            assert out[1].isnan().all()
            assert spoil == "v" or lse[1].isnan().all()
            others = torch.arange(5) != 1
            assert torch.equal(out[others], expected[0][others])
            assert torch.equal(lse[others], expected[1][others])


@pytest.mark.parametrize("backend", [b for b in backends() if b != "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_batch(backend, dtype):
    """Alone with the segments of its path, and in a batch of many: the same bits, but for the interpreter's products,
    which are numpy's."""
    for options in ({}, {"window": 130, "softcap": 20.0, "sinks": torch.randn(8)}):
        problem = plant([(700, *[3] * 9, (90, 2, 5)), (64, 70, 1), 300], rep=4, **options)
        exact, plain = problem.dense(dtype, torch.float64), problem.dense(dtype, torch.float32)
        with flashpo.backend(backend):
            out, lse = problem.ours(dtype)
            for b in range(len(problem.q)):
                path = [dataclasses.replace(s, begin=0, end=1) for s in problem.segments if s.begin <= b < s.end]
                here = slice(b, b + 1)
                alone = dataclasses.replace(
                    problem, q=problem.q[here], segments=path, position=problem.position[here]
                ).ours(dtype)
                if backend == "native":
                    assert torch.equal(out[here], alone[0])
                    assert torch.equal(lse[here], alone[1])
                for together, single, true, baseline in zip((out, lse), alone, exact, plain):
                    rounded = baseline.to(together.dtype)
                    assert_equal_to_rounding(together[here], single, true[here], rounded[here])


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_a_bit(dtype):
    """Work is cut by rows, heads and keys until there is enough for all threads."""
    forests = [(1500, 3, 4)], [(64, 70, 1), (300, *[3] * 70)], FORESTS["three levels"], [2000]
    for forest in forests:
        problem = plant(forest, window=1200)
        with flashpo.backend("native"):
            expected = problem.ours(dtype)
            for threads in (2, 5):
                before = torch.get_num_threads()
                torch.set_num_threads(threads)
                try:
                    assert all(map(torch.equal, problem.ours(dtype), expected))
                finally:
                    torch.set_num_threads(before)


def test_the_comparison_sees_small_mistakes():
    """Negative controls: what a wrong kernel would get wrong is far more than `compare` lets pass."""
    options = {"window": 130, "softcap": 8.0, "sinks": torch.randn(4), "scale": 0.2, "spread": 1.5}
    problem = plant(FORESTS["three levels"], **options)
    compare(problem, "torch", torch.float32)
    for name, wrong in (("window", 131), ("window", 129), ("sinks", None), ("scale", 0.2 * 1.01), ("softcap", 0.0)):
        mistaken = dataclasses.replace(problem, options={**problem.options, name: wrong})
        mistaken.dense = problem.dense
        with pytest.raises(AssertionError, match="error"):
            compare(mistaken, "torch", torch.float32)


@sanitized
def test_layouts_and_empty_batches(backend):
    problem = plant(FORESTS["ragged groups"])
    q, *rest = problem.tables(torch.float32)
    with flashpo.backend(backend):
        expected = decode_attention(q, *rest, **problem.options)
        sliced = torch.full((q.shape[0], 9, 70), torch.nan)[:, 1:5, 3:67].copy_(q)
        wide = [torch.stack([x, x], -1)[..., 0] for x in rest[2:]]  # tables that are not dense
        changed = decode_attention(sliced, *rest[:2], *wide, **problem.options)
        if backend != "torch":  # whose products may take another order for another layout
            assert all(map(torch.equal, changed, expected))
        exact, plain = (problem.dense(torch.float32, x) for x in (torch.float64, torch.float32))
        for numbers in zip(changed, expected, exact, plain):
            assert_equal_to_rounding(*numbers)
        out, lse = decode_attention(q[:0], *rest[:2], *(x[:0] for x in rest[2:]), **problem.options)
        assert out.shape == (0, 4, 64)
        assert lse.shape == (0, 4)
        out, lse = decode_attention(q, *rest[:2], *(x[:0] for x in rest[2:6]), rest[6], **problem.options)
        assert (out == 0).all()
        assert (lse == -torch.inf).all()


def test_float64_stays_float64():
    problem = plant(FORESTS["three levels"], softcap=5.0, sinks=torch.randn(4), window=70)
    for ours, exact in zip(problem.ours(torch.float64), problem.dense(torch.float64, torch.float64)):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


@every_backend
def test_bad_tables_raise(backend):
    if backend == "triton":
        pytest.skip("device assertions end the process")
    problem = plant([(70, 3, 4), 5])
    names = ["q", "k_cache", "v_cache", "rows", "start", "length", "blocks", "position"]
    good = dict(zip(names, problem.tables(torch.float32, unused=0)))

    def call(**changes):
        with flashpo.backend(backend):
            return decode_attention(**{**good, **changes}, **problem.options)

    call()
    for name, at, value in (
        ("rows", (0, 1), 4), ("rows", (0, 0), -1), ("rows", (0, 0), 3), ("length", 0, -1), ("length", 1, 1000),
        ("blocks", (0, 1), 99), ("blocks", (1, 0), -1),
    ):  # fmt: skip
        bad = good[name].clone()
        bad[at] = value
        with pytest.raises(ValueError, match=name):
            call(**{name: bad})
    for name in names[3:]:
        with pytest.raises(TypeError, match=name):
            call(**{name: good[name].long()})
        with pytest.raises(ValueError, match=name):
            call(**{name: good[name][..., None]})
    with pytest.raises(TypeError, match="q must be"):
        call(q=good["q"].bfloat16())
    with pytest.raises(TypeError, match="v_cache"):
        call(v_cache=good["v_cache"].bfloat16())
    with pytest.raises(ValueError, match="q must be"):
        call(q=good["q"][:, :3])
    with pytest.raises(ValueError, match="k_cache"):
        call(k_cache=good["k_cache"].transpose(2, 3))
    for option, value in (("scale", 0.0), ("window", -1), ("softcap", -1.0), ("sinks", torch.zeros(3))):
        with pytest.raises(ValueError, match=option):
            decode_attention(**good, **{**problem.options, option: value})
    with pytest.raises(ValueError, match="no_grad"):
        call(q=good["q"].clone().requires_grad_())


@every_backend
def test_compiles_into_one_graph(backend, graphs, counting):
    def attend(*args):
        return decode_attention(*args, scale=0.125, window=50)[0] * 2

    compiled = torch.compile(attend, backend=counting, fullgraph=True, dynamic=True)
    with flashpo.backend(backend):
        for forest in ("ragged groups", "no sharing", "three levels"):
            args = plant(FORESTS[forest]).tables(torch.float32)
            assert torch.equal(compiled(*args), attend(*args))
    assert len(graphs) == 1
