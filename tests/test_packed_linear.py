"""Linear layers from a packed weight: against float64, row by row, and for the layouts of all dtypes."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate

import flashpo
from flashpo.ops.packed_linear import pack_linear, packed_linear, packs, packs_dtype

pytestmark = pytest.mark.native
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# rows: none, parts and more of a tile, more than pass in one go; columns and depth: parts of panels and blocks
ROWS = [0, 1, 7, 16, 17, 33, 200]
SIZES = [(1, 32), (48, 128), (50, 160), (321, 416)]


@dtypes
@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("columns", "depth"), SIZES)
def test_against_float64(backend, dtype, bias, columns, depth, poisoned):
    if backend == "native" and not packs_dtype(dtype):
        pytest.skip(f"no kernel for {dtype}")
    weight = torch.randn(columns, depth).to(dtype)
    added = torch.randn(columns).to(dtype) if bias else None
    with flashpo.backend(backend):
        packed = pack_linear(weight)
        for rows in ROWS:
            x = torch.randn(rows, depth + 32).to(dtype)[:, :depth]  # strided
            out = packed_linear(x, packed, added, columns=columns)
            exact = F.linear(x.double(), weight.double(), None if added is None else added.double())
            assert out.shape == exact.shape
            if rows:
                assert_as_accurate(out, exact, F.linear(x, weight, added))


@dtypes
@pytest.mark.parametrize(("columns", "depth"), [*SIZES, (7, 64), (3, 96)])
def test_layout(dtype, columns, depth, poisoned):
    """The native copy is the reference's, bit for bit, whatever it was made on."""
    weight = torch.randn(columns, depth).to(dtype)
    with flashpo.backend("torch"):
        expected = pack_linear(weight)
    with flashpo.backend("native"):
        assert torch.equal(pack_linear(weight), expected)
        out = torch.empty_like(expected)
        assert pack_linear(weight, out=out) is out
        assert torch.equal(out, expected)


def test_odd_depths():
    for depth in (1, 5, 19, 130):
        x, weight = torch.randn(9, depth), torch.randn(50, depth)
        exact = F.linear(x.double(), weight.double())
        assert_as_accurate(packed_linear(x, pack_linear(weight), columns=50), exact, F.linear(x, weight))
    assert not packs(torch.randn(50, 33).bfloat16())


@dtypes
def test_a_row_depends_on_itself_alone(dtype):
    if not packs_dtype(dtype):
        pytest.skip(f"no kernel for {dtype}")
    x, packed = torch.randn(45, 288).to(dtype), pack_linear(torch.randn(100, 288).to(dtype))
    whole = packed_linear(x, packed, columns=100)
    for rows in ([3], [44, 0, 17], list(range(20, 41))):
        assert torch.equal(packed_linear(x[rows], packed, columns=100), whole[rows])


def test_errors():
    weight = torch.randn(50, 32)
    packed, x = pack_linear(weight), torch.randn(2, 32)
    with pytest.raises(ValueError, match="weight must be"):
        pack_linear(weight[0])
    with pytest.raises(ValueError, match="weight must have a multiple of 32"):
        pack_linear(weight[:, :31].bfloat16())
    for out in (torch.empty(2, 32, 47), torch.empty(2, 32, 48).double(), torch.empty(2, 48, 32).mT):
        with pytest.raises(ValueError, match="out must be a dense"):
            pack_linear(weight, out=out)
    with pytest.raises(ValueError, match="x must be"):
        packed_linear(x[:, :31], packed, columns=50)
    with pytest.raises(ValueError, match="columns must fill"):
        packed_linear(x, packed, columns=48)
    with pytest.raises(ValueError, match="columns must fill"):
        packed_linear(x, packed, columns=97)
    with pytest.raises(TypeError, match="packed must be"):
        packed_linear(x.bfloat16(), packed, columns=50)
    with pytest.raises(ValueError, match="bias must be"):
        packed_linear(x, packed, torch.zeros(49), columns=50)
