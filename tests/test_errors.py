"""Wrong input raises a TypeError or ValueError that names the argument. Nothing is clamped or ignored."""

import pytest
import torch
from inputs import backends

import flashpo
from flashpo import linear_logprob, selective_log_softmax
from flashpo._op import OPS
from flashpo.ops import decode_step  # noqa: F401  # registers decode_layers_
from flashpo.ops.decode_layer import rope_append
from flashpo.ops.packed_linear import pack_linear
from flashpo.ops.recurrence_step import recurrence_step
from flashpo.packing import split_by_tokens

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
        ("outputs must be a tuple", {"outputs": None}),
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


ones, rows, lengths = torch.ones(2, 3), torch.zeros(2, 3), torch.tensor([1, 2])
ids, decoded = torch.ones(2, 3, dtype=torch.int64), torch.zeros(1, 1, 8)
caches, table = (torch.zeros(2, 1, 8, 64), torch.zeros(2, 1, 64, 8)), torch.zeros(1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("x must be a torch.Tensor, got list", lambda: flashpo.masked_quantile([1.0], ones, 0.5)),
        ("mask must be a torch.Tensor", lambda: flashpo.masked_quantile(rows, None, 0.5)),
        ("quantiles must be a number, got str", lambda: flashpo.masked_quantile(rows, ones, "0.5")),
        ("quantiles must have at least one number", lambda: flashpo.masked_quantile(rows, ones, ())),
        ("old_logprob must have the shape", lambda: flashpo.ratio_quantiles(rows, rows[:, :1], ones)),
        ("old_logprob must be a torch.Tensor", lambda: flashpo.ratio_quantiles(rows, None, ones)),
        ("lengths must be a torch.Tensor", lambda: flashpo.overlong_penalty([1, 2], 10, 3)),
        ("max_length must be a number", lambda: flashpo.overlong_penalty(lengths, "10", 3)),
        ("factor must be positive", lambda: flashpo.overlong_penalty(lengths, 10, 3, factor=-1.0)),
        ("floor must not be positive", lambda: flashpo.overlong_penalty(lengths, 10, 3, floor=1.0)),
        ("rejected must be a torch.Tensor", lambda: flashpo.preference_loss(rows[0], None)),
        ("loss must be a name or a sequence", lambda: flashpo.preference_loss(rows[0], rows[0], loss=3)),
        ("loss_weights must be a sequence", lambda: flashpo.preference_loss(rows[0], rows[0], loss_weights=1.0)),
        ("ld_alpha must be a number", lambda: flashpo.sequence_logprobs(rows, ones, ld_alpha="1")),
        ("reward_weights must be 1 numbers", lambda: flashpo.group_advantages(rows[0], ids[0], reward_weights=1.0)),
        ("min_saved must be an integer", lambda: flashpo.pack(ids, ones, ones[:, 1:], min_saved=-1)),
        ("max_tokens must be an integer", lambda: split_by_tokens(ids, ones, ones[:, 1:], None)),
        ("k must be a torch.Tensor", lambda: flashpo.kv_append([1.0], decoded, *caches, ids[0, :1])),
        ("slot must be a torch.Tensor", lambda: flashpo.kv_append(decoded, decoded, *caches, [64])),
        ("q must be a torch.Tensor", lambda: flashpo.decode_attention([1.0], *caches, *[table] * 5, scale=1.0)),
        (r"rows must be \(2,\)", lambda: flashpo.decode_attention(decoded, *caches, *[table[0]] * 5, scale=1.0)),
    ],
)
def test_other_operators(message, call):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


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


def overlapping(x):
    """Tensors of x's shape of which elements share memory: all along one dimension, or neighbours."""
    for dim, size in enumerate(x.shape):
        if size > 1:
            yield x.narrow(dim, 0, 1).expand(x.shape)
    yield torch.randn(x.numel()).as_strided(x.shape, [1] * x.dim())


