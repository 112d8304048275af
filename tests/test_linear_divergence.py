"""Divergence of two heads: values and gradients against fp64, with plain torch's error in the same dtype as the
yardstick, and against TRL.
"""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate, assert_equal_to_rounding
from inputs import IGNORED, backends, sanitized

import flashpo
from flashpo import DivergenceStats, linear_divergence
from flashpo.ops._linear_divergence_cpu import Pairs
from flashpo.ops.linear_divergence import Head, Heads

BETAS = (0.0, 0.3, 1.0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALL = DivergenceStats._fields
every_backend = pytest.mark.parametrize("backend", backends())
every_beta = pytest.mark.parametrize("beta", BETAS)


def kl(log_p, log_q):
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def plain(beta, student, teacher, target):
    """All outputs from logits at the temperature, in torch; zeros where ignored."""
    s, t = student.log_softmax(-1), teacher.log_softmax(-1).detach()
    if beta == 0:
        divergence = kl(t, s)
    elif beta == 1:
        divergence = kl(s, t)
    else:
        mixture = torch.stack([s + math.log1p(-beta), t + math.log(beta)]).logsumexp(0)
        divergence = beta * kl(t, mixture) + (1 - beta) * kl(s, mixture)
    live = target != IGNORED
    chosen = [x.gather(-1, target.clamp(min=0)[..., None])[..., 0] for x in (s, t)]
    entropy = -kl(s, torch.zeros_like(s))
    rows = [x.where(live, 0.0) for x in (divergence, entropy, *chosen)]
    return DivergenceStats(*rows, (student.argmax(-1) == teacher.argmax(-1)) & live)


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    tokens: tuple[int, ...] = (2, 19)
    widths: tuple[int, int] = (24, 40)  # of student and teacher
    vocab: int = 1031
    sizes: tuple[float, float] = (4.0, 4.0)  # the logits' standard deviation
    bias: bool = False
    temperature: float = 1.0
    scales: tuple[float, float] = (1.0, 1.0)
    softcaps: tuple[float | None, float | None] = (None, None)
    ignored: float = 0.0  # what share of the tokens
    offset: float = 0.0  # of all biases
    twins: bool = False  # both are the same model

    def make(self):
        """([student's hidden, weight, bias], [teacher's], target), in float64"""
        heads = []
        for width, size in zip(self.widths, self.sizes):
            hidden = torch.randn(*self.tokens, width, dtype=torch.float64)
            weight = torch.randn(self.vocab, width, dtype=torch.float64) * (size / width**0.5)
            heads.append(
                [hidden, weight] + ([torch.randn(self.vocab, dtype=torch.float64) + self.offset] if self.bias else [])
            )
        if self.twins:
            heads[1] = heads[0]
        target = torch.randint(self.vocab, self.tokens)
        return *heads, target.masked_fill(torch.rand(self.tokens) < self.ignored, IGNORED)

    def ours(self, beta, student, teacher, target):
        biases = (student[2], teacher[2]) if self.bias else (None, None)
        return linear_divergence(
            *student[:2],
            *teacher[:2],
            target,
            *biases,
            beta=beta,
            temperature=self.temperature,
            student_logit_scale=self.scales[0],
            teacher_logit_scale=self.scales[1],
            student_softcap=self.softcaps[0],
            teacher_softcap=self.softcaps[1],
            outputs=ALL,
        )

    def plain(self, beta, student, teacher, target):
        logits = []
        for inputs, scale, softcap in zip((student, teacher), self.scales, self.softcaps):
            z = F.linear(*inputs)
            z = z.to(torch.promote_types(z.dtype, torch.float32)) * scale
            logits.append((z if softcap is None else softcap * torch.tanh(z / softcap)) / self.temperature)
        wide = torch.promote_types(*(z.dtype for z in logits))
        return plain(beta, *(z.to(wide) for z in logits), target)


EVERYTHING = {"bias": True, "temperature": 0.8, "scales": (0.7, 1.4), "softcaps": (6.0, 9.0), "ignored": 0.4}
CASES = [
    Case("heads"),
    Case("with everything", (37,), vocab=777, **EVERYTHING),
    Case("a softcap of one", (9,), vocab=100, softcaps=(None, 5.0), scales=(0.25, 1.0)),
    Case("one row", (1,), (8, 4), 5, temperature=4.0),  # flat, or torch may be exact by luck
    Case("all ignored", (2, 3), vocab=100, ignored=1.1),
    Case("empty", (0,), vocab=100),
    Case("twins", (11,), (24, 24), 513, twins=True),
    Case("teacher certain", (65,), vocab=300, sizes=(1.0, 200.0)),
    Case("student certain", (65,), vocab=300, sizes=(200.0, 1.0)),
    Case("both certain", (300,), vocab=100, sizes=(300.0, 300.0)),
    Case("huge logits", (65,), vocab=300, bias=True, offset=3e4),
    Case("cold", (65,), vocab=300, temperature=0.01),
    Case("hot", (65,), vocab=300, temperature=100.0),
]


def leaves(head, dtype, wide=None):
    return [x.to(dtype).to(wide or dtype).requires_grad_() for x in head]


def run(function, beta, student, teacher, target, upstream):
    """Outputs, and the student's gradients of sum_i upstream_i output_i over the differentiable ones."""
    out = function(beta, student, teacher, target)
    used = [(x, d.to(x.dtype)) for x, d in zip(out[:3], upstream) if d is not None]
    grads = torch.autograd.grad([x for x, _ in used], student, [d for _, d in used])
    return [x.detach().double() for x in out], grads


def compare(case, beta, backend, of_student, of_teacher):
    student, teacher, target = case.make()
    upstream = torch.randn(3, *case.tokens)
    cast = lambda wide: (leaves(student, of_student, wide), leaves(teacher, of_teacher, wide))  # noqa: E731
    exact, exact_grads = run(case.plain, beta, *cast(torch.float64), target, upstream)
    baseline, baseline_grads = run(case.plain, beta, *cast(None), target, upstream)
    flashpo.stats(reset=True)
    with flashpo.backend(backend):
        ours, grads = run(case.ours, beta, *cast(None), target, upstream)
    assert {used for counts in flashpo.stats().values() for used in counts} == {backend}
    for name, out, true, of_torch in zip(ALL, ours, exact, baseline):
        if name == "is_top1_agreed":  # a tie in 16 bits may fall either way in torch's rounding of the logits
            assert {torch.bfloat16, torch.float16} & {of_student, of_teacher} or torch.equal(out, true)
        else:  # beside one nat: what both models are certain of is no measure
            assert_as_accurate(*(torch.cat([x.double().flatten(), torch.ones(1)]) for x in (out, true, of_torch)))
    for grad, x, true, of_torch in zip(grads, student, exact_grads, baseline_grads):
        assert grad.dtype == of_student
        assert grad.shape == x.shape
        assert_as_accurate(grad, true, of_torch)
    assert all((x[target == IGNORED] == 0).all() for x in ours)


@every_beta
@sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.usefixtures("poisoned")
def test_values_and_gradients(case, backend, dtype, beta):
    if dtype == torch.float16 and case not in CASES[:2]:
        pytest.skip("tiles of 16 bits are bfloat16's in the other cases")
    if case.offset and backend == "torch":
        pytest.skip("the reference rounds logits to bits in its dtype: float64 is its own")
    compare(case, beta, backend, dtype, dtype)


@every_beta
@sanitized
def test_a_long_vocabulary(backend, beta):
    compare(Case("", (5,), (8, 4), 151936, ignored=0.3), beta, backend, torch.float32, torch.float32)


@sanitized
@pytest.mark.parametrize(
    ("dtype", "beta"), [(torch.float32, 0.3), (torch.bfloat16, 0.0), (torch.bfloat16, 1.0)], ids=str
)
@pytest.mark.usefixtures("poisoned")
def test_several_tiles_in_both_directions(backend, dtype, beta):
    if backend != "native":
        pytest.skip("has no such tiles")
    compare(Case("", (3000,), (8, 4), 1400, ignored=0.3), beta, backend, dtype, dtype)


@every_beta
@sanitized
@pytest.mark.parametrize("dtypes", [(0, 1), (1, 0), (2, 1), (1, 2)], ids=lambda x: f"{DTYPES[x[0]]} {DTYPES[x[1]]}")
def test_each_model_has_its_own_dtype(backend, dtypes, beta):
    case = Case("", (21,), vocab=333, **EVERYTHING)
    compare(case, beta, backend, *(DTYPES[i] for i in dtypes))


@every_beta
def test_gradcheck_in_float64(beta):
    case = Case("", (5,), (7, 3), 19, **EVERYTHING)
    student, teacher, target = case.make()
    with flashpo.backend("torch"):  # the only one that takes float64: what every other is measured against
        assert torch.autograd.gradcheck(
            lambda *x: case.ours(beta, x, teacher, target)[:3], [x.requires_grad_() for x in student], fast_mode=True
        )


@every_beta
@every_backend
def test_nothing_but_the_student_has_a_gradient(backend, beta):
    case = Case("", (6,), vocab=90, bias=True)
    student, teacher, target = case.make()
    student, teacher = leaves(student, torch.float32), leaves(teacher, torch.float32)
    with flashpo.backend(backend):
        out = case.ours(beta, student, teacher, target)
        assert not out.teacher_logprob.requires_grad
        assert not out.is_top1_agreed.requires_grad
        assert torch.autograd.grad(out.divergence.sum(), teacher, allow_unused=True) == (None, None, None)
        d = torch.randn(3, 6)
        _, together = run(case.ours, beta, student, teacher, target, (d[0], None, None))
        for i, whole in enumerate(together):  # each alone is the same: the others' work is skipped
            alone = [x.detach() for x in student]
            alone[i].requires_grad_()
            out = case.ours(beta, alone, teacher, target).divergence
            assert torch.equal(torch.autograd.grad(out, alone[i], d[0])[0], whole)


@every_backend
def test_twins_do_not_diverge(backend):
    case = Case("", (11,), (24, 24), 2100, twins=True)
    student, _, target = case.make()
    student = leaves(student, torch.float32)
    with flashpo.backend(backend):
        for beta in BETAS:
            out = case.ours(beta, student, student, target)
            assert out.divergence.abs().max() <= 1e-7
            assert out.is_top1_agreed.all()


@every_beta
@every_backend
@pytest.mark.parametrize("vocab", [7, 300, 2500])
def test_impossible_tokens(backend, vocab, beta):
    """Logits of -inf of both models, of one alone, at many places; first of all in a tile and last."""
    torch.manual_seed(vocab)
    case = Case("", (4,), (8, 8), vocab, bias=True)
    student, teacher, target = case.make()
    half, last = vocab // 2, torch.tensor([vocab - 1])
    places = {"first": torch.arange(2), "last": last, "many": torch.arange(half, vocab - 2), "most": torch.arange(half)}
    target[:] = vocab - 2
    for forbids in ((0, 1), (0,), (1,)):
        for name, place in places.items():
            heads = [[x.clone() for x in head] for head in (student, teacher)]
            for i in forbids:
                heads[i][2][place] = -torch.inf
            exact = case.plain(beta, [x.requires_grad_() for x in heads[0]], heads[1], target)
            mine = leaves(heads[0], torch.float32)
            with flashpo.backend(backend):
                out = case.ours(beta, mine, [x.float() for x in heads[1]], target)
                grads = torch.autograd.grad(out.divergence.sum(), mine)
            infinite = (beta == 0 and forbids == (0,)) or (beta == 1 and forbids == (1,))
            assert (out.divergence == torch.inf).all() == infinite, (forbids, name, out.divergence)
            for x, y in zip(out[:4], exact[:4]):
                torch.testing.assert_close(x.double(), y.double(), rtol=1e-4, atol=1e-5)
            if infinite and beta == 1:
                continue  # there is none
            assert all(g.isfinite().all() for g in grads)
            p_s, p_t = ((F.linear(*head)).softmax(-1) for head in heads)
            if beta == 0:
                torch.testing.assert_close(grads[2].double(), (p_s - p_t).sum(0).detach(), rtol=1e-4, atol=1e-5)


@every_backend
def test_an_infinite_divergence_that_nothing_uses(backend):
    case = Case("", (3,), (8, 8), 30, bias=True)
    student, teacher, target = case.make()
    teacher[2][7] = -torch.inf
    mine = leaves(student, torch.float32)
    with flashpo.backend(backend):
        out = case.ours(1.0, mine, [x.float() for x in teacher], target)
        grads = torch.autograd.grad(out.divergence, mine, torch.zeros(3))
    assert (out.divergence == torch.inf).all()
    assert all((g == 0).all() for g in grads)


@every_beta
@every_backend
def test_rows_are_independent(backend, beta):
    """In another order they give the same; ignored ones may hold anything."""
    case = Case("", (40,), vocab=700, **EVERYTHING)
    student, teacher, target = case.make()
    student, teacher = ([x.float() for x in head] for head in (student, teacher))
    order = torch.randperm(40)
    turned = [[head[0][order], *head[1:]] for head in (student, teacher)]
    exact = case.plain(beta, [x.double() for x in student], [x.double() for x in teacher], target)
    baseline = case.plain(beta, student, teacher, target)
    with flashpo.backend(backend):
        out = case.ours(beta, student, teacher, target)
        other = case.ours(beta, *turned, target[order])
        for x, y, true, of_torch in zip(out[:4], other, exact, baseline):
            assert_equal_to_rounding(x[order], y, true, of_torch)
        if backend == "torch":
            return
        for head in (student, teacher):
            head[0][target == IGNORED] = torch.nan
        student = [x.requires_grad_() for x in student]
        _, grads = run(case.ours, beta, student, teacher, target, torch.ones(3, 40))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][target == IGNORED] == 0).all()


