"""The replacements in `trl.trainer.utils`: guarded by signature, restored exactly, and correct by themselves."""

import contextlib
import subprocess
import sys
import threading
import types

import pytest
import torch

pytest.importorskip("trl")
import trl.trainer.utils as utils
from trl_models import CONFIGS, VOCAB, assert_ran, load

import flashpo
import flashpo.trl
from flashpo.trl import patch, patched, unpatch
from flashpo.trl._replaced import replaced
from flashpo.trl.patch import stock
from flashpo.trl.verify import tolerance_for

FP32 = tolerance_for(torch.float32)
SEAMS = (
    "_ChunkedLogProbFunction",
    "_use_triton",
    "is_triton_available",
    "_supports_trl_loss_kernel",
    "_fused_logprob_entropy",
)


@pytest.fixture(autouse=True)
def unpatched():
    before = {name: utils.__dict__.get(name) for name in SEAMS}
    yield
    unpatch()
    assert {name: utils.__dict__.get(name) for name in SEAMS} == before


def is_patched() -> bool:
    return utils._ChunkedLogProbFunction.__module__.startswith("flashpo")


def test_patch_and_unpatch_are_idempotent_and_restore_every_name():
    before = dict(utils.__dict__)
    patch()
    first = dict(utils.__dict__)
    patch()
    assert utils.__dict__ == first
    assert {k for k in first if first[k] is not before.get(k)} == set(SEAMS)
    unpatch()
    assert utils.__dict__ == before
    unpatch()
    assert utils.__dict__ == before


def test_blocks_nest_and_stock_wins():
    with patched():
        with patched():
            pass
        assert is_patched()
        unpatch()
        assert is_patched(), "a block that is still open keeps the patch"
        with stock():
            assert not is_patched()
        assert is_patched()
    assert not is_patched()


def test_blocks_in_many_threads():
    failures = []

    def work():
        for _ in range(200):
            with patched():
                if not is_patched():
                    failures.append("not patched inside a block")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not is_patched()


def in_another_thread(look):
    """What `look()` returns in a thread of its own."""
    found = []
    thread = threading.Thread(target=lambda: found.append(look()))
    thread.start()
    thread.join()
    return found[0]


def kernels_for_logits():
    """Which of our operators a call of TRL's scoring of logits ran in this thread."""
    before = flashpo.stats().get("selective_log_softmax_fwd", {})
    utils.selective_log_softmax(torch.randn(2, 7), torch.zeros(2, dtype=torch.long))
    return flashpo.stats().get("selective_log_softmax_fwd", {}) != before


def test_blocks_are_for_their_own_thread():
    """A stock trainer in another thread stays stock, and a comparison there does not change what this thread runs."""
    with patched():
        assert kernels_for_logits()
        assert not in_another_thread(kernels_for_logits)

        def compare():
            with stock():
                inside = here.wait(10), kernels_for_logits()
            return inside

        here = threading.Event()
        found = []
        other = threading.Thread(target=lambda: found.append(compare()))
        other.start()
        assert kernels_for_logits()
        here.set()
        other.join()
        assert found == [(True, False)]
    patch()
    assert in_another_thread(kernels_for_logits)
    with stock():
        assert not kernels_for_logits()
        assert in_another_thread(kernels_for_logits)


class Module(types.ModuleType):
    """A module with a function that says who has answered."""

    def __init__(self):
        super().__init__("module")
        self.function = self.original = lambda: "original"


def answers(name):
    return lambda original: lambda: f"{name} before {original()}"


def test_a_replaced_function_is_for_its_own_thread():
    module = Module()
    with replaced(module, "function", answers("ours")):
        assert module.function() == "ours before original"
        assert in_another_thread(module.function) == "original"
        with replaced(module, "function", answers("inner")):
            assert module.function() == "inner before original"
        assert module.function() == "ours before original"
    assert module.function is module.original


def test_a_replaced_function_comes_back_whatever_the_order_of_exits():
    """Blocks of two threads that overlap: the first to open is the first to close."""
    module = Module()
    opened, closed, found = threading.Event(), threading.Event(), []

    def overlap():
        with replaced(module, "function", answers("theirs")):
            opened.set()
            closed.wait(10)
            found.append(module.function())

    other = threading.Thread(target=overlap)
    with replaced(module, "function", answers("ours")):
        other.start()
        opened.wait(10)
    assert module.function() == "original"
    closed.set()
    other.join()
    assert found == ["theirs before original"]
    assert module.function is module.original


def test_a_replaced_function_comes_back_after_errors():
    module = Module()
    with pytest.raises(RuntimeError), replaced(module, "function", answers("ours")):
        raise RuntimeError("in the block")
    assert module.function is module.original
    with pytest.raises(ZeroDivisionError), replaced(module, "function", lambda original: 1 / 0):
        pass
    assert module.function is module.original


