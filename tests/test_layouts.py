"""Arguments with any strides, with one column or without rows give the same results as dense tensors."""

import pytest
import torch
from inputs import backends
from test_misuse import MISUSE

import flashpo

RIGHT = {
    op: {name: x.clone() if isinstance(x, torch.Tensor) else x for name, (x, *_) in arguments.items()}
    for op, arguments in MISUSE.items()
}
DENSE = {"k_cache", "v_cache"}  # documented so
TWO_HEADS = {f"{of}_{name}" for of in ("student", "teacher") for name in ("weight", "bias")}
OF_SOME_TOKENS = {"pack", "tree_recurrence", "tree_conv"}
WHOLE = {*DENSE, "weight", "bias", *TWO_HEADS, "sinks", "num_items", "kl"}  # not of the batch's rows
DIFFERENTIABLE = {
    "selective_log_softmax": {"logits"},
    "linear_logprob": {"hidden", "weight", "bias"},
    "linear_divergence": {"student_hidden", "student_weight", "student_bias"},
    "divergence": {"student_logits"},
    "topk_divergence": {"student_logits"},
    "policy_loss": {"logprob", "entropy"},
    "value_loss": {"values"},
    "tree_attention": {"q", "k", "v", "sinks"},
    "tree_recurrence": {"q", "k", "v", "decay", "beta"},
    "tree_conv": {"x", "weight", "bias"},
    "preference_loss": {"chosen", "rejected"},
    "sequence_logprobs": {"logprob"},
}


def tensors_of(arguments):
    return {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor) and name not in DENSE}


def changed(arguments, change, names=None):
    names = tensors_of(arguments) if names is None else names
    return arguments | {name: change(arguments[name]) for name in names}


def flat(arguments):
    """Three sequences of none, two and four tokens."""
    return changed(arguments, torch.Tensor.flatten) | {"cu_seqlens": torch.tensor([0, 0, 2, 6])}


def one_column(arguments):
    return changed(arguments, lambda x: x[:, :1] if x.dim() == 2 else x)


def no_rows(arguments):
    none = changed(arguments, lambda x: x[:0], set(tensors_of(arguments)) - WHOLE)
    return none if none.get("cu_seqlens") is None else none | {"cu_seqlens": torch.tensor([0])}


policy = RIGHT["policy_loss"]
float64 = changed(policy, lambda x: x.double() if x.is_floating_point() else x)
CASES = {
    **RIGHT,
    "policy_loss float64": float64,
    "policy_loss flat": flat(policy) | {"advantage": torch.ones(3)},
    "policy_loss flat float64": flat(float64) | {"advantage": torch.ones(3).double()},
    "gae flat": flat(RIGHT["gae"]),
}
CASES |= {f"{name} without rows": no_rows(case) for name, case in CASES.items() if name not in OF_SOME_TOKENS}
for name in ("policy_loss", "policy_loss float64", "gae", "value_loss", "masked_quantile"):
    CASES[f"{name} of one column"] = one_column(CASES[name])
logits = {"logits": torch.randn(2, 1), "index": torch.zeros(2, dtype=torch.long)}
CASES["selective_log_softmax of one column"] = RIGHT["selective_log_softmax"] | logits
CASES["sample of one column"] = RIGHT["sample"] | {"logits": torch.randn(2, 1)}


def spread(x):
    """The same values, two elements apart along every dimension."""
    return x.new_zeros([2 * size for size in x.shape])[tuple(slice(None, None, 2) for _ in x.shape)].copy_(x)


def turned(x):
    return spread(x.mT.contiguous()).mT if x.dim() > 1 else spread(x)


def flatten(result):
    if isinstance(result, tuple):
        return [y for x in result for y in flatten(x)]
    return [result.values] if isinstance(result, flashpo.PolicyStats) else [result]


def run(op, arguments):
    """What the operator returns, and the gradients of everything that has one."""
    arguments = changed(arguments, torch.Tensor.clone, DENSE & set(arguments))
    leaves = [arguments[name].requires_grad_() for name in DIFFERENTIABLE.get(op, ()) if arguments[name] is not None]
    found = [x for x in flatten(getattr(flashpo, op)(**arguments)) if isinstance(x, torch.Tensor)]
    grads = ()
    if leaves:
        grads = torch.autograd.grad(sum(x.double().sum() for x in found if x.requires_grad), leaves, allow_unused=True)
    for x in leaves:
        x.requires_grad_(False)
    if op == "kv_append":
        found = [arguments[name] for name in DENSE]
    return [x.detach() for x in (*found, *grads) if x is not None]


def memory_of(tensors):
    return {x.untyped_storage().data_ptr() for x in tensors if x.numel() > 0}


@pytest.mark.parametrize("op", RIGHT)
@pytest.mark.parametrize("grad", [True, False])
def test_results_are_not_arguments(op, grad):
    """Nor do two results that could be written over share a number: each call's are the caller's own."""
    arguments = RIGHT[op]
    with torch.set_grad_enabled(grad):
        found = [x for x in flatten(getattr(flashpo, op)(**arguments)) if isinstance(x, torch.Tensor)]
    assert not memory_of(found) & memory_of(tensors_of(arguments).values())
    before = [x.clone() for x in found]
    for i, x in enumerate(found):
        x.detach().zero_()
        assert all(torch.equal(y, z) for y, z in zip(found[i + 1 :], before[i + 1 :]))


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("case", CASES)
def test_layouts(case, backend):
    op, arguments = case.split()[0], CASES[case]
    given = tensors_of(arguments)
    with flashpo.backend(backend):
        try:
            expected = run(op, arguments)
        except NotImplementedError as error:  # an operator, or float64, that this backend does not have
            pytest.skip(str(error))
        for layout, names in [*((spread, [name]) for name in given), (spread, given), (turned, given)]:
            got = run(op, changed(arguments, layout, names))
            for x, y in zip(got, expected, strict=True):
                torch.testing.assert_close(x, y, equal_nan=True, msg=lambda text, n=names: f"{[*n]}: {text}")
