"""`group=` of linear_logprob and linear_divergence: heads sharded over 2 processes give the results of whole heads."""

import pytest
import torch
import torch.distributed as dist
from test_linear_divergence import BETAS, EVERYTHING, Case, leaves
from test_linear_divergence import run as run_divergence
from two_processes import in_two_processes, needs_gloo

from flashpo import DivergenceStats, TokenStats, linear_divergence, linear_logprob

N, H, V = 11, 16, 90


def inputs():
    generator = torch.Generator().manual_seed(0)
    h, w, b = (torch.randn(*shape, generator=generator) for shape in ((N, H), (V, H), (V,)))
    target = torch.randint(V, (N,), generator=generator)
    target[3] = -100
    w[70] = w[5]  # the largest logit may stand in both shards
    return [h.requires_grad_(), w.requires_grad_(), b.requires_grad_()], target, torch.randn(2, N, generator=generator)


def run(h, w, b, target, upstream, group=None):
    options = {"temperature": 1.2, "softcap": 9.0, "outputs": TokenStats._fields, "group": group}
    out = linear_logprob(h, w, target, b, **options)
    torch.autograd.backward([out.logprob, out.entropy], list(upstream))
    return [x.detach() for x in out]


def check_rank(rank):
    (h, w, b), target, upstream = inputs()
    whole = run(h, w, b, target, upstream)
    mine = slice(rank * V // 2, (rank + 1) * V // 2)
    sharded = [x.detach().clone().requires_grad_() for x in (h, w[mine], b[mine])]
    parts = run(*sharded, target, upstream, dist.group.WORLD)
    for x, y in zip(parts, whole):
        torch.testing.assert_close(x, y)
    for x, y in zip((x.grad for x in sharded), (h.grad, w.grad[mine], b.grad[mine])):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)

    uneven = w.detach()[: V // 2 - rank]
    with pytest.raises(ValueError, match="same number of rows"):
        linear_logprob(h.detach(), uneven, target.clamp(max=80), group=dist.group.WORLD)


def sharded_divergence(beta, student, teacher, target):
    """The case of `check_divergence`, of which every rank has a part of the heads."""
    return linear_divergence(
        *student[:2],
        *teacher[:2],
        target,
        student[2],
        teacher[2],
        beta=beta,
        temperature=EVERYTHING["temperature"],
        student_logit_scale=EVERYTHING["scales"][0],
        teacher_logit_scale=EVERYTHING["scales"][1],
        student_softcap=EVERYTHING["softcaps"][0],
        teacher_softcap=EVERYTHING["softcaps"][1],
        outputs=DivergenceStats._fields,
        group=dist.group.WORLD,
    )


def check_divergence(rank):
    torch.manual_seed(0)
    case = Case("", (11,), (16, 8), 90, **EVERYTHING)
    student, teacher, target = case.make()
    for head in (student, teacher):
        head[1][70] = head[1][5]  # the largest logit may stand in both shards
    upstream = torch.randn(3, 11)
    mine = slice(rank * 45, (rank + 1) * 45)
    parts = [[head[0], *(x[mine] for x in head[1:])] for head in (student, teacher)]
    for beta in BETAS:
        whole = leaves(student, torch.float32), [x.float() for x in teacher]
        expected, expected_grads = run_divergence(case.ours, beta, *whole, target, upstream)
        shards = leaves(parts[0], torch.float32), [x.float() for x in parts[1]]
        out, grads = run_divergence(sharded_divergence, beta, *shards, target, upstream)
        for x, y in zip((*out, *grads), (*expected, expected_grads[0], *(g[mine] for g in expected_grads[1:]))):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@needs_gloo
def test_equals_the_whole_head():
    in_two_processes((check_rank,), (check_divergence,))