def test_who_replaces_ours_keeps_that():
    module = Module()
    with replaced(module, "function", answers("ours")):
        inner = module.function
        module.function = theirs = lambda: f"theirs before {inner()}"
        assert module.function() == "theirs before ours before original"
    assert module.function is theirs
    assert module.function() == "theirs before original"


LATER = """
import sys, trl.trainer.utils as utils, flashpo.trl
flashpo.trl.patch()
assert "trl.trainer.distillation_trainer" not in sys.modules
from trl.trainer import distillation_trainer as later
assert later.ChunkedDivergenceFunction.__module__ == "flashpo.trl.patch"
flashpo.trl.unpatch()
assert later.ChunkedDivergenceFunction.__module__ == "trl.kernels.chunked_divergence"
assert later._use_triton is utils._use_triton
"""


def test_a_trainer_that_is_imported_after_the_patch_is_reached():
    subprocess.run([sys.executable, "-c", LATER], check=True)


def test_flashpo_does_not_import_trl():
    code = "import sys, flashpo, flashpo.trl; assert 'trl' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# the head


def fused(kind: str, outputs=("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"), **options):
    model = load(kind)
    utils.add_fused_lm_head(model, outputs=outputs, **options)
    return model


def batch(keep: float = 0.6, shape=(3, 9)):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, VOCAB, shape, generator=generator)
    return ids, ids.masked_fill(torch.rand(shape, generator=generator) > keep, -100)


def score(model, ids, labels, weights):
    """All outputs, and gradients for random, uneven upstream gradients of log-probs and entropy."""
    model.zero_grad(set_to_none=True)
    out = model(ids, labels=labels, fused_lm_head=True)
    (out.log_probs * weights[0] + out.entropy * weights[1]).sum().backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_fused_head_outputs_and_gradients(kind, temperature):
    model = fused(kind, temperature=temperature)
    ids, labels = batch()
    weights = torch.randn(2, 3, 8)
    expected, expected_grads = score(model, ids, labels, weights)
    flashpo.stats(reset=True)
    with patched():
        actual, grads = score(model, ids, labels, weights)
    assert_ran("linear_logprob_partial", "linear_logprob_bwd")
    for name in ("loss", "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask"):
        a, b = getattr(actual, name), getattr(expected, name)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        assert (a.float() - b.float()).abs().max() <= FP32 * b.float().abs().clamp(min=1).max(), name
    assert (actual.log_probs[labels[:, 1:] == -100] == 0).all()
    assert (actual.entropy[labels[:, 1:] == -100] == 0).all()
    for name, grad in expected_grads.items():
        assert (grads[name] - grad).norm() <= FP32 * (grad.norm() + 1), name


def test_only_valid_positions_reach_the_head(monkeypatch):
    """On a CPU stock TRL projects every position, of padding and prompt too."""
    rows = []
    model = fused("qwen3")
    ids, labels = batch(keep=0.3)
    with patched():
        head = utils._ChunkedLogProbFunction
        apply = head.apply
        monkeypatch.setattr(head, "apply", lambda hidden, *rest: rows.append(len(hidden)) or apply(hidden, *rest))
        model(ids, labels=labels, fused_lm_head=True)
    assert rows == [(labels[:, 1:] != -100).sum()]


def test_unasked_outputs_are_none():
    model = fused("qwen3", outputs=("log_probs",))
    ids, labels = batch()
    with patched():
        out = model(ids, labels=labels, fused_lm_head=True)
    assert out.log_probs is not None
    assert out.entropy is out.log_sum_sq_probs is out.mean_logits is out.is_top1 is None


def test_no_valid_position_keeps_the_graph():
    model = fused("qwen3")
    ids, labels = batch(keep=-1.0)
    with patched():
        out, grads = score(model, ids, labels, torch.ones(2, 3, 8))
    assert out.loss == 0
    assert (out.log_probs == 0).all()
    assert (out.entropy == 0).all()
    assert grads
    assert all((g == 0).all() for g in grads.values())