@every_beta
@pytest.mark.native
def test_any_number_of_threads(beta):
    case = Case("", (70,), vocab=900, **EVERYTHING)
    student, teacher, target = case.make()
    upstream = torch.randn(3, 70)
    before = torch.get_num_threads()
    exact, exact_grads = run(case.plain, beta, leaves(student, torch.float64), teacher, target, upstream)
    results = []
    try:
        with flashpo.backend("native"):
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                mine = leaves(student, torch.float32), [x.float() for x in teacher]
                results.append(run(case.ours, beta, *mine, target, upstream))
    finally:
        torch.set_num_threads(before)
    for out, grads in results:
        for x, y in zip((*out, *grads), (*exact, *exact_grads)):
            torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)


@every_backend
def test_autocast_chooses_the_compute_dtype(backend):
    case = Case("", (12,), vocab=301)
    student, teacher, target = case.make()
    heads = leaves(student, torch.float32), leaves(teacher, torch.float32)
    with flashpo.backend(backend):
        with torch.autocast("cpu", torch.bfloat16):
            out = case.ours(0.5, *heads, target)
        expected = case.ours(0.5, *([x.bfloat16() for x in head] for head in heads), target)
        assert torch.equal(out.divergence, expected.divergence)
        out.divergence.sum().backward()
    assert heads[0][0].grad.dtype == heads[0][1].grad.dtype == torch.float32


