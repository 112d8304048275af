"""value_loss against the written formulas of peers under autograd: values, explicit gradient, masks and bad input."""

import pytest
import torch

from flashpo import value_loss


def peers(values, old_values, returns, mask, clip, num_items=None):
    """verl's and old TRL's: 1/2 masked mean of the larger square; every step recorded by autograd."""
    squares = (values - returns) ** 2
    if clip is not None:
        clipped = torch.clamp(values, old_values - clip, old_values + clip)
        squares = torch.max(squares, (clipped - returns) ** 2)
    return 0.5 * (squares * mask).sum() / (mask.sum() if num_items is None else num_items)


def inputs(*shape, dtype=torch.float64):
    values, noise, returns = torch.randn(3, *shape, dtype=dtype)
    return values.requires_grad_(), values.detach() + 0.3 * noise, returns, torch.rand(shape) < 0.7


@pytest.mark.parametrize("clip", [None, 0.2, 0.05, 10.0])
@pytest.mark.parametrize("num_items", [None, 37, "tensor"])
@pytest.mark.parametrize("shape", [(5, 33), (101,)], ids=str)
def test_peers_formula(clip, num_items, shape):
    values, old, returns, mask = inputs(*shape)
    number = torch.tensor(12.5, dtype=torch.float64) if num_items == "tensor" else num_items
    ours = value_loss(values, old, returns, mask, clip=clip, num_items=number)
    theirs = peers(values, old, returns, mask, clip, number)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
    got, expected = (torch.autograd.grad(3 * x, values)[0] for x in (ours, theirs))
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-18)
    assert (got == 0).any(), "nothing masked or clipped: not a test"


def test_gradcheck():
    values, old, returns, mask = inputs(4, 9)
    assert torch.autograd.gradcheck(lambda v: value_loss(v, old, returns, mask), values)
    assert torch.autograd.gradcheck(lambda v: value_loss(v, old, returns, mask, clip=None, num_items=5.0), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_values_are_computed_in_fp32(dtype):
    values, old, returns, mask = inputs(5, 33, dtype=dtype)
    wide = values.detach().float().requires_grad_()
    ours, expected = value_loss(values, old, returns, mask), value_loss(wide, old.float(), returns.float(), mask)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected)
    grads = torch.autograd.grad(ours, values)[0], torch.autograd.grad(expected, wide)[0].to(dtype)
    assert torch.equal(*grads)


def test_masked_tokens_are_never_looked_at():
    values, old, returns, mask = inputs(5, 33)
    expected = value_loss(values, old, returns, mask)
    bad = [x.detach().masked_fill(~mask, bad) for x, bad in ((values, torch.inf), (old, torch.nan), (returns, 1e300))]
    leaf = bad[0].requires_grad_()
    ours = value_loss(leaf, *bad[1:], mask.long())
    assert torch.equal(ours, expected)
    assert torch.equal(torch.autograd.grad(ours, leaf)[0], torch.autograd.grad(expected, values)[0])


def test_nothing_live_gives_a_zero_in_the_graph():
    values, old, returns, _ = inputs(3, 4)
    for mask in (torch.zeros(3, 4, dtype=torch.bool), torch.zeros(3, 4, dtype=torch.long)):
        loss = value_loss(values, old, returns, mask)
        assert loss == 0
        assert (torch.autograd.grad(loss, values)[0] == 0).all()
    empty = torch.zeros(0, 5, requires_grad=True)
    value_loss(empty, empty, empty, torch.zeros(0, 5, dtype=torch.bool)).backward()


def test_gradients_stay_finite_where_squares_overflow():
    values = torch.tensor([1e30, -3e30, 1.0], requires_grad=True)
    old, returns, mask = torch.tensor([1e30, 0.0, 1.0]), torch.tensor([0.0, 1e30, -1e30]), torch.ones(3).bool()
    (gradient,) = torch.autograd.grad(value_loss(values, old, returns, mask), values)
    torch.testing.assert_close(gradient, torch.tensor([1e30, -4e30, 1e30]) / 3)


def test_compiles_into_one_graph():
    torch._dynamo.reset()
    f = torch.compile(value_loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for T in (7, 12, 20):
        values, old, returns, mask = inputs(4, T)
        for m in (mask, mask.long()):
            ours, expected = f(values, old, returns, m), value_loss(values, old, returns, m)
            assert torch.equal(ours, expected)
            assert torch.equal(torch.autograd.grad(ours, values)[0], torch.autograd.grad(expected, values)[0])


good = dict(zip(("values", "old_values", "returns"), torch.randn(3, 2, 5))) | {"mask": torch.ones(2, 5).bool()}


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("values must be float32", {"values": torch.ones(2, 5).long()}),
        ("old_values must be a torch.Tensor, got NoneType", {"old_values": None}),
        (r"old_values must have values' shape \(2, 5\), got \(2,\)", {"old_values": torch.ones(2)}),
        ("returns is on meta", {"returns": torch.ones(2, 5, device="meta")}),
        ("mask must have the shape of values", {"mask": torch.ones(5).bool()}),
        ("mask must be bool or integers", {"mask": torch.ones(2, 5)}),
        ("mask holds values that are neither 0 nor 1", {"mask": torch.full((2, 5), -1)}),
        ("clip must be positive", {"clip": 0.0}),
        ("clip must be a number", {"clip": "0.2"}),
        ("num_items must be positive", {"num_items": 0}),
        ("num_items must be a number or a scalar tensor", {"num_items": torch.ones(2)}),
    ],
)
def test_bad_input(message, change):
    with pytest.raises((TypeError, ValueError), match=message):
        value_loss(**(good | change))