def append(k_cache=None, v_cache=None):
    given = [y if x is None else x for x, y in zip((k_cache, v_cache), caches)]
    flashpo.kv_append(torch.zeros(1, 1, 8), torch.zeros(1, 1, 8), *given, torch.zeros(1, dtype=torch.int64))


def rotate(k_cache=None, v_cache=None):
    given = [y if x is None else x for x, y in zip((k_cache, v_cache), caches)]
    x, slot = torch.zeros(1, 8), torch.zeros(1, dtype=torch.int64)
    rope_append(x, x, x, x, x, *given, slot)


def advance(state):
    q, v, decay = torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), torch.zeros(1, 2)
    recurrence_step(state, q, q, v, decay, None)


WRITTEN = {  # operator -> its arguments that are written over -> (a right value, the public call)
    "selective_log_softmax_bwd_": {
        "logits": (logits, lambda logits: selective_log_softmax(logits, target, inplace_backward=True))
    },
    "kv_append_": {
        "k_cache": (caches[0], lambda k_cache: append(k_cache=k_cache)),
        "v_cache": (caches[1], lambda v_cache: append(v_cache=v_cache)),
    },
    "rope_append_": {
        "k_cache": (caches[0], lambda k_cache: rotate(k_cache=k_cache)),
        "v_cache": (caches[1], lambda v_cache: rotate(v_cache=v_cache)),
    },
    "recurrence_step_": {"state": (torch.zeros(1, 2, 3, 4), advance)},
    "pack_linear_": {"out": (torch.zeros(1, 8, 48), lambda out: pack_linear(weight, out=out))},
    "gae_whiten_": {},  # gae's own tensor
    "decode_layers_": {},  # the rollout engine's own caches
}


@pytest.mark.parametrize("name", WRITTEN)
def test_memory_that_is_written_over_is_nobody_elses(name):
    """Two elements at one address cannot both get their values: refused, not written."""
    for argument, (right, call) in WRITTEN[name].items():
        call(right)
        for wrong in overlapping(right):
            with pytest.raises(ValueError, match=f"{argument} "):
                call(wrong)


def test_every_operator_that_writes_over_an_argument_is_here():
    schemas = {name: op.overload._schema for name, op in OPS.items()}
    assert set(WRITTEN) == {name for name, schema in schemas.items() if schema.is_mutable}


@pytest.mark.parametrize("shape", [(3, 20), (2, 3, 20)])
def test_parts_of_tensors_can_be_written_over(shape):
    """Without a copy: no two elements of them lie at one address."""
    whole = torch.randn(*shape[:-1], 2 * shape[-1])
    where = torch.zeros(shape[:-1], dtype=torch.int64)
    whole = torch.cat([whole, whole])
    parts = (whole[: shape[0], ..., : shape[-1]], whole[::2, ..., ::2], whole.mT.contiguous().mT[: shape[0], ..., 20:])
    for part in parts:
        x = part.clone().requires_grad_()
        (expected,) = torch.autograd.grad(selective_log_softmax(x, where[: len(x)]).logprob.sum(), x)
        logits = part.detach().requires_grad_()
        out = selective_log_softmax(logits, where[: len(x)], inplace_backward=True)
        (grad,) = torch.autograd.grad(out.logprob.sum(), logits)
        torch.testing.assert_close(grad, expected)


def test_forbidden_tokens_have_finite_neighbours():
    """TRL#7221: -inf logits, the target's among them."""
    x = torch.randn(4, 50, requires_grad=True)
    masked = x.masked_fill(torch.rand(4, 50) < 0.5, -torch.inf)
    masked = masked.index_fill(1, torch.tensor([7]), 0.5)
    out = selective_log_softmax(masked, torch.full((4,), 7))
    (out.logprob + out.entropy).sum().backward()
    assert out.logprob.isfinite().all()
    assert out.entropy.isfinite().all()
    assert x.grad.isfinite().all()
    assert selective_log_softmax(torch.tensor([[-torch.inf, 0.0]]), torch.tensor([0])).logprob == -torch.inf
