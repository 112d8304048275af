"""A model gives the same on a token tree as on the padded batch: log-probs, entropies, gradients, auxiliary loss."""

import pytest
import torch
from packing_models import CONFIGS, Batch, alone, backward, batch, make, packed, padded

from flashpo.packing import forward, packable

TEMPERATURE = 0.9


def assert_equal(ours, stock, tolerance: float) -> None:
    for mine, theirs in zip(ours, stock):
        error, scale = (mine - theirs).abs().max().item(), theirs.abs().max().item()
        assert mine.dtype == theirs.dtype
        assert error <= tolerance * scale, f"{error / scale:.1e} of {scale:.1e}"


def assert_same(model, b: Batch, stock=padded, tolerance: float = 1e-9) -> None:
    """In fp64; but norms, and the gradients that go through them, are of fp32 precision in transformers."""
    expected = stock(model, b, TEMPERATURE)
    d_expected = backward(model, b, expected)
    ours = packed(model, b, TEMPERATURE)
    d_ours = backward(model, b, ours)
    assert ours[0].dtype == torch.float64
    assert_equal(ours[:2], expected[:2], tolerance)
    assert_same_gradients(d_ours, d_expected)
    torch.testing.assert_close(stock(model, b, TEMPERATURE)[0], expected[0], rtol=0, atol=0)  # the padded way stays


def assert_same_gradients(ours, expected, tolerance: float = 3e-6) -> None:
    assert ours.keys() == expected.keys()
    live = [name for name, x in expected.items() if x is not None and x.abs().max() > 1e-6]
    assert len(live) > 0.8 * len(expected), "most gradients are 0: nothing is compared"
    assert_equal([ours[n] for n in live], [expected[n] for n in live], tolerance)


@pytest.mark.parametrize("kind", CONFIGS)
def test_family(kind):
    model = make(kind)
    assert packable(model) == (True, "")
    if "eager" in model.config._attn_implementation:
        assert_same(model, batch(), alone, tolerance=3e-7)  # its softmax is fp32
    else:
        assert_same(model, batch())


def test_eager_attention():
    assert_same(make("qwen3", attention="eager"), batch(), alone, tolerance=3e-7)


def test_right_padding():
    assert_same(make("llama"), batch(left=False))


def test_auxiliary_loss():
    """That of the padded batch: tokens count as often as rows hold them. transformers sums it in fp32."""
    model, b = make("qwen3_moe"), batch()
    expected, ours = padded(model, b, TEMPERATURE, True), packed(model, b, TEMPERATURE, True)
    assert ours[2].item() == pytest.approx(expected[2].item(), rel=1e-6)
    assert_same_gradients(backward(model, b, ours), backward(model, b, expected))
    with pytest.raises(ValueError, match="prune"):
        forward(model, b.pack(), aux_loss=True)


def test_what_is_no_tree():
    with pytest.raises(TypeError, match="tree must be a TokenTree, as pack makes them, got Tensor"):
        forward(make("qwen3"), torch.ones(2, 3))
