"""Self-checks compute fp32 products in fp32, even if TF32 was enabled by either of torch's two ways."""

import contextlib

import pytest
import torch
from rollout_models import FAMILIES, prompts

from flashpo import packable
from flashpo._precision import _set, exact_products
from flashpo.packing import parity as packing_parity
from flashpo.rollout import RolloutEngine, SamplingParams
from flashpo.rollout import parity as rollout_parity

pytestmark = pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch has one flag only")
PLACES = {
    "all": torch.backends,
    "CUDA": torch.backends.cudnn,
    "oneDNN": torch.backends.mkldnn,
    "products of CUDA": torch.backends.cuda.matmul,
    "products of oneDNN": getattr(torch.backends.mkldnn, "matmul", None),
}


def shown() -> list:
    """What each flag says now, by itself and by the one above it, and what the older way says, or that it raises."""
    flags = [place.fp32_precision for place in PLACES.values()]
    flags += [torch.backends.cudnn.conv.fp32_precision, torch.backends.mkldnn.conv.fp32_precision]
    with contextlib.suppress(RuntimeError):
        flags.append(torch.get_float32_matmul_precision())
    return flags


@pytest.fixture
def flags():
    """As a new process has them; afterwards as they were."""
    before = []
    for place in PLACES.values():
        before.append(place.fp32_precision)
        _set(place, "none")
    yield
    torch.set_float32_matmul_precision("highest")
    for place, value in zip(PLACES.values(), before):
        _set(place, value)


def set_by(way: str) -> None:
    if way in PLACES:
        _set(PLACES[way], "tf32")
    elif way != "nothing":
        torch.set_float32_matmul_precision(way)


WAYS = ["nothing", "high", "medium", *PLACES]


@pytest.mark.parametrize("way", WAYS)
def test_products_are_exact_and_flags_are_restored(way, flags):
    set_by(way)
    before = shown()
    with contextlib.suppress(KeyError), exact_products():
        assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        with exact_products():
            pass
        assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        raise KeyError
    assert shown() == before
    torch.backends.fp32_precision = "ieee"  # flags that nobody set still follow it
    after = shown()
    for place in PLACES.values():
        _set(place, "none")
    set_by(way)
    torch.backends.fp32_precision = "ieee"
    assert shown() == after


def test_self_checks_run_after_tf32_was_set(flags, monkeypatch):
    for parity in (packing_parity, rollout_parity):
        monkeypatch.setattr(parity, "_answers", {})
    torch.backends.fp32_precision = "tf32"
    before = shown()
    torch.manual_seed(0)
    model = FAMILIES["qwen3"]().eval()
    assert packable(model, check=True).ok
    RolloutEngine(model, fallback="error").generate(prompts(9, 20), SamplingParams(max_new_tokens=4))
    assert shown() == before
