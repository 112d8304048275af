"""What autograd may ask of an operator besides a gradient: a second derivative, a tangent, the same gradient again."""

import pytest
import torch
from torch.autograd import forward_ad

import flashpo
from flashpo import (
    Lineage,
    divergence,
    linear_divergence,
    linear_logprob,
    policy_loss,
    preference_loss,
    sample,
    selective_log_softmax,
    tree_attention,
    tree_conv,
    tree_recurrence,
    value_loss,
)
from flashpo.ops.packed_linear import pack_linear, packed_linear
from flashpo.ops.tree_scan import tree_scan

TARGET, MASK, OLD = torch.tensor([1, 0, 4]), torch.ones(3, 4, dtype=torch.bool), -torch.ones(3, 4)
TEACHER = torch.randn(3, 6), torch.randn(5, 6)
TEACHER_LOGITS = torch.randn(3, 5)
END, POSITION = torch.full((3,), 3, dtype=torch.int32), torch.arange(3, dtype=torch.int32)
LINEAGE = Lineage(torch.tensor([[0, 2], [2, 3]]), torch.tensor([-1, 0]))
LENGTHS = {"chosen_length": torch.full((3,), 4), "rejected_length": torch.full((3,), 5)}
POLICY = {"entropy_coef": 0.1, "loss": "ppo"}

# name -> (the class that autograd sees, a scalar of some inputs, the inputs' shapes)
DIFFERENTIABLE = {
    "linear_logprob": (
        "LinearLogprob",
        lambda h, w, b: (lambda out: (out.logprob + out.entropy).sum())(linear_logprob(h, w, TARGET, b)),
        [(3, 4), (5, 4), (5,)],
    ),
    "linear_divergence": (
        "LinearDivergence",
        lambda h, w, b: (lambda out: (out.divergence + out.entropy + out.student_logprob).sum())(
            linear_divergence(h, w, *TEACHER, TARGET, b, beta=0.3, outputs=("entropy", "student_logprob"))
        ),
        [(3, 4), (5, 4), (5,)],
    ),
    "divergence": (
        "Divergence",
        lambda z: (lambda out: (out.divergence + out.entropy).sum())(divergence(z, TEACHER_LOGITS, TARGET, beta=0.3)),
        [(3, 5)],
    ),
    "selective_log_softmax": (
        "SelectiveLogSoftmax",
        lambda z: (lambda out: (out.logprob + out.entropy).sum())(selective_log_softmax(z, TARGET)),
        [(3, 5)],
    ),
    "policy_loss": (
        "PolicyLossFunction",
        lambda logprob, entropy: policy_loss(logprob, OLD, torch.ones(3), MASK, entropy=entropy, **POLICY).loss,
        [(3, 4), (3, 4)],
    ),
    "value_loss": ("ValueLoss", lambda values: value_loss(values, OLD, OLD, MASK), [(3, 4)]),
    "tree_attention": (
        "TreeAttention",
        lambda q, k, v, sinks: tree_attention(q, k, v, END, POSITION, sinks=sinks).square().sum(),
        [(3, 4, 8), (3, 2, 8), (3, 2, 8), (4,)],
    ),
    "tree_recurrence": (
        "TreeRecurrence",
        lambda *x: sum(y.square().sum() for y in tree_recurrence(*x, LINEAGE, ends=True)),
        [(3, 1, 4), (3, 1, 4), (3, 2, 4), (3, 2), (3, 2)],
    ),
    "tree_conv": (
        "TreeConv",
        lambda x, weight, bias: tree_conv(x, weight, bias, LINEAGE).square().sum(),
        [(3, 4), (4, 2), (4,)],
    ),
    "tree_scan": ("TreeScan", lambda a, b: tree_scan(a, b, LINEAGE).square().sum(), [(3, 4), (3, 4)]),
    "preference_loss": (
        "OddsRatio",
        lambda chosen, rejected: preference_loss(-chosen.exp(), -rejected.exp(), loss="odds_ratio", **LENGTHS).loss,
        [(3,), (3,)],
    ),
}
each = pytest.mark.parametrize("name", DIFFERENTIABLE)


def leaves(name):
    _, function, shapes = DIFFERENTIABLE[name]
    return function, [torch.randn(shape).requires_grad_() for shape in shapes]


