"""Products that sum over the vocabulary or over many tokens, compared with the error of a chain of TERMS roundings."""

import numpy as np
import pytest
import torch

from flashpo.ops._product import TERMS, add_product, product

# Roundings of a chain add up like a random walk, in units of the sum of the terms' absolute values.
BOUND = 0.5 * TERMS**0.5 * torch.finfo(torch.float32).eps


def peaked(rows, terms, columns):
    """Gradients of logits, as a head's backward has them: a few large terms among very many small ones."""
    logits, target = 4 * torch.randn(rows, terms), torch.randint(terms, (rows, 1))
    a = (torch.zeros(rows, terms).scatter_(1, target, 1.0) - logits.softmax(1)) * torch.randn(rows, 1)
    return a, torch.randn(terms, columns)


@pytest.fixture(params=[1, 2, 3], ids="{} threads".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads", "poisoned")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(9, 151_936, 16), (40, 33_000, 24), (3, TERMS, 5), (0, 7, 5)], ids=str)
def test_small_terms_count(shape, transposed):
    for _ in range(2):
        a, b = peaked(*shape)
        a = a.t().contiguous().t() if transposed else a
        exact = a.double() @ b.double()
        bound = BOUND * (a.double().abs() @ b.double().abs())
        assert ((product(a, b) - exact).abs() <= bound).all()
        for rows in (None, 4):  # of the buffer
            total = torch.full(exact.shape, 1.0)
            buffer = None if rows is None else torch.empty(rows * shape[2])
            add_product(total, a, b, buffer=buffer)
            assert ((total - 1 - exact).abs() <= bound + BOUND).all()
            assert torch.equal(add_product(total, a, b, first=True, buffer=buffer), total)
            assert ((total - exact).abs() <= bound).all()


def test_a_chain_that_begins_with_the_large_terms_would_lose_the_others():
    a, b = peaked(9, 151_936, 1)
    order = a.abs().argsort(1, descending=True)
    chain = np.cumsum((a * b.t()).gather(1, order).numpy(), axis=1, dtype=np.float32)[:, -1:]
    exact = a.double() @ b.double()
    assert ((torch.from_numpy(chain) - exact).abs() > BOUND * (a.double().abs() @ b.double().abs())).any()


def test_no_terms():
    assert torch.equal(product(torch.ones(2, 0), torch.ones(0, 5)), torch.zeros(2, 5))


def test_float64_stays_float64():
    a, b = (x.double() for x in peaked(5, 3 * TERMS + 1, 6))
    torch.testing.assert_close(product(a, b), a @ b, rtol=1e-13, atol=1e-13)
