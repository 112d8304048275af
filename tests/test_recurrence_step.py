"""recurrence_step, token by token, against tree_recurrence over whole rows in float64."""

import pytest
import torch
from inputs import sanitized

import flashpo
from flashpo import Lineage, tree_recurrence
from flashpo.ops.recurrence_step import recurrence_step

ROWS, STEPS = 3, 5


def tokens(heads, key_heads, dk, dv, of_features, delta):
    """q, k, v, decay, beta (rows, steps, ...)."""
    q, k = (torch.randn(ROWS, STEPS, key_heads, dk) / dk**0.5 for _ in range(2))
    decay = -torch.rand(ROWS, STEPS, heads, *([dk] if of_features else []))
    return q, k, torch.randn(ROWS, STEPS, heads, dv), decay, torch.rand(ROWS, STEPS, heads) if delta else None


def exact(given, scale):
    """Outputs (rows, steps, heads, dv) and the states after the last token."""
    ends = torch.arange(1, ROWS + 1) * STEPS
    lineage = Lineage(torch.stack([ends - STEPS, ends], 1), torch.full((ROWS,), -1))
    flat = [None if x is None else x.flatten(0, 1).double() for x in given]
    out, states = tree_recurrence(*flat, lineage, scale=scale, ends=True)
    return out.unflatten(0, (ROWS, STEPS)), states


@sanitized
@pytest.mark.parametrize("layout", ["as it is", "transposed"])
@pytest.mark.parametrize("delta", [True, False], ids=["delta rule", "no beta"])
@pytest.mark.parametrize("of_features", [True, False], ids=["decay of features", "decay of heads"])
@pytest.mark.parametrize("shape", [(4, 2, 16, 64), (2, 2, 7, 5), (3, 1, 33, 130), (2, 1, 64, 16)], ids=str)
def test_steps(backend, shape, of_features, delta, layout):
    heads, _, dk, dv = shape
    given = tokens(*shape, of_features, delta)
    outs, ends = exact(given, scale=0.3)
    state = torch.zeros(ROWS, heads, dk, dv) if layout == "as it is" else torch.zeros(ROWS, heads, dv, dk).mT
    flashpo.stats(reset=True)
    for t in range(STEPS):
        with flashpo.backend(backend):
            out = recurrence_step(state, *(None if x is None else x[:, t] for x in given), scale=0.3)
        torch.testing.assert_close(out.double(), outs[:, t], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.double(), ends, rtol=1e-5, atol=1e-5)
    assert flashpo.stats() == {"recurrence_step_": {backend: STEPS}}


@sanitized
def test_a_row_depends_on_itself_alone(backend):
    """Bits: rows may leave a decode batch while others go on."""
    q, k, v, decay, beta = (x[:, 0] for x in tokens(4, 2, 24, 40, False, True))
    states = torch.randn(ROWS, 4, 24, 40)
    with flashpo.backend(backend):
        every = recurrence_step(together := states.clone(), q, k, v, decay, beta)
        for row in range(ROWS):
            one = slice(row, row + 1)
            out = recurrence_step(alone := states[one].clone(), q[one], k[one], v[one], decay[one], beta[one])
            assert torch.equal(out, every[one])
            assert torch.equal(alone, together[one])


def test_wrong_arguments_are_named():
    q, k, v, decay, beta = (x[:, 0] for x in tokens(4, 2, 8, 16, False, True))
    state = torch.zeros(ROWS, 4, 8, 16)
    good = {"state": state, "q": q, "k": k, "v": v, "decay": decay, "beta": beta}
    recurrence_step(**good)
    for name, bad, error in (
        ("q", q.double(), TypeError), ("k", k[:, :1], ValueError), ("v", v[:1], ValueError),
        ("decay", decay[..., None], ValueError), ("beta", beta[0], ValueError),
        ("state", state[:, :3].clone(), ValueError), ("state", torch.zeros(ROWS, 4, 8, 32)[..., ::2], ValueError),
    ):  # fmt: skip
        with pytest.raises(error):
            recurrence_step(**{**good, name: bad})
