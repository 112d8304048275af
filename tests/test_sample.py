"""sample: its random numbers, its filters against transformers' warpers, and its draws against exact probabilities."""

import pytest
import torch
from accuracy import assert_as_accurate
from inputs import DTYPES, backends

import flashpo
from flashpo import sample, selective_log_softmax
from flashpo.ops.sample import uniform

transformers = pytest.importorskip("transformers")

NATIVE = pytest.param("native", marks=pytest.mark.native)  # repeated by `make sanitize`
every_backend = pytest.mark.parametrize(
    "backend", [NATIVE if b == "native" else b for b in backends() if b != "triton"]
)
native_alone = pytest.mark.parametrize("backend", [NATIVE] if "native" in backends() else [])
INF, NAN = float("inf"), float("nan")
FILTERS = [
    {},
    {"temperature": 0.6},
    {"temperature": 0.0},
    {"temperature": 1e-30, "top_k": 3},
    {"temperature": 1e30, "top_p": 0.43},
    {"top_k": 1},
    {"top_k": 20},
    {"top_k": 10**12},
    {"top_p": 0.0},
    {"top_p": 1e-9},
    {"top_p": 0.9},
    {"top_p": 0.999999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 1.7, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
]


def philox(key, counter):
    """Philox4x32-10 in Python's integers, as the paper writes it."""
    (k0, k1), c = key, list(counter)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k0, b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k1, a & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def streams(rows):
    """Seeds and offsets over all of int64."""
    return {name: torch.randint(-(2**63), 2**63 - 1, (rows,)) for name in ("seed", "offset")}


def kept_tokens(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """What transformers' own warpers keep of (B, V) logits, in their order."""
    warpers = [transformers.TemperatureLogitsWarper(temperature)]
    if top_k:
        warpers.append(transformers.TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(transformers.TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(transformers.MinPLogitsWarper(min_p))
    for warper in warpers:
        logits = warper(None, logits)
    return logits > -INF


def test_philox_is_the_published_one():
    """Known answers of the authors' library, Random123."""
    ones = 0xFFFFFFFF
    assert philox((0, 0), (0, 0, 0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox((ones, ones), (ones,) * 4) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = (0xA4093822, 0x299F31D0), (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox(*pi) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    rows = streams(500)
    for seed, offset, u in zip(rows["seed"].tolist(), rows["offset"].tolist(), uniform(**rows).tolist()):
        words = [(x >> shift) & ones for x in (seed, offset) for shift in (0, 32)]
        high, low, *_ = philox(words[:2], (*words[2:], 0, 0))
        assert u == ((high << 32 | low) >> 11) * 2.0**-53


@native_alone
@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 333, 4096, 5003, 32768, 151936])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_against_the_specification(backend, vocab, dtype):
    """The same tokens as the reference in float64, and numbers as good as selective_log_softmax's."""
    rows = 5
    logits = (torch.randn(rows, vocab) * torch.tensor([0.1, 1, 3, 10, 40])[:, None]).to(dtype)
    logits[1, vocab // 2 :] = -INF if vocab > 1 else 0.0
    for parameters in FILTERS:
        parameters = parameters | streams(rows)
        with flashpo.backend("torch"):
            exact = sample(logits.double(), **parameters)
        flashpo.stats(reset=True)
        with flashpo.backend(backend):
            ours = sample(logits, **parameters)
        assert flashpo.stats() == {"sample_rows": {backend: 1}}
        assert torch.equal(ours.token, exact.token), parameters
        temperature = parameters.get("temperature", 1.0) or 1.0
        baseline = selective_log_softmax(logits, ours.token, temperature=temperature).logprob
        assert_as_accurate(ours.logprob_full, exact.logprob_full, baseline)
        assert_as_accurate(ours.kept_mass, exact.kept_mass, exact.kept_mass, floor=2e-6)
        assert_as_accurate(ours.logprob, exact.logprob, baseline, floor=4e-6)
        if parameters.keys() <= {"temperature", "seed", "offset"} and parameters.get("temperature") != 0:
            assert (ours.kept_mass == 1).all()
            assert torch.equal(ours.logprob, ours.logprob_full)


@every_backend
@pytest.mark.parametrize("parameters", [f for f in FILTERS if f.get("temperature") != 0], ids=str)
def test_keeps_what_transformers_keeps(backend, parameters):
    """Seen through many draws, and through the mass that is kept. Logits are all different: no ties."""
    logits = torch.randperm(97).mul(0.15).sub(3)[None]
    draws = 20_000
    with flashpo.backend(backend):
        out = sample(logits.expand(draws, -1), **parameters, seed=7, offset=torch.arange(draws))
    their = dict(parameters)
    kept = kept_tokens(logits.double(), **(their | {"top_k": min(their.get("top_k", 0), 97)}))[0]
    assert kept[out.token].all()
    p = (logits[0].double() / parameters.get("temperature", 1.0)).softmax(-1)
    torch.testing.assert_close(out.kept_mass, p[kept].sum().float().expand(draws), rtol=1e-6, atol=0)
    frequent = kept & (p / p[kept].sum() > 1e-3)
    assert torch.equal(frequent, frequent & (out.token.bincount(minlength=97) > 0))


@every_backend
def test_ties_keep_the_smaller_ids(backend):
    """A filter ends within equal logits: the first of them stay. 1 and 2 are the largest, then all zeros are equal."""
    vocab, draws = 3000, 800
    logits = torch.zeros(vocab)
    logits[700], logits[50] = 5.0, 4.0
    zeros = [i for i in range(vocab) if i not in (50, 700)]
    for dtype in DTYPES:
        for top_k in (1, 2, 3, 40, 2999):
            with flashpo.backend(backend):
                rows = logits.to(dtype).expand(draws, -1)
                out = sample(rows, top_k=top_k, temperature=4.0, seed=1, offset=torch.arange(draws))
            allowed = [700, 50, *zeros][:top_k]
            assert set(out.token.tolist()) <= set(allowed)
            assert len(set(out.token.tolist())) > 0.7 * min(top_k, 40)
            mass = (logits / 4).softmax(-1)[allowed].sum()
            torch.testing.assert_close(out.kept_mass[0], mass, rtol=1e-5, atol=0)
        with flashpo.backend(backend):
            greedy = sample(logits.roll(1).to(dtype)[None].clamp(max=0), temperature=0.0, seed=0, offset=0)
            share = sample(torch.zeros(1, vocab, dtype=dtype), top_p=0.2501, seed=0, offset=0)
        assert greedy.token.item() == 0
        assert share.token.item() <= 750
        assert share.kept_mass.item() == pytest.approx(751 / 3000, abs=1e-6)


@pytest.mark.parametrize(
    "parameters",
    [{}, {"temperature": 0.7}, {"top_k": 100}, {"top_p": 0.9}, {"min_p": 0.03}, {"top_k": 300, "top_p": 0.95}],
    ids=str,
)
def test_draws_follow_the_exact_probabilities(parameters):
    """chi-square over a million draws: within four sigma of what it should be, and nothing else is ever drawn."""
    vocab, draws, at_once = 1024, 1_000_000, 50_000
    logits = torch.randn(vocab) * 2
    counts = torch.zeros(vocab, dtype=torch.int64)
    for start in range(0, draws, at_once):
        offset = torch.arange(start, start + at_once)
        out = sample(logits.expand(at_once, -1), **parameters, seed=42, offset=offset)
        counts += out.token.bincount(minlength=vocab)
    kept = kept_tokens(logits[None].double(), **parameters)[0]
    assert counts[~kept].sum() == 0
    p = (logits.double() / parameters.get("temperature", 1.0)).softmax(-1).where(kept, 0.0)
    expected = draws * p / p.sum()
    order = expected.argsort(descending=True)
    counts, expected = counts[order].double(), expected[order]
    common = expected >= 5
    rare = expected[~common].sum() >= 5  # the others count as one
    counts = torch.cat((counts[common], counts[~common].sum()[None])) if rare else counts[common]
    expected = torch.cat((expected[common], expected[~common].sum()[None])) if rare else expected[common]
    freedom = len(expected) - 1
    chi_square = ((counts - expected).square() / expected).sum().item()
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


def test_a_biased_sampler_would_be_seen():
    """The same test statistic on draws from probabilities that are 2 % off."""
    vocab, draws = 1024, 1_000_000
    p = (torch.randn(vocab) * 2).double().softmax(-1)
    tilted = p * (1 + 0.02 * torch.randn(vocab))
    counts = torch.multinomial(tilted, draws, replacement=True).bincount(minlength=vocab).double()
    expected = draws * p
    common = expected >= 5
    chi_square = ((counts - expected).square() / expected)[common].sum().item()
    assert chi_square - common.sum() > 4 * (2 * common.sum()) ** 0.5


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_batch(backend, dtype):
    """Bitwise, each row with parameters of its own; permuted, alone, and strided."""
    rows, vocab = 12, 5003
    logits = (torch.randn(rows, vocab) * 4).to(dtype)
    parameters = {
        "temperature": torch.tensor([0.0, 0.5, 1.0, 2.0]).repeat(3),
        "top_k": torch.tensor([0, 50, 7]).repeat(4),
        "top_p": torch.tensor([1.0, 0.9, 0.3]).repeat_interleave(4),
        "min_p": torch.tensor([0.0, 0.05]).repeat(6),
        **streams(rows),
    }
    with flashpo.backend(backend):
        together = sample(logits, **parameters)
        order = torch.randperm(rows)
        permuted = sample(logits[order], **{k: v[order] for k, v in parameters.items()})
        assert all(torch.equal(x[order], y) for x, y in zip(together, permuted))
        for i in range(rows):
            numbers = {k: v[i].item() for k, v in parameters.items()}
            for alone in (sample(logits[i : i + 1], **{k: v[i : i + 1] for k, v in parameters.items()}),):
                assert all(torch.equal(x[i : i + 1], y) for x, y in zip(together, alone))
            if dtype == torch.float32:  # Python's numbers round to these float32
                assert sample(logits[i : i + 1], **numbers).token == together.token[i]
        last = torch.stack((logits, logits), 1)[:, -1]
        assert last.stride(0) == 2 * vocab
        spread = torch.stack((logits, logits), -1)[..., 0]
        for view in (last, spread, torch.cat((logits, logits), 1)[:, :vocab]):
            assert all(torch.equal(x, y) for x, y in zip(together, sample(view, **parameters)))


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_rows_that_cannot_be_drawn_from(backend, dtype):
    for vocab in (1, 3, 40, 5000):
        logits = torch.randn(6, vocab).to(dtype)
        logits[0, vocab // 2] = NAN
        logits[1] = -INF
        logits[2, vocab - 1] = INF
        logits[3, 0], logits[3, vocab - 1] = NAN, INF
        logits[4, : vocab - 1] = -INF  # one possible token
        for parameters in FILTERS:
            with flashpo.backend(backend):
                out = sample(logits, **parameters, **streams(6))
            assert (out.token[:4] == 0).all()
            for numbers in out[1:]:
                assert numbers[:4].isnan().all()
                assert not numbers[4:].isnan().any()
            assert out.token[4] == vocab - 1
            assert 0 <= out.token[5] < vocab
            assert [x[4].item() for x in out[1:]] == [0, 0, 1]


@every_backend
def test_extreme_logits(backend):
    """The largest floats, a row of equal ones at the bottom of the range, zeros of both signs."""
    largest = torch.finfo(torch.float32).max
    rows = {
        "apart": [largest, -largest, 0.0, largest],
        "bottom": [-largest] * 4,
        "zeros": [0.0, -0.0, 0.0, -0.0],
        "tiny": [1e-45, -1e-45, 0.0, 1e-40],
    }
    possible = {"apart": {0, 3}}
    draws = 200
    for name, row in rows.items():
        for parameters in ({}, {"top_p": 0.999}, {"top_k": 3}, {"min_p": 0.5}, {"top_k": 4, "min_p": 0.1}):
            with flashpo.backend(backend):
                logits = torch.tensor(row).expand(draws, -1)
                out = sample(logits, **parameters, seed=3, offset=torch.arange(draws))
            wanted = possible.get(name, {0, 1, 2, 3})
            if name in ("bottom", "zeros") and parameters.get("top_k") == 3:
                wanted = {0, 1, 2}
            if name == "tiny" and parameters.get("top_k") == 3:
                wanted = {0, 2, 3}
            assert set(out.token.tolist()) == wanted, (name, parameters)
            assert all(x.isfinite().all() for x in out[1:])


@every_backend
def test_forbidden_tokens_are_never_drawn(backend):
    """Neither with the smallest nor with the largest u, wherever the possible tokens lie."""
    vocab, draws = 300, 3000
    logits = torch.full((vocab,), -INF)
    possible = torch.tensor([7, 131, 132, 290])
    logits[possible] = torch.randn(4) - 60
    with flashpo.backend(backend):
        for parameters in FILTERS:
            out = sample(logits.expand(draws, -1), **parameters, seed=5, offset=torch.arange(draws))
            assert torch.isin(out.token, possible).all()


@every_backend
def test_empty_batch(backend):
    with flashpo.backend(backend):
        out = sample(torch.zeros(0, 7), seed=torch.zeros(0, dtype=torch.long), offset=0, top_k=3, top_p=0.5)
    assert [x.shape for x in out] == [(0,)] * 4
    assert out.token.dtype == torch.int64


def test_results_are_constants():
    logits = torch.randn(3, 20, requires_grad=True)
    out = sample(logits * 2, seed=torch.arange(3), offset=0)
    assert not any(x.requires_grad for x in out)


def test_threads_do_not_change_the_result():
    logits, rows = torch.randn(9, 40_000), streams(9)
    threads = torch.get_num_threads()
    results = []
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        results.append(sample(logits, top_p=0.9, **rows))
    torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other))


@every_backend
def test_compiles_into_one_graph(backend, graphs, counting):
    def f(logits, temperature, seed, offset):
        return sample(logits * 2, temperature=temperature, top_k=5, top_p=0.9, min_p=0.01, seed=seed, offset=offset)

    compiled = torch.compile(f, backend=counting, fullgraph=True, dynamic=True)
    with flashpo.backend(backend):
        for rows in (3, 4, 9):
            inputs = torch.randn(rows, 50), torch.rand(rows), torch.arange(rows), torch.arange(rows)
            assert all(torch.equal(x, y) for x, y in zip(compiled(*inputs), f(*inputs)))
    assert len(graphs) == 1


good = dict(logits=torch.randn(2, 5), seed=torch.arange(2), offset=0)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("logits must be a torch.Tensor, got list", {"logits": [1.0]}),
        ("logits must be float32", {"logits": torch.ones(2, 5).long()}),
        (r"logits must be \(B, V\) with V >= 1, got \(5,\)", {"logits": torch.ones(5)}),
        (r"logits must be \(B, V\) with V >= 1, got \(2, 0\)", {"logits": torch.ones(2, 0)}),
        ("seed and offset are numbers: all rows would draw alike", {"seed": 1}),
        ("seed must be int64, got torch.int32", {"seed": torch.arange(2).int()}),
        ("seed must be an integer, got 1.5", {"seed": 1.5, "offset": torch.arange(2)}),
        ("offset must be an integer and fit into 64 bits, got 9223372036854775808", {"offset": 2**63}),
        (r"offset must be a number or \(B,\) = \(2,\), got \(3,\)", {"offset": torch.arange(3)}),
        ("offset is on meta", {"offset": torch.arange(2, device="meta")}),
        ("temperature must be a number, got str", {"temperature": "1"}),
        ("temperature must be 0 or a normal positive number, got -1", {"temperature": -1}),
        ("temperature must be 0 or a normal positive number, got nan", {"temperature": NAN}),
        ("temperature must be 0 or a normal positive number, got inf", {"temperature": INF}),
        ("temperature must be 0 or a normal positive number, got 1e-40", {"temperature": 1e-40}),
        ("temperature must be 0 or a normal positive number", {"temperature": torch.tensor([1.0, -1.0])}),
        ("temperature must be 0 or a normal positive number", {"temperature": torch.tensor([1.0, INF])}),
        ("temperature must be float32", {"temperature": torch.ones(2).long()}),
        ("top_k must be an integer of at least 0 and fit into 64 bits, got -1", {"top_k": -1}),
        ("top_k must not be negative", {"top_k": torch.tensor([3, -1])}),
        ("top_k must be an integer of at least 0, got 3.0", {"top_k": 3.0}),
        ("top_k must be int64 or int32, got torch.float32", {"top_k": torch.ones(2)}),
        (r"top_p must be in \[0, 1\], got 1.5", {"top_p": 1.5}),
        (r"top_p must be in \[0, 1\]", {"top_p": torch.tensor([0.5, NAN])}),
        (r"min_p must be in \[0, 1\], got -0.5", {"min_p": -0.5}),
        (r"min_p must be in \[0, 1\]", {"min_p": torch.tensor([0.5, 1.1])}),
        ("min_p must be a number, got str", {"min_p": "0"}),
    ],
)
@every_backend
def test_bad_input(backend, message, change):
    with flashpo.backend(backend), pytest.raises((TypeError, ValueError), match=message):
        sample(**(good | change))
