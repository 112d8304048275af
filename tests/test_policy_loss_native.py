"""The C++ kernel of `policy_loss` against the reference in float64, over random specs and inputs."""

import random
from dataclasses import replace

import pytest
import torch
from accuracy import assert_as_accurate

import flashpo
from flashpo import policy_loss
from flashpo.ops.loss_spec import CHOICES, LOSSES, LossSpec
from flashpo.ops.policy_stats import INDEX, NAMES

pytestmark = pytest.mark.skipif("native" not in flashpo._op.OPS["policy_loss_fwd"].kernels, reason="not built")
FLOATS = ("logprob", "old_logprob", "ref_logprob", "rollout_logprob", "importance_ratio", "entropy", "advantage")


def random_spec(rng: random.Random) -> LossSpec:
    """Any combination that LossSpec accepts, or a preset."""
    while True:
        maybe = lambda value, p=0.5: value if rng.random() < p else None  # noqa: E731
        extra = dict(
            kl_coef=rng.choice([0.0, 0.1]),
            kl=rng.choice(CHOICES["kl"]),
            kl_ratio_correction=rng.random() < 0.3,
            kl_log_clamp=maybe(0.8, 0.2),
            kl_clamp=maybe(0.5, 0.2),
            importance=rng.choice(CHOICES["importance"]),
            importance_min=maybe(0.4),
            importance_max=maybe(1.5),
            off_policy_threshold=maybe(0.02, 0.3),
            top_entropy=rng.choice([1.0, 0.6]),
            entropy_coef=rng.choice([0.0, 0.02]),
            entropy_mean=rng.choice(CHOICES["entropy_mean"]),
            aggregation=rng.choice(CHOICES["aggregation"]),
            max_length=40,
            empty_sequences=rng.choice(CHOICES["empty_sequences"]),
        )
        if extra["importance"] == "none":
            extra["importance_min"] = extra["importance_max"] = None
        if extra["aggregation"] != "fixed_length":
            extra["max_length"] = None
        own = dict(
            ratio=rng.choice(CHOICES["ratio"]),
            surrogate=rng.choice(CHOICES["surrogate"]),
            clip_low=rng.choice([None, 0.1, 0.2]),
            clip_high=rng.choice([None, 0.1, 0.3, 2.0]),
            ratio_cap=maybe(1.4, 0.3),
            dual_clip=maybe(1.3, 0.3),
            log_ratio_min=maybe(-0.7, 0.2),
            log_ratio_max=maybe(0.6, 0.2),
            sapo_temperatures=(1.0, 1.3),
            vespo_gamma=((2.0, 3.0), (3.0, 2.5)),
        )
        try:
            if rng.random() < 0.3:
                name = rng.choice(sorted(LOSSES))
                return replace(LOSSES[name], **extra)
            return LossSpec(**own, **extra)
        except ValueError:
            continue


LENGTHS = ([40] * 5, [1, 0, 17, 16, 3, 33], [1500, 70], [7], [0, 5, 0])


def random_inputs(rng: random.Random, spec: LossSpec, lengths, live: float = 0.7, spread: float = 0.3) -> dict:
    """Float64 inputs of float32 values, `live` of the tokens unmasked; NaN and the like wherever nobody may look."""
    flat = rng.random() < 0.5 or len(set(lengths)) > 1
    shape = (sum(lengths),) if flat else (len(lengths), lengths[0])
    sequences = len(lengths)
    old = -3 * torch.rand(shape)
    noise = lambda: old + spread * torch.randn(shape)  # noqa: E731
    mask = torch.rand(shape) < live
    inputs = dict(
        logprob=noise(),
        old_logprob=old if rng.random() < 0.85 else None,
        advantage=torch.randn(sequences) if rng.random() < 0.6 else torch.randn(shape),
        mask=mask.to(rng.choice([torch.bool, torch.int32, torch.int64])),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0) if flat else None,
        ref_logprob=noise() if spec.kl_coef != 0 else None,
        rollout_logprob=noise() if spec.importance != "none" or rng.random() < 0.3 else None,
        entropy=2 * torch.rand(shape) if spec.entropy_coef != 0 or spec.top_entropy < 1 else None,
    )
    if spec.importance == "none" and rng.random() < 0.4:
        inputs["importance_ratio"] = (0.3 * torch.randn(sequences if rng.random() < 0.5 else shape)).exp()
    if spec.aggregation not in ("local_token_mean", "token_sum") and rng.random() < 0.4:
        inputs["num_items"] = 37.0
    for name, x in inputs.items():
        if name in FLOATS and x is not None:
            inputs[name] = x.double()
            if x.shape == shape:
                inputs[name][~mask] = rng.choice([torch.nan, torch.inf, 1e30])
    if inputs["rollout_logprob"] is not None:
        inputs["rollout_logprob"][torch.rand(shape) < 0.05] = torch.nan  # the sampler gave none
    return inputs


