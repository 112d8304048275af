"""linear_divergence in Triton against fp64, on a CPU: TRITON_INTERPRET=1 pytest tests/test_triton_divergence.py"""

import os

import pytest
import torch
from test_linear_divergence import BETAS, EVERYTHING, Case, compare, leaves

import flashpo

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the interpreter is chosen when Triton is imported: set TRITON_INTERPRET=1", allow_module_level=True)

every_beta = pytest.mark.parametrize("beta", BETAS)
pytestmark = pytest.mark.usefixtures("poisoned")


@every_beta
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32)], ids=str)
def test_values_and_gradients(beta, dtypes):
    compare(Case("", (7,), (8, 20), 90, **EVERYTHING), beta, "triton", *dtypes)


@every_beta
def test_several_parts_of_the_vocabulary(beta):
    compare(Case("", (3,), (8, 4), 1100), beta, "triton", torch.float32, torch.float32)


@every_beta
def test_impossible_tokens(beta):
    """The teacher forbids the first ones, the student the last ones, both those between, in turn alone and together."""
    case = Case("", (4,), (8, 8), 70, bias=True)
    student, teacher, target = case.make()
    target[:] = 30
    student[2][60:], teacher[2][40:] = -torch.inf, -torch.inf
    if beta == 1:
        student[2][40:] = -torch.inf
    if beta == 0:
        teacher[2][40:], teacher[2][60:] = 0.0, -torch.inf
    exact = case.plain(beta, student, teacher, target)
    mine = leaves(student, torch.float32)
    with flashpo.backend("triton"):
        out = case.ours(beta, mine, [x.float() for x in teacher], target)
        grads = torch.autograd.grad(out.divergence.sum(), mine)
    for x, y in zip(out, exact):
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-4, atol=1e-5)
    assert all(g.isfinite().all() for g in grads)
    (student if beta == 0 else teacher)[2][3] = -torch.inf
    with flashpo.backend("triton"):
        out = case.ours(beta, *([x.float() for x in head] for head in (student, teacher)), target)
    assert (out.divergence == torch.inf).all() == (beta in (0, 1))