def test_the_number_of_products():
    """Two forward, four with a mixture; as many again to see the logits and their gradient; none for a frozen head."""
    case = Case("", (6,), (8, 4), 40)
    student, teacher, target = case.make()
    for beta, trained, products in ((0.0, 0, 2), (0.0, 1, 5), (1.0, 2, 6), (0.5, 0, 4), (0.5, 1, 7), (0.5, 2, 8)):
        mine = [x.float().requires_grad_(i < trained) for i, x in enumerate(student)]
        with torch.profiler.profile() as profile:
            out = case.ours(beta, mine, [x.float() for x in teacher], target)
            if trained:
                out.divergence.sum().backward()
        assert [e.count for e in profile.key_averages() if e.key == "aten::mm"] == [products]


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    for tokens, features, vocab, dtype in (
        (10, 1024, 151936, torch.bfloat16),
        (5000, 8192, 262144, torch.bfloat16),
        (100_000, 64, 262144, torch.float32),
    ):
        hidden, weight = torch.empty(1, features).expand(tokens, -1), torch.empty(1, features).expand(vocab, -1)
        head = Head(hidden, weight, None, 1.0, None, dtype)
        pairs = Pairs(Heads(head, head, torch.zeros(tokens, dtype=torch.long), 1.0, IGNORED, 0, 0.5))
        tiles = (pairs.student, pairs.teacher)
        size = sum(x.buffer.numel() * x.dtype.itemsize + x.width * features * 4 for x in tiles)
        size += pairs.student.buffer.numel() * 2  # the gradient in the other layout
        assert size + pairs.student.buffer_of_products().numel() * 4 <= 64 << 20


