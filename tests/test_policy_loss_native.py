"""The C++ kernel of `policy_loss` against the reference in float64, over random specs and inputs."""

import importlib
import random
import types
from dataclasses import replace

import pytest
import torch
from policy_inputs import LENGTHS, PRESETS, compare, far_apart, random_inputs, random_spec, run

import flashpo
from flashpo import policy_loss
from flashpo.ops.loss_spec import LOSSES
from flashpo.ops.policy_stats import INDEX

pytestmark = pytest.mark.skipif("native" not in flashpo._op.OPS["policy_loss_fwd"].kernels, reason="not built")


@pytest.mark.native
@pytest.mark.parametrize("seed", range(200))
@pytest.mark.usefixtures("poisoned")
def test_random_specs(seed):
    rng = random.Random(seed)
    spec = random_spec(rng)
    inputs = spec, rng.choice(LENGTHS), rng.choice([0.0, 0.7, 0.7, 1.0]), rng.choice([0.02, 0.3])
    compare("native", spec, [random_inputs(rng, *inputs) for _ in range(8)], rng.choice([1.0, -0.7]))


@pytest.mark.parametrize("loss", PRESETS)
def test_log_ratios_beyond_the_range_of_exp(loss):
    """Finite, and the same as the reference, where e^d is inf or 0: the ratio saturates."""
    spec = replace(PRESETS[loss], kl_coef=0.1)
    for sign in (1.0, -1.0):
        compare("native", spec, [far_apart(spec, sign)], without=("ratio_squared",))  # e^128 is beyond float32


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


def test_compiles_into_one_graph(graphs, counting):
    def loss(logprob, old, advantage, mask):
        return policy_loss(logprob, old, advantage, mask, loss="gspo", kl_coef=0.1, ref_logprob=old).loss

    compiled = torch.compile(loss, backend=counting, fullgraph=True, dynamic=True)
    with flashpo.backend("native"):
        for tokens in (5, 8, 13, 21):
            x = (-torch.rand(3, tokens)).requires_grad_()
            rest = -torch.rand(3, tokens), torch.randn(3), torch.rand(3, tokens) < 0.8
            (expected,), (got,) = (torch.autograd.grad(f(x, *rest), x) for f in (loss, compiled))
            assert torch.equal(expected, got)
    assert len(graphs) == 1


implementation = importlib.import_module("flashpo.ops.policy_loss")  # whose name in the package is the function
TABLES = ("policy_choices", "policy_numbers", "policy_stats", "log_ratio_edges")


@pytest.mark.parametrize("other", TABLES)
def test_an_extension_of_other_sources_is_refused(other, monkeypatch):
    """One that numbers anything in another order would compute another loss without a word."""
    tables = {name: getattr(implementation.native, name) for name in TABLES}
    changed = {
        "policy_choices": tables["policy_choices"] | {"ratio": "sequence, token, sequence_token, sequence_sum"},
        "policy_numbers": tables["policy_numbers"].replace("clip_low, clip_high", "clip_high, clip_low"),
        "policy_stats": tuple(reversed(tables["policy_stats"])),
        "log_ratio_edges": tables["log_ratio_edges"][1:],
    }
    monkeypatch.setattr(implementation, "native", types.SimpleNamespace(**tables))
    implementation._compare_with_native()
    monkeypatch.setattr(implementation.native, other, changed[other])
    with pytest.raises(ImportError, match="other losses"):
        implementation._compare_with_native()