def subclasses(of):
    return {each for child in of.__subclasses__() for each in (child, *subclasses(child))}


def test_every_function_is_here():
    ours = {x.__name__ for x in subclasses(torch.autograd.Function) if x.__module__.startswith("flashpo.ops")}
    assert ours - {"_Last"} == {seen for seen, _, _ in DIFFERENTIABLE.values()}


@each
def test_a_second_derivative_raises(name):
    """By every input, also where another term of the sum has a derivative; and no earlier than it is asked for."""
    function, inputs = leaves(name)
    seen = DIFFERENTIABLE[name][0].removesuffix("Function")
    grads = torch.autograd.grad(function(*inputs), inputs, create_graph=True)
    plain = torch.autograd.grad(function(*inputs), inputs)
    for x in inputs:
        for grad, without in zip(grads, plain, strict=True):
            assert torch.equal(grad, without)
            with pytest.raises(NotImplementedError, match=f"{seen} has no second derivative"):
                torch.autograd.grad(grad.sum() + x.square().sum(), x, retain_graph=True)


@each
def test_a_second_derivative_by_the_incoming_gradient_raises(name):
    function, inputs = leaves(name)
    upstream = torch.ones(()).requires_grad_()
    (grad,) = torch.autograd.grad(function(*inputs), inputs[:1], upstream, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        torch.autograd.grad(grad.sum(), upstream)


@each
def test_a_tangent_raises(name):
    """Forward mode would be 0 otherwise."""
    function, inputs = leaves(name)
    inputs = [x.detach() for x in inputs]
    for i, x in enumerate(inputs):
        with pytest.raises((NotImplementedError, RuntimeError), match=r"forward|jvp"):
            torch.func.jvp(lambda y, i=i: function(*inputs[:i], y, *inputs[i + 1 :]), (x,), (torch.ones_like(x),))
        with forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError), match=r"forward|jvp"):
            function(*inputs[:i], forward_ad.make_dual(x, torch.ones_like(x)), *inputs[i + 1 :])


@each
def test_a_gradient_can_be_had_again_and_written_over(name):
    """A gradient, and what the caller makes of it, is no tensor that backward needs once more."""
    function, inputs = leaves(name)
    value = function(*inputs)
    expected = torch.autograd.grad(value, inputs, retain_graph=True)
    for times in (1, 2, 3):
        value.backward(retain_graph=True)
        for x, grad in zip(inputs, expected, strict=True):
            torch.testing.assert_close(x.grad, times * grad)
            if times == 1:
                x.grad.mul_(3).div_(3)


@pytest.mark.parametrize("name", ["linear_logprob", "selective_log_softmax"])
def test_results_can_be_written_over(name):
    """As those of torch's gather can be, whose caller masks them in place."""
    x, weight = torch.randn(3, 5, requires_grad=True), torch.eye(5)
    call = {"linear_logprob": lambda **k: linear_logprob(x, weight, TARGET, **k)}.get(
        name, lambda **k: selective_log_softmax(x, TARGET, **k)
    )
    out = call(outputs=("entropy", "mean_logit"))
    expected = torch.autograd.grad((2 * out.logprob + out.entropy).sum(), x, retain_graph=True)[0]
    out.mean_logit.zero_()
    out.entropy.add_(1)
    out.logprob.mul_(2)
    torch.testing.assert_close(torch.autograd.grad((out.logprob + out.entropy).sum(), x)[0], expected)


def test_an_operator_without_a_gradient_raises():
    """autograd takes it for a constant."""
    x, packed = torch.randn(2, 4, requires_grad=True), pack_linear(torch.randn(5, 4))
    with pytest.raises(ValueError, match="x requires grad, but packed_linear_fwd has no gradient"):
        packed_linear(x, packed, columns=5)
    with torch.no_grad():
        assert packed_linear(x, packed, columns=5).shape == (2, 5)
    draw = sample(x, seed=0, offset=torch.arange(2))  # whose results are constants
    assert not draw.logprob.requires_grad
    with flashpo.backend("torch"), pytest.raises(ValueError, match="requires grad"):
        packed_linear(x, packed, columns=5)