def run(inputs: dict, spec: LossSpec, backend: str, dtype: torch.dtype, upstream: float = 1.0):
    """Gradients, and the loss with the statistics."""
    inputs = {k: x.to(dtype, copy=True) if k in FLOATS and x is not None else x for k, x in inputs.items()}
    leaves = [inputs[name].requires_grad_() for name in ("logprob", "entropy") if inputs.get(name) is not None]
    with flashpo.backend(backend):
        result = policy_loss(**inputs, loss=spec, scale=0.5)
    grads = torch.autograd.grad(result.loss, leaves, torch.tensor(upstream, dtype=dtype), allow_unused=True)
    return [g for g in grads if g is not None], torch.cat([result.loss.detach()[None], result.stats.values.detach()])


def compare(spec: LossSpec, draws: list[dict], upstream: float = 1.0, without: tuple[str, ...] = ()) -> None:
    """A sum's error is a matter of luck in a single draw: it is judged over all of them together."""
    gradients, values = [], []
    for backend, dtype in (("native", torch.float32), ("torch", torch.float64), ("torch", torch.float32)):
        grads, stats = zip(*(run(inputs, spec, backend, dtype, upstream) for inputs in draws))
        gradients.append([torch.cat([g.flatten() for g in of_leaf]) for of_leaf in zip(*grads, strict=True)])
        values.append(torch.stack(stats, 1))
    for out, true, baseline in zip(*gradients, strict=True):
        assert_as_accurate(out, true, baseline)
    for name, out, true, baseline in zip(("returned", *NAMES), *values, strict=True):
        if name in without:
            continue
        infinite = true.isinf()  # an extreme of nothing
        assert torch.equal(out[infinite].double(), true[infinite]), name
        assert_as_accurate(*(x[~infinite] for x in (out, true, baseline)))


@pytest.mark.native
@pytest.mark.parametrize("seed", range(200))
@pytest.mark.usefixtures("poisoned")
def test_random_specs(seed):
    rng = random.Random(seed)
    spec = random_spec(rng)
    inputs = spec, rng.choice(LENGTHS), rng.choice([0.0, 0.7, 0.7, 1.0]), rng.choice([0.02, 0.3])
    compare(spec, [random_inputs(rng, *inputs) for _ in range(8)], rng.choice([1.0, -0.7]))


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_log_ratios_beyond_the_range_of_exp(loss):
    """Finite, and the same as the reference, where e^d is inf or 0: the ratio saturates."""
    spec = replace(LOSSES[loss], kl_coef=0.1, **({"max_length": 50} if loss == "dr_grpo" else {}))
    d = torch.tensor([-200.0, -89, -65, -30, 0, 30, 65, 89, 200]).repeat(4, 3)
    old = -torch.rand(4, 27) - 1
    for sign in (1.0, -1.0):
        inputs = dict(
            logprob=(old + d).double(),
            old_logprob=old.double(),
            ref_logprob=(old - d).double(),
            advantage=sign * torch.rand(4).double(),
            mask=torch.ones(4, 27, dtype=torch.bool),
        )
        compare(spec, [inputs], without=("ratio_squared",))  # e^128 is beyond float32


def test_k3_of_a_small_difference():
    """e^x - x - 1 of x near 1e-3 keeps 4 digits in float32; the kernel's series keeps them all."""
    logprob = -torch.rand(1, 64)
    ref = logprob + 1e-3 * torch.randn(1, 64)
    x = ref.double() - logprob.double()
    exact = (x.expm1() - x).sum()
    with flashpo.backend("native"):
        options = dict(loss="reinforce", ref_logprob=ref, kl_coef=1.0)
        stats = policy_loss(logprob, None, torch.zeros(1), torch.ones(1, 64, dtype=torch.bool), **options).stats
    assert (stats.values[INDEX["kl"]] - exact).abs() < 1e-6 * exact


