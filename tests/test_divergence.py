"""Divergence from logits and from a teacher's most probable tokens, against `linear_divergence`, autograd and TRL."""

import math

import pytest
import torch
from test_linear_divergence import BETAS, IGNORED, leaves, plain

from flashpo import DivergenceStats, divergence, linear_divergence, topk_divergence

ALL = DivergenceStats._fields
every_beta = pytest.mark.parametrize("beta", [*BETAS, 0.5])


def logits(tokens=11, vocab=70):
    student, teacher = torch.randn(2, tokens, vocab, dtype=torch.float64) * 3
    return student, teacher, torch.randint(vocab, (tokens,)).masked_fill(torch.rand(tokens) < 0.3, IGNORED)


@every_beta
def test_equals_the_op_of_two_heads(beta):
    """With heads that are the identity."""
    student, teacher, target = logits()
    identity = torch.eye(70, dtype=torch.float64)
    student.requires_grad_()
    d = torch.randn(3, 11)
    options = {"beta": beta, "temperature": 0.8, "outputs": ALL}
    ours = divergence(student, teacher, target, **options)
    expected = linear_divergence(student, identity, teacher, identity, target, **options)
    grads = [torch.autograd.grad([*out[:3]], student, [*d.double()]) for out in (ours, expected)]
    for x, y in zip((*ours, *grads[0]), (*expected, *grads[1])):
        torch.testing.assert_close(x, y)


@every_beta
@pytest.mark.parametrize("dtypes", [(torch.float64,) * 2, (torch.bfloat16, torch.float32)], ids=str)
def test_equals_autograd(beta, dtypes):
    student, teacher, target = logits()
    (student,), (teacher,) = leaves([student], dtypes[0]), leaves([teacher], dtypes[1])
    d = torch.randn(11)
    ours = divergence(student, teacher, target, beta=beta, outputs=ALL)
    expected = plain(beta, student.double(), teacher.double(), target)
    for x, y in zip(ours, expected):
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-5, atol=1e-5)
    for x, y in zip(*(torch.autograd.grad(o.divergence, [student], d.to(o.divergence)) for o in (ours, expected))):
        torch.testing.assert_close(x, y, rtol=1e-2 if x.dtype == torch.bfloat16 else 1e-7, atol=1e-4)
    assert torch.autograd.grad(ours.entropy.sum(), [teacher], allow_unused=True) == (None,)


def topk(student, teacher, k):
    top = teacher.log_softmax(-1).topk(k)
    return top.indices, top.values


@every_beta
def test_all_tokens_of_the_teacher_are_the_whole(beta):
    student, teacher, target = logits()
    indices, logprobs = topk(student, teacher, 70)
    whole = divergence(student, teacher, target.clamp(min=0), beta=beta).divergence
    torch.testing.assert_close(topk_divergence(student, indices, logprobs, beta=beta), whole)


@every_beta
def test_the_rest_is_one_outcome(beta):
    """The definition, at most the whole divergence, and equal to it where the rest is shared out in proportion."""
    student, teacher, target = logits()
    teacher = teacher * 2
    indices, logprobs = topk(student, teacher, 5)
    ours = topk_divergence(student, indices, logprobs, beta=beta)
    both = [student.log_softmax(-1).gather(-1, indices), logprobs]
    both = [torch.cat([x, (1 - x.exp().sum(-1, keepdim=True)).log()], -1) for x in both]
    live = torch.zeros_like(target)
    torch.testing.assert_close(ours, plain(beta, *both, live).divergence)
    assert (ours <= divergence(student, teacher, live, beta=beta).divergence + 1e-12).all()

    rest = torch.ones_like(student, dtype=torch.bool).scatter_(-1, indices, False)
    alike = torch.where(rest, student.masked_fill(~rest, -torch.inf).log_softmax(-1) + both[1][:, -1:], 0.0)
    alike = alike.scatter(-1, indices, logprobs)
    torch.testing.assert_close(ours, divergence(student, alike, live, beta=beta).divergence)


@every_beta
def test_absent_tokens(beta):
    student, teacher, _ = logits()
    indices, logprobs = topk(student, teacher, 5)
    fewer = topk_divergence(student, indices[:, :3], logprobs[:, :3], beta=beta)
    indices[:, 3:], logprobs[:, 3:] = IGNORED, torch.nan
    indices[4] = IGNORED
    student.requires_grad_()
    ours = topk_divergence(student, indices, logprobs, beta=beta)
    assert ours[4] == 0
    fewer[4] = 0
    torch.testing.assert_close(ours, fewer)
    (grad,) = torch.autograd.grad(ours.sum(), student)
    assert grad.isfinite().all()
    assert (grad[4] == 0).all()


@every_beta
def test_gradients_of_topk(beta):
    student, teacher, _ = logits(4, 9)
    indices, logprobs = topk(student, teacher, 3)
    assert torch.autograd.gradcheck(
        lambda z: topk_divergence(z, indices, logprobs, beta=beta, temperature=1.3), [student.requires_grad_()]
    )


@every_beta
def test_topk_equals_trl(beta):
    trl = pytest.importorskip("trl.experimental.server_distillation.server_distillation_trainer")
    student, teacher, _ = (x.float() for x in logits())
    indices, logprobs = topk(student, teacher, 5)
    known = torch.ones_like(indices, dtype=torch.bool)
    of_student, mask = trl._add_tail_bucket(student.log_softmax(-1).gather(-1, indices), known)
    of_teacher, _ = trl._add_tail_bucket(logprobs, known)
    expected = trl._jsd_divergence(of_student, of_teacher, beta, mask).sum(-1)
    torch.testing.assert_close(topk_divergence(student, indices, logprobs, beta=beta), expected, rtol=1e-4, atol=1e-5)


def test_a_teacher_that_is_certain():
    """Its mass is all in one token: the rest, which rounding may leave, is no infinity."""
    student = torch.randn(3, 20)
    indices, logprobs = torch.tensor([[4], [0], [19]]), torch.zeros(3, 1)
    for beta in BETAS:
        ours = topk_divergence(student, indices, logprobs, beta=beta)
        assert ours.isfinite().all()
    nll = -student.log_softmax(-1).gather(-1, indices)[:, 0]
    torch.testing.assert_close(topk_divergence(student, indices, logprobs, beta=0.0), nll, rtol=1e-4, atol=1e-5)
    assert math.isclose(topk_divergence(student, indices * 0 + IGNORED, logprobs, beta=0.0).abs().max(), 0.0)