def test_vocabularies_must_agree():
    case = Case("", (6,), (8, 4), 40)
    student, teacher, target = case.make()
    with pytest.raises(ValueError, match=r"teacher_weight must have the student's vocabulary, 40 rows, got 39"):
        case.ours(0.5, student, [teacher[0], teacher[1][:-1]], target)


@every_backend
def test_compiles_into_one_graph(backend, graphs, counting):
    def loss(student, teacher, target):
        out = linear_divergence(*student, *teacher, target, beta=0.4)
        return (out.divergence + 0.1 * out.entropy).sum()

    compiled = torch.compile(loss, backend=counting, fullgraph=True, dynamic=True)
    with flashpo.backend(backend):
        for tokens in (5, 8, 13):
            student, teacher, target = Case("", (tokens,), (8, 4), 60, ignored=0.3).make()
            heads = leaves(student, torch.float32), [x.float() for x in teacher]
            expected = torch.autograd.grad(loss(*heads, target), heads[0])
            got = torch.autograd.grad(compiled(*heads, target), heads[0])
            for a, b in zip(got, expected):
                torch.testing.assert_close(a, b)
    assert len(graphs) == 1


@pytest.mark.parametrize("beta", [*BETAS, 0.5])
@every_backend
def test_equals_trl(backend, beta):
    """TRL's chunked kernel of two heads, and the losses of GKD and GOLD, which take logits."""
    chunked = pytest.importorskip("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    case = Case("", (23,), vocab=401, **(EVERYTHING | {"ignored": 0.0}))
    student, teacher, target = case.make()
    student, teacher = leaves(student, torch.float32), [x.float() for x in teacher]
    d = torch.randn(23)
    (s_scale, t_scale), (s_cap, t_cap) = case.scales, case.softcaps
    theirs, entropy = chunked.apply(*student, *teacher, beta, case.temperature, s_scale, s_cap, t_scale, t_cap)
    expected = torch.autograd.grad(theirs, student, d)
    with flashpo.backend(backend):
        out = case.ours(beta, student, teacher, target)
        grads = torch.autograd.grad(out.divergence, student, d)
    torch.testing.assert_close(out.divergence, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.entropy, entropy, rtol=1e-4, atol=1e-5)
    for x, y in zip(grads, expected):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)

    logits = [
        cap * torch.tanh(F.linear(*head) * scale / cap)
        for head, scale, cap in ((student, s_scale, s_cap), (teacher, t_scale, t_cap))
    ]
    gkd = pytest.importorskip("trl.experimental.gkd").GKDTrainer
    gold = pytest.importorskip("trl.experimental.gold").GOLDTrainer
    for peer in (gkd, gold):
        loss = peer.generalized_jsd_loss(
            *(x[None] for x in logits), labels=target[None], beta=beta, temperature=case.temperature, reduction="sum"
        )
        torch.testing.assert_close(out.divergence.sum(), loss, rtol=1e-4, atol=1e-5)
