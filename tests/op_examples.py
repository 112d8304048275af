"""One small call of every public operator with its backward, for opcheck: each operator runs at least once."""

import torch
from decode_inputs import plant
from inputs import Case

from flashpo import (
    Lineage,
    gae,
    group_advantages,
    kv_append,
    linear_divergence,
    policy_loss,
    sample,
    selective_log_softmax,
    tree_attention,
    tree_conv,
    tree_recurrence,
)
from flashpo.ops.decode_layer import add_rms_norm, gated_activation, rope_append
from flashpo.ops.decode_step import decode_layers_
from flashpo.ops.packed_linear import pack_linear, packed_linear
from flashpo.ops.recurrence_step import recurrence_step


def scoring():
    for case in (Case("", (6,), None, 40), Case("", (6,), 8, 40, bias=True, ignored="some")):
        inputs, target = case.make()
        out = case.ours(case.cast(inputs, torch.float32), target)
        (out.logprob.sum() + out.entropy.sum()).backward()


def scoring_in_place():
    logits = torch.randn(4, 9, requires_grad=True)
    selective_log_softmax(logits, torch.zeros(4, dtype=torch.long), inplace_backward=True).logprob.sum().backward()


def distillation():
    heads = [torch.randn(*shape, requires_grad=True) for shape in ((6, 8), (40, 8), (6, 4), (40, 4))]
    target = torch.tensor([1, -100, 3, 4, 5, 39])
    linear_divergence(*heads, target, torch.randn(40, requires_grad=True), beta=0.4).divergence.sum().backward()


def policy():
    logprob, entropy = (torch.rand(3, 7).requires_grad_() for _ in range(2))
    old, ref, mask = torch.rand(3, 7), torch.rand(3, 7), torch.rand(3, 7) < 0.7
    options = dict(ref_logprob=ref, entropy=entropy, kl_coef=0.1, entropy_coef=0.1, top_entropy=0.5)
    (2 * policy_loss(logprob, old, torch.randn(3), mask, **options).loss).backward()


def advantages():
    group_advantages(torch.randn(8, 2), torch.arange(8) // 3, lengths=torch.arange(8) + 1)


def generalised_advantages():
    mask = torch.rand(3, 7) < 0.7
    gae(*torch.randn(2, 3, 7), mask, whiten=True)


def tree():
    q, k, v, sinks = (torch.randn(shape, requires_grad=True) for shape in ((9, 4, 8), (9, 2, 8), (9, 2, 8), (4,)))
    end, position = (
        torch.tensor(x, dtype=torch.int32) for x in ([9] * 4 + [6] * 2 + [9] * 3, [*range(6), *range(4, 7)])
    )
    tree_attention(q, k, v, end, position, sinks=sinks, softcap=5.0, window=4).sum().backward()


def recurrences():
    lineage = Lineage(torch.tensor([[0, 40], [40, 43], [43, 60]]), torch.tensor([-1, 0, 0]))
    for delta in (True, False):
        q, k, v, beta = (torch.rand(60, heads, 8, requires_grad=True) for heads in (2, 2, 4, 4))
        beta = beta[..., 0] if delta else None
        out, ends = tree_recurrence(q, k / 3, v, -torch.rand(60, 4), beta, lineage, ends=True)
        (out.sum() + ends.sum()).backward()
        q, k, v, beta = (None if x is None else x.detach()[:7] for x in (q, k, v, beta))
        recurrence_step(q.new_zeros(7, 4, 8, 8), q, k, v, -v[..., 0], beta)
    x, weight = torch.randn(60, 5, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    tree_conv(x, weight, torch.randn(5), lineage).sum().backward()


def decoding():
    plant([(70, 3, 4), 5], sinks=torch.randn(4)).ours(torch.float32)
    kv_append(
        torch.randn(3, 2, 16),
        torch.randn(3, 2, 8),
        torch.randn(2, 2, 16, 64),
        torch.randn(2, 2, 64, 8),
        torch.arange(-1, 2),
    )


def decoder_layer():
    x, angle = torch.randn(3, 16), torch.rand(3, 4)
    add_rms_norm(x, x, torch.randn(16), eps=1e-5)
    gated_activation(x, x)
    caches = torch.randn(2, 1, 4, 64), torch.randn(2, 1, 64, 4)
    rope_append(
        x[:, :8],
        x[:, 8:12],
        x[:, 12:],
        angle.cos(),
        angle.sin(),
        *caches,
        torch.arange(-1, 2),
        q_weight=angle[0],
        k_weight=angle[1],
    )


def packing():
    packed_linear(torch.randn(3, 16), pack_linear(torch.randn(50, 16)), torch.randn(50), columns=50)


def decoder_layers_at_once():
    x, table = torch.randn(2, 4), torch.arange(2, dtype=torch.int32)
    weights = [pack_linear(torch.randn(4, 4)) for _ in range(14)]
    options = [x[0], x[0], None, None] * 2, [1e-5] * 6, weights, [None] * 14, "silu", x, x
    caches = [torch.randn(3, 1, 4, 64) for _ in range(2)], [torch.randn(3, 1, 64, 4) for _ in range(2)]
    tables = torch.stack((table, table + 1), 1), table, table * 0 + 1, table[:, None] + 1, table
    decode_layers_(x, x, *options, *caches, table.long() * 64 + 64, *tables, 0.5, [0, 1])


def sampling():
    temperature, top_k = torch.tensor([0.0, 0.7, 1.0]), torch.tensor([0, 5, 3])
    sample(torch.randn(3, 40), temperature=temperature, top_k=top_k, top_p=0.9, min_p=0.01, seed=1, offset=top_k)


EXAMPLES = [
    decoder_layer,
    scoring,
    scoring_in_place,
    distillation,
    policy,
    advantages,
    generalised_advantages,
    tree,
    recurrences,
    decoding,
    packing,
    decoder_layers_at_once,
    sampling,
]


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "flashpo":
            copies = tuple(x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args)
            self.calls.setdefault(func._opname, copies)
        return func(*args, **(kwargs or {}))
