"""`linear_logprob(group=)`: a head sharded along the vocabulary over 2 processes equals the whole head."""

import pytest
import torch
import torch.distributed as dist
from two_processes import in_two_processes, needs_gloo

from flashpo import TokenStats, linear_logprob

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


@needs_gloo
def test_equals_the_whole_head():
    in_two_processes((check_rank,))