@pytest.mark.native
@pytest.mark.parametrize("loss", ["dapo", "gspo", "gmpo", "vespo", "verl_ppo"])
def test_the_number_of_threads_changes_nothing(loss):
    """Bitwise, with sequences of very different lengths."""
    lengths = [9000, 0, 3, 12000, 1, 800, 0]
    rng = random.Random(0)
    spec = replace(LOSSES[loss], top_entropy=0.7, entropy_coef=0.01)
    inputs = random_inputs(rng, spec, lengths)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8, 64):
            torch.set_num_threads(threads)
            grads, stats = run(inputs, spec, "native", torch.float32)
            results.append(torch.cat([*grads, stats]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], x) for x in results)


@pytest.mark.native
def test_sequences_do_not_depend_on_their_neighbours():
    """Bitwise: the gradient of a sequence alone is that of the sequence in a batch."""
    spec = replace(LOSSES["gspo"], aggregation="sequence_sum")
    inputs = random_inputs(random.Random(1), spec, [37] * 4) | {"num_items": 4.0, "cu_seqlens": None}
    inputs = {k: x.reshape(4, 37) if isinstance(x, torch.Tensor) and x.numel() == 148 else x for k, x in inputs.items()}
    together = run(inputs, spec, "native", torch.float32)[0][0]
    alone = {k: x[2:3] if isinstance(x, torch.Tensor) else x for k, x in inputs.items()}
    assert torch.equal(run(alone, spec, "native", torch.float32)[0][0], together[2:3])


@pytest.mark.native
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_views_of_larger_tensors(mask_dtype):
    """Transposed and sliced inputs give the same bits as contiguous ones."""
    shape = (3, 21)
    spec = replace(LOSSES["grpo"], kl_coef=0.1, importance="token_truncate", importance_max=2.0, entropy_coef=0.1)
    names = ("logprob", "old_logprob", "ref_logprob", "rollout_logprob", "entropy", "advantage")
    dense = {name: -torch.rand(shape) for name in names} | {"mask": (torch.rand(shape) < 0.7).to(mask_dtype)}
    sliced = {name: torch.cat([x, x], 1)[:, :21].t().contiguous().t() for name, x in dense.items()}
    assert not any(x.is_contiguous() for x in sliced.values())
    (expected, expected_stats), (grads, stats) = (run(x, spec, "native", torch.float32) for x in (dense, sliced))
    assert torch.equal(stats, expected_stats)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.native
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=str)
def test_no_tokens(lengths):
    x = torch.empty(0, requires_grad=True)
    with flashpo.backend("native"):
        result = policy_loss(
            x, x.detach(), torch.ones(len(lengths)), x > 0, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0)
        )
    assert result.loss == 0
    assert torch.autograd.grad(result.loss, x)[0].shape == (0,)
    assert result.stats.sequences == len(lengths)


@pytest.mark.native
@pytest.mark.parametrize("starts", [[0, 5, 3, 9], [1, 9], [0, 8], [0, 10], [-1, 9]], ids=str)
def test_starts_that_are_no_partition(starts):
    x = -torch.rand(9)
    with flashpo.backend("native"), pytest.raises(ValueError, match="cu_seqlens must rise from 0"):
        policy_loss(x, x, torch.ones(9), x < 0, cu_seqlens=torch.tensor(starts))


def test_float64_is_for_the_reference():
    x = -torch.rand(2, 3, dtype=torch.float64)
    with flashpo.backend("native"), pytest.raises(NotImplementedError, match="float64"):
        policy_loss(x, x, torch.ones(2, dtype=torch.float64), x < 0)


def test_compiles_into_one_graph():
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    def loss(logprob, old, advantage, mask):
        return policy_loss(logprob, old, advantage, mask, loss="gspo", kl_coef=0.1, ref_logprob=old).loss

    compiled = torch.compile(loss, backend=count, fullgraph=True, dynamic=True)
    with flashpo.backend("native"):
        for tokens in (5, 8, 13, 21):
            x = (-torch.rand(3, tokens)).requires_grad_()
            rest = -torch.rand(3, tokens), torch.randn(3), torch.rand(3, tokens) < 0.8
            (expected,), (got,) = (torch.autograd.grad(f(x, *rest), x) for f in (loss, compiled))
            assert torch.equal(expected, got)
    assert len(graphs) == 1
