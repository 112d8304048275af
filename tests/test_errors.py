"""Wrong input raises a TypeError or ValueError that names the argument; nothing is clamped or ignored."""

import pytest
import torch
from inputs import backends

import flashpo
from flashpo import linear_logprob, selective_log_softmax

H, V = 8, 20
hidden, weight, target = torch.randn(3, H), torch.randn(V, H), torch.tensor([0, 5, 19])
logits = torch.randn(3, V)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("hidden must be a torch.Tensor, got list", {"hidden": [1.0]}),
        ("hidden must be float32", {"hidden": hidden.long()}),
        ("weight must be float32", {"weight": weight.int()}),
        (r"weight must be \(V, H\)", {"weight": weight[0]}),
        (r"weight must be \(V, H\) with V > 0", {"weight": weight[:0]}),
        ("hidden has 8 features", {"weight": weight[:, :4]}),
        ("these are logits", {"hidden": logits}),
        ("target must be int64", {"target": target.int()}),
        ("target must have the shape of hidden", {"target": target[:2]}),
        ("target is on meta", {"target": target.to("meta")}),
        (r"bias must be \(20,\)", {"bias": torch.zeros(V + 1)}),
        ("bias must be float32", {"bias": torch.zeros(V).long()}),
        ("temperature must be positive and finite, got 0", {"temperature": 0}),
        ("temperature must be positive and finite, got -1", {"temperature": -1.0}),
        ("temperature must be positive and finite, got nan", {"temperature": float("nan")}),
        ("temperature must be a number, got str", {"temperature": "1"}),
        ("temperature must be a number or of the target's shape", {"temperature": torch.ones(2)}),
        ("temperature must be positive everywhere", {"temperature": torch.tensor([1.0, 0.0, 1.0])}),
        ("temperature must not require grad", {"temperature": torch.ones(3, requires_grad=True)}),
        ("softcap must be positive", {"softcap": 0.0}),
        ("logit_scale must be positive", {"logit_scale": 0.0}),
        ("logit_scale must be positive and finite, got inf", {"logit_scale": float("inf")}),
        ("outputs: unknown name 'entropies'", {"outputs": ("entropies",)}),
        ("outputs must be a tuple", {"outputs": "entropy"}),
    ],
)
def test_linear_logprob(message, change):
    arguments = {"hidden": hidden, "weight": weight, "target": target, "bias": None} | change
    with pytest.raises((TypeError, ValueError), match=message):
        linear_logprob(**arguments)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("logits must be float32", {"logits": logits.bool()}),
        ("logits has an empty last dimension", {"logits": logits[:, :0]}),
        ("index must be int64", {"index": target.short()}),
        ("index must have the shape of logits", {"index": target[None]}),
        ("temperature must be positive", {"temperature": -0.5}),
        ("outputs: unknown name", {"outputs": ("logits",)}),
    ],
)
def test_selective_log_softmax(message, change):
    with pytest.raises((TypeError, ValueError), match=message):
        selective_log_softmax(**({"logits": logits, "index": target} | change))


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("bad", [V, -1, -101, 2**40])
def test_a_target_outside_the_vocabulary(backend, bad):
    wrong = torch.tensor([0, bad, -100])
    with flashpo.backend(backend):
        with pytest.raises(ValueError, match=r"target.* outside \[0, 20\)"):
            linear_logprob(hidden, weight, wrong)
        with pytest.raises(ValueError, match=r"index.* outside \[0, (20|V)\)"):
            selective_log_softmax(logits, wrong)
        assert linear_logprob(hidden, weight, torch.tensor([0, 1, bad]), ignore_index=bad).logprob[2] == 0


def test_forbidden_tokens_have_finite_neighbours():
    """users.md P10, TRL#7221: -inf logits, the target's among them."""
    x = torch.randn(4, 50, requires_grad=True)
    masked = x.masked_fill(torch.rand(4, 50) < 0.5, -torch.inf)
    masked = masked.index_fill(1, torch.tensor([7]), 0.5)
    out = selective_log_softmax(masked, torch.full((4,), 7))
    (out.logprob + out.entropy).sum().backward()
    assert out.logprob.isfinite().all()
    assert out.entropy.isfinite().all()
    assert x.grad.isfinite().all()
    assert selective_log_softmax(torch.tensor([[-torch.inf, 0.0]]), torch.tensor([0])).logprob == -torch.inf
