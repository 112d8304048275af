"""`policy_loss` in Triton against the reference, on a CPU: TRITON_INTERPRET=1 pytest tests/test_triton_policy.py"""

import os
import random
from dataclasses import replace

import pytest
import torch
from policy_inputs import LENGTHS, PRESETS, compare, far_apart, random_inputs, random_spec, run

import flashpo
from flashpo import LossSpec, policy_loss

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the interpreter is chosen when Triton is imported: set TRITON_INTERPRET=1", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    rng, spec = random.Random(name), PRESETS[name]
    flashpo.stats(reset=True)
    compare("triton", spec, [random_inputs(rng, spec, lengths) for lengths in LENGTHS], -0.7)
    for op in ("policy_loss_fwd", "policy_loss_bwd"):
        assert flashpo.stats()[op]["triton"] == len(LENGTHS)


@pytest.mark.parametrize("seed", range(100))
def test_random_specs(seed):
    rng = random.Random(seed)
    spec = random_spec(rng)
    inputs = spec, rng.choice(LENGTHS), rng.choice([0.0, 0.7, 0.7, 1.0]), rng.choice([0.02, 0.3])
    compare("triton", spec, [random_inputs(rng, *inputs) for _ in range(4)], -0.7)


def test_same_twice():
    spec, rng = LossSpec(entropy_coef=0.1), random.Random(0)
    inputs = random_inputs(rng, spec, [2100, 0, 3000, 4500])  # two programs each
    (once, once_stats), (again, again_stats) = (run(inputs, spec, "triton", torch.float32) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip([*once, once_stats], [*again, again_stats]))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty(shape):
    logprob = torch.zeros(shape, requires_grad=True)
    with flashpo.backend("triton"):
        out = policy_loss(logprob, torch.zeros(shape), torch.ones(shape[0]), torch.ones(shape, dtype=torch.bool))
        out.loss.backward()
    assert out.loss == 0
    assert logprob.grad.shape == shape
    assert (out.stats.sequences, out.stats.tokens, out.stats.live_sequences) == (shape[0], 0, 0)


@pytest.mark.parametrize("loss", PRESETS)
def test_log_ratios_beyond_the_range_of_exp(loss):
    """Finite, and the same as the reference, where e^d is inf or 0: the ratio saturates."""
    spec = replace(PRESETS[loss], kl_coef=0.1)
    for sign in (1.0, -1.0):
        compare("triton", spec, [far_apart(spec, sign)], without=("ratio_squared",))  # e^128 is beyond float32


@pytest.mark.parametrize("loss", PRESETS)
def test_nan_of_a_live_token_is_not_lost(loss):
    inputs = random_inputs(random.Random(0), PRESETS[loss], [600], live=1.0)
    inputs["logprob"].view(-1)[7] = torch.nan
    _, stats = run(inputs, PRESETS[loss], "triton", torch.float32)
    assert stats[0].isnan()


def test_float64_is_left_to_torch():
    x, mask = torch.zeros(2, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.bool)
    with flashpo.backend("triton"), pytest.raises(NotImplementedError, match="policy_loss_fwd"):
        policy_loss(x, x, x, mask)
