"""Preference losses on a CUDA device: they do not wait for the device, and their results are those of the CPU."""

import pytest
import torch

from flashpo import PREFERENCE_LOSSES, direct_advantage_loss, kto_loss, preference_loss, sequence_logprobs
from flashpo.ops._preference_terms import SMOOTHED

pytestmark = pytest.mark.gpu
PAIRS, TOKENS = 8, 200


def results(logprob, mask, cu_seqlens, desirable):
    """Every loss on rows and on flat tokens, and their gradients."""
    out = []
    for x, live, options in (
        (logprob, mask, {"ld_alpha": 0.5, "log_sum_sq_probs": logprob - 0.1}),
        (logprob.flatten(), mask.flatten(), {"cu_seqlens": cu_seqlens}),
    ):
        leaf = x.detach().clone().requires_grad_()
        sums, length, weight = sequence_logprobs(leaf, live, **options)
        lengths = dict(zip(("chosen_length", "rejected_length"), length.chunk(2)))
        for name in PREFERENCE_LOSSES:
            smoothing = {"label_smoothing": 0.1} if name in SMOOTHED else {}
            out.append(preference_loss(*sums.chunk(2), loss=name, **lengths, **smoothing).loss)
        out.append(kto_loss(sums, sums.detach() - 1, desirable, kl=sums).loss)
        out.append(direct_advantage_loss(sums, sums.detach() - 1, sums.detach(), beta=0.5))
        out.append(torch.autograd.grad(sum(out[-len(PREFERENCE_LOSSES) - 2 :]), leaf)[0])
        if weight is not None:
            out.append(weight)
    return out


def test_nothing_waits_for_the_device():
    logprob, mask = -torch.rand(2 * PAIRS, TOKENS), torch.rand(2 * PAIRS, TOKENS) > 0.4
    inputs = logprob, mask, torch.arange(2 * PAIRS + 1) * TOKENS, torch.arange(2 * PAIRS) % 3 == 0
    on_device = [x.cuda() for x in inputs]
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = results(*on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(actual, results(*inputs)):
        torch.testing.assert_close(a.cpu(), b)