def test_autocast_computes_in_its_dtype():
    model = fused("qwen3")
    ids, labels = batch()
    weights = torch.randn(2, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected, expected_grads = score(model, ids, labels, weights)
        with patched():
            actual, grads = score(model, ids, labels, weights)
    tolerance = tolerance_for(torch.bfloat16)
    assert actual.log_probs.dtype == torch.float32
    assert (actual.log_probs - expected.log_probs).abs().max() <= tolerance * expected.log_probs.abs().max()
    assert grads["lm_head.weight"].dtype == torch.float32
    for name, grad in expected_grads.items():
        assert (grads[name] - grad).norm() <= tolerance * (grad.norm() + 1), name


@pytest.mark.parametrize("code", [stock, patched])
def test_zero3_head_is_gathered_again_in_backward(code, monkeypatch):
    """The contract of `maybe_gather_lm_head_ctx`: outside of it a ZeRO-3 weight has no elements."""
    model = fused("qwen3")
    ids, labels = batch()
    weights = torch.randn(2, 3, 8)
    _, expected = score(model, ids, labels, weights)
    head, whole, entered = model.lm_head.weight, model.lm_head.weight.data, []

    @contextlib.contextmanager
    def gathered(*params):
        assert params[0] is head
        assert params[1] is None
        entered.append(params)
        head.data = whole
        yield
        head.data = whole.new_empty(0)

    def accumulate(grad):  # DeepSpeed's hooks make the parameter whole for the moment in which it takes its gradient
        assert head.numel() == 0, "outside of the context"
        head.data = whole

    monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", gathered)
    model.zero_grad(set_to_none=True)
    head.register_hook(accumulate)
    head.data = whole.new_empty(0)
    with code():
        out = model(ids, labels=labels, fused_lm_head=True)
    assert head.numel() == 0
    (out.log_probs * weights[0] + out.entropy * weights[1]).sum().backward()
    assert len(entered) == 2, "once in forward, once in backward"
    for name, p in model.named_parameters():
        assert (p.grad - expected[name]).norm() <= FP32 * (expected[name].norm() + 1), name


def test_a_head_left_sharded_is_named():
    with patched(), pytest.raises(ValueError, match="still sharded"):
        utils._ChunkedLogProbFunction.apply(
            torch.ones(2, 4), torch.empty(0), None, torch.zeros(2, dtype=torch.int64), 1.0, 32768, None, 1.0, ()
        )


# logits


@pytest.mark.parametrize("shape", [(4, 7), (2, 3, 7), (2, 2, 2, 7), (0, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits(shape, dtype):
    logits = torch.randn(shape, dtype=dtype, requires_grad=True)
    index = torch.randint(7, shape[:-1])
    mask = torch.rand(shape[:-1]) > 0.4
    # where the dtype is narrow TRL's own CPU path rounds every step to it: compared with fp32 from the same logits
    wide = logits.detach().float().requires_grad_()
    if wide.numel():
        expected = utils.selective_log_softmax_and_entropy(wide, index, temperature=0.7, row_mask=mask)
        only = utils.selective_log_softmax(wide, index, temperature=0.7)
        entropy = utils.entropy_from_logits(wide)
    else:
        expected, only, entropy = (wide.sum(-1), wide.sum(-1)), wide.sum(-1), wide.sum(-1)
    flashpo.stats(reset=True)
    with patched():
        actual = utils.selective_log_softmax_and_entropy(logits, index, temperature=0.7, row_mask=mask)
        assert_ran("selective_log_softmax_fwd")
        torch.testing.assert_close(utils.selective_log_softmax(logits, index, temperature=0.7), only)
        torch.testing.assert_close(utils.entropy_from_logits(logits), entropy)
        detached = utils.selective_log_softmax_and_entropy(logits, index, entropy_requires_grad=False)[1]
    assert not detached.requires_grad
    torch.testing.assert_close(actual, expected)
    weights = torch.randn(2, *shape[:-1])
    expected_grad, grad = (
        torch.autograd.grad((weights[0] * out[0] + weights[1] * out[1]).sum(), x)[0]
        for out, x in ((expected, wide), (actual, logits))
    )
    torch.testing.assert_close(grad, expected_grad.to(dtype))


def test_logits_where_triton_is_not_installed():
    """Then TRL's module has no `_fused_logprob_entropy`: it appears with the patch and goes with it."""
    code = """
import sys
sys.modules["triton"] = None
from transformers.utils import import_utils
import_utils._triton_available = False
import transformers.utils
transformers.utils.is_triton_available = import_utils.is_triton_available = lambda *args: False
import torch, trl.trainer.utils as utils, flashpo
from flashpo.trl import patched
assert not hasattr(utils, "_fused_logprob_entropy")
logits, index = torch.randn(3, 5, 9), torch.zeros(3, 5, dtype=torch.long)
expected = utils.selective_log_softmax(logits, index)
with patched():
    torch.testing.assert_close(utils.selective_log_softmax(logits, index), expected)
assert flashpo.stats()["selective_log_softmax_fwd"]
assert not hasattr(utils, "_fused_logprob_entropy") and not utils.is_triton_available()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("logits", "index"),
    [
        (torch.randn(2, 3, 7), torch.randint(7, (2, 3, 4))),  # the log-probs of K tokens a position
        (torch.randn(2, 3, 7, dtype=torch.float64), torch.randint(7, (2, 3))),
    ],
    ids=["index (..., K)", "float64"],
)
def test_what_we_do_not_take_stays_stock(logits, index):
    expected = utils.selective_log_softmax(logits, index)
    flashpo.stats(reset=True)
    with patched():
        actual = utils.selective_log_softmax(logits, index)
    assert not flashpo.stats()
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


def test_an_index_of_minus_100_still_raises():
    """Only `row_mask` masks in this function; a label that was forgotten there must not score 0 in silence."""
    with patched(), pytest.raises(ValueError, match="outside"):
        utils.selective_log_softmax(torch.randn(2, 7), torch.tensor([1, -100]))
