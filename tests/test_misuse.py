"""Wrong values for every argument of every operator raise our own TypeError or ValueError that names the argument."""

import re
import traceback
from pathlib import Path

import pytest
import torch

import flashpo

NAN, INF = float("nan"), float("inf")
PACKAGE = str(Path(flashpo.__file__).parent)
COMPLEX = torch.complex64


def no_tensors(_):
    return [[1.0], "text", 3, {}]


def unusual(x):
    """Tensors that no kernel can read by strides, and one elsewhere."""
    nested = [torch.nested.nested_tensor([x.flatten(), x.flatten()], layout=layout) for layout in LAYOUTS]
    return [x.to_sparse(), *nested, x.to("meta")]


def dtypes(*wrong):
    return lambda x: [x.to(dtype) for dtype in wrong]


def other_rank(x):
    return [x[None, None]]


LAYOUTS = (torch.strided, torch.jagged)
TENSOR = (no_tensors, unusual, other_rank)
FLOAT = (*TENSOR, dtypes(torch.int64, torch.bool, COMPLEX))
SAME = (*FLOAT, dtypes(torch.float64, torch.bfloat16))  # also of another argument's dtype
ANY_SHAPE = (no_tensors, unusual, dtypes(torch.int64, torch.bool, COMPLEX))
INT64 = (*TENSOR, dtypes(torch.int32, torch.float32, torch.bool))
INT32 = (*TENSOR, dtypes(torch.int64, torch.float32, torch.bool))
INDEX = (*TENSOR, dtypes(torch.int16, torch.float32, torch.bool))
MASK = (*TENSOR, dtypes(torch.float32, COMPLEX))
LIVE = TENSOR  # a mask of any dtype
BOOL = (*TENSOR, dtypes(torch.float32, torch.int64))
COUNT = (*TENSOR, dtypes(torch.bool, COMPLEX))
COUNT_ANY_SHAPE = (no_tensors, lambda x: unusual(x)[:3], dtypes(torch.bool, COMPLEX))


def values(*wrong):
    return (lambda _: list(wrong),)


NUMBER = values("1", True, {}, 1j, NAN, INF, -INF, 10**400)
POSITIVE = (*NUMBER, *values(0, -1.0))
SHARE = (*NUMBER, *values(-0.1, 1.1))
INT = values("1", True, 1.5, [1], 2**63, -(2**70))
COUNTED = (*INT, *values(-1))
FLAG = values(1, 0, "yes", [], torch.tensor(True))
CHOICE = values(3, "nonsense", ["mean"], torch.ones(1))
NAMES = values("entropy", 3, ("nonsense",), (3,))
GROUP = values("world", 3, [0])
LINEAGE = values(None, "tree", 3, torch.zeros(1, 2), flashpo.Lineage(torch.tensor([[0, 9]]), torch.tensor([-1])))
SCALAR_TENSOR = (lambda x: [x.expand(2), *unusual(x)[:3]],)
NONE = values(None)  # where it is no default
FROZEN = (lambda x: [x.clone().requires_grad_()],)  # of an operator without a gradient

B, T, V, H, N = 2, 3, 5, 4, 6
rows, ones = -torch.rand(B, T), torch.ones(B, T, dtype=torch.bool)
flat, cu = -torch.rand(N), torch.tensor([0, 2, N])
pairs, lengths = -torch.rand(B), torch.tensor([3, 4])
ids = torch.tensor([0, 4])
logits, hidden, weight = torch.randn(B, V), torch.randn(B, H), torch.randn(V, H)
q, kv = torch.randn(B, 2, 8), torch.randn(B, 1, 8)
end, position = torch.full((B,), B, dtype=torch.int32), torch.arange(B, dtype=torch.int32)
k_cache, v_cache = torch.zeros(2, 1, 8, 64), torch.zeros(2, 1, 64, 8)
table = torch.tensor([0], dtype=torch.int32)
tables = {
    "rows": torch.tensor([[0, 2]], dtype=torch.int32),
    "start": table,
    "length": table + 2,
    "blocks": table[:, None],
    "position": position,
}
lineage = flashpo.Lineage(torch.tensor([[0, B]]), torch.tensor([-1]))
input_ids, attention = torch.ones(B, T, dtype=torch.long), torch.ones(B, T, dtype=torch.long)

# operator -> argument -> (a right value, what is wrong)
MISUSE = {
    "selective_log_softmax": {
        "logits": (logits, FLOAT, NONE),
        "index": (ids, INT64, NONE),
        "temperature": (1.0, POSITIVE, NONE),
        "ignore_index": (-100, INT, NONE),
        "outputs": (("entropy",), NAMES, NONE),
        "inplace_backward": (False, FLAG, NONE),
    },
    "linear_logprob": {
        "hidden": (hidden, FLOAT, NONE),
        "weight": (weight, FLOAT, NONE),
        "target": (ids, INT64, NONE),
        "bias": (torch.randn(V), FLOAT),
        "temperature": (torch.ones(B), FLOAT[1:], POSITIVE, NONE),
        "logit_scale": (1.0, POSITIVE, NONE),
        "softcap": (2.0, POSITIVE),
        "ignore_index": (-100, INT, NONE),
        "outputs": (("entropy",), NAMES, NONE),
        "group": (None, GROUP),
    },
    "linear_divergence": {
        "student_hidden": (hidden, FLOAT, NONE),
        "student_weight": (weight, FLOAT, NONE),
        "teacher_hidden": (torch.randn(B, H + 2), FLOAT, NONE),
        "teacher_weight": (torch.randn(V, H + 2), FLOAT, NONE),
        "target": (ids, INT64, NONE),
        "student_bias": (torch.randn(V), FLOAT),
        "teacher_bias": (torch.randn(V), FLOAT),
        "beta": (0.3, SHARE, NONE),
        "temperature": (1.0, POSITIVE, values(torch.ones(B)), NONE),
        "student_logit_scale": (1.0, POSITIVE, NONE),
        "teacher_logit_scale": (1.0, POSITIVE, NONE),
        "student_softcap": (2.0, POSITIVE),
        "teacher_softcap": (2.0, POSITIVE),
        "ignore_index": (-100, INT, NONE),
        "outputs": (("entropy", "is_top1_agreed"), NAMES, NONE),
        "group": (None, GROUP),
    },
    "divergence": {
        "student_logits": (logits, FLOAT, NONE),
        "teacher_logits": (torch.randn(B, V), FLOAT, NONE),
        "target": (ids, INT64, NONE),
        "beta": (0.3, SHARE, NONE),
        "temperature": (1.0, POSITIVE, values(torch.ones(B)), NONE),
        "ignore_index": (-100, INT, NONE),
        "outputs": (("entropy", "is_top1_agreed"), NAMES, NONE),
    },
    "topk_divergence": {
        "student_logits": (logits, FLOAT, NONE),
        "indices": (torch.tensor([[0, 3], [2, -100]]), INT64, NONE),
        "teacher_logprobs": (torch.randn(B, V).log_softmax(-1)[:, :2], FLOAT, NONE),
        "beta": (0.3, SHARE, NONE),
        "temperature": (1.0, POSITIVE, values(torch.ones(B)), NONE),
        "ignore_index": (-100, INT, NONE),
    },
    "policy_loss": {
        "logprob": (rows, SAME, NONE),
        "old_logprob": (rows, SAME),
        "advantage": (torch.ones(B), SAME, NONE),
        "mask": (ones, MASK, NONE),
        "loss": ("ppo", values(3, "nonsense", "{", "{'a': 1}", ["ppo"]), NONE),
        "cu_seqlens": (None, (lambda _: [[0, 2], cu.float(), cu.int(), cu[None], cu.to_sparse(), 3],)),
        "ref_logprob": (rows, SAME, NONE),
        "rollout_logprob": (rows, SAME),
        "importance_ratio": (torch.ones(B, T), SAME),
        "entropy": (rows, SAME),
        "entropy_group": (None, GROUP),
        "num_items": (torch.tensor(4.0), SCALAR_TENSOR, (*NUMBER, *values(-1))),
        "scale": (1.0, NUMBER, NONE),
        "kl_coef": (0.1, values("1", [1.0], NAN, INF, True), NONE),
        "kl_ratio_correction": (False, values("1", 1, 0.5), NONE),
        "clip_low": (0.2, values("1", True, NAN, -1.0), NONE),
        "top_entropy": (1.0, values("1", True, 0.0, 1.5), NONE),
        "aggregation": ("token_mean", CHOICE, NONE),
    },
    "value_loss": {
        "values": (rows, FLOAT, NONE),
        "old_values": (rows, FLOAT, NONE),
        "returns": (rows, FLOAT, NONE),
        "mask": (ones, MASK, NONE),
        "clip": (0.2, POSITIVE),
        "num_items": (torch.tensor(4.0), SCALAR_TENSOR, POSITIVE),
    },
    "gae": {
        "rewards": (rows, FLOAT, NONE),
        "values": (rows, FLOAT, NONE),
        "mask": (ones, MASK, NONE),
        "gamma": (1.0, SHARE, NONE),
        "lam": (1.0, SHARE, NONE),
        "whiten": (True, FLAG, NONE),
        "cu_seqlens": (None, (lambda _: [[0, 2], 3, cu.to_sparse()],)),
        "group": (None, GROUP),
    },
    "group_advantages": {
        "rewards": (torch.rand(B, 2), FLOAT, NONE),
        "group": (ids, INT64, NONE),
        "baseline": ("mean", CHOICE, NONE),
        "scale": ("group", CHOICE, NONE),
        "reward_weights": ((1.0, 1.0), values(1.0, "11", (1.0,), (1.0, "1"), (1.0, NAN), (1.0, True), (1.0, 10**400))),
        "aggregation": ("sum_then_normalize", CHOICE, NONE),
        "convention": ("trl", CHOICE, NONE),
        "lengths": (lengths, INT64),
        "process_group": (None, GROUP),
    },
    "preference_loss": {
        "chosen": (pairs, FLOAT, NONE),
        "rejected": (pairs, FLOAT, NONE),
        "ref_chosen": (pairs, FLOAT, NONE),
        "ref_rejected": (pairs, FLOAT, NONE),
        "loss": (("cdpo", "ipo"), values(3, "nonsense", ("nonsense",), (3,), (["ipo"],), ()), NONE),
        "loss_weights": ((1.0, 1.0), values(1.0, "11", (1.0,), (1.0, "1"), (1.0, NAN), (True, 1.0), (1.0, 10**400))),
        "beta": (0.1, POSITIVE, NONE),
        "label_smoothing": (0.1, NUMBER, values(0.5, -0.1), NONE),
        "chosen_length": (lengths, COUNT, NONE),
        "rejected_length": (lengths, COUNT, NONE),
        "pair_weight": (pairs, FLOAT),
        "f_divergence": ("reverse_kl", CHOICE, NONE),
        "f_alpha": (0.5, NUMBER, NONE),
        "gamma": (0.5, NUMBER, NONE),
        "discopop_tau": (0.05, POSITIVE, NONE),
        "sft": (None, values(pairs)),
        "sft_length": (None, values(lengths)),
    },
    "kto_loss": {
        "logprob": (pairs, FLOAT, NONE),
        "ref_logprob": (pairs, FLOAT, NONE),
        "desirable": (ids > 0, BOOL, NONE),
        "loss": ("kto", CHOICE, NONE),
        "beta": (0.1, POSITIVE, NONE),
        "kl": (pairs, ANY_SHAPE, NONE),
        "desirable_weight": (1.0, POSITIVE, NONE),
        "undesirable_weight": (1.0, POSITIVE, NONE),
    },
    "direct_advantage_loss": {
        "logprob": (pairs, FLOAT, NONE),
        "ref_logprob": (pairs, FLOAT, NONE),
        "advantage": (pairs, FLOAT, NONE),
        "beta": (0.1, POSITIVE, NONE),
    },
    "sequence_logprobs": {
        "logprob": (flat, FLOAT, NONE),
        "mask": (flat < 1, LIVE, NONE),
        "cu_seqlens": (cu, INDEX),
        "ld_alpha": (0.5, SHARE),
        "log_sum_sq_probs": (flat, FLOAT),
    },
    "masked_quantile": {
        "x": (rows, FLOAT, NONE),
        "mask": (ones, LIVE, NONE),
        "quantiles": (0.5, SHARE, values(()), NONE),
        "group": (None, GROUP),
    },
    "entropy_threshold": {
        "entropy": (rows, FLOAT, NONE),
        "mask": (ones, LIVE, NONE),
        "quantile": (0.5, SHARE, values((), (0.5,)), NONE),
        "group": (None, GROUP),
    },
    "ratio_quantiles": {
        "logprob": (rows, FLOAT, NONE),
        "old_logprob": (rows, FLOAT, NONE),
        "mask": (ones, LIVE, NONE),
        "quantiles": (0.5, SHARE, values(()), NONE),
        "group": (None, GROUP),
    },
    "overlong_penalty": {
        "lengths": (lengths, COUNT_ANY_SHAPE, NONE),
        "max_length": (10, NUMBER, NONE),
        "buffer": (4, NUMBER, values(0, 11), NONE),
        "factor": (1.0, POSITIVE, NONE),
        "floor": (-1.0, NUMBER, values(1.0)),
    },
    "sample": {
        "logits": (logits, FLOAT, NONE),
        "temperature": (torch.ones(B), FLOAT[1:], NUMBER, values(-1.0, 1e-40, 1e39), NONE),
        "top_k": (torch.ones(B, dtype=torch.long), INDEX[1:], COUNTED, NONE),
        "top_p": (torch.ones(B), FLOAT[1:], SHARE, NONE),
        "min_p": (torch.ones(B), FLOAT[1:], SHARE, NONE),
        "seed": (ids, INT64[1:], INT, NONE),
        "offset": (ids, INT64[1:], INT, NONE),
    },
    "tree_attention": {
        "q": (q, SAME, NONE),
        "k": (kv, SAME, NONE),
        "v": (kv, SAME, NONE),
        "end": (end, INT32, NONE),
        "position": (position, INT32, NONE),
        "scale": (1.0, POSITIVE),
        "window": (0, COUNTED, NONE),
        "softcap": (0.0, NUMBER, values(-1.0), NONE),
        "sinks": (torch.zeros(2), FLOAT),
    },
    "tree_recurrence": {
        "q": (q, SAME, NONE),
        "k": (q.clone(), SAME, NONE),
        "v": (q.clone(), SAME, NONE),
        "decay": (-torch.rand(B, 2), FLOAT, NONE),
        "beta": (torch.rand(B, 2), FLOAT),
        "lineage": (lineage, LINEAGE),
        "scale": (1.0, POSITIVE, NONE),
        "ends": (True, FLAG, NONE),
    },
    "tree_conv": {
        "x": (logits, FLOAT, NONE),
        "weight": (torch.randn(V, 3), FLOAT, NONE),
        "bias": (torch.randn(V), FLOAT),
        "lineage": (lineage, LINEAGE),
    },
    "decode_attention": {
        "q": (q, SAME, NONE, FROZEN),
        "k_cache": (k_cache, SAME, NONE, FROZEN),
        "v_cache": (v_cache, SAME, NONE, FROZEN),
        **{name: (x, INT32, NONE) for name, x in tables.items()},
        "scale": (1.0, POSITIVE, NONE),
        "window": (0, COUNTED, NONE),
        "softcap": (0.0, NUMBER, values(-1.0), NONE),
        "sinks": (torch.zeros(2), FLOAT, FROZEN),
    },
    "kv_append": {
        "k": (kv, SAME, NONE, FROZEN),
        "v": (kv, SAME, NONE, FROZEN),
        "k_cache": (k_cache, SAME, NONE, FROZEN),
        "v_cache": (v_cache, SAME, NONE, FROZEN),
        "slot": (ids, INT64, NONE),
    },
    "pack": {
        "input_ids": (input_ids, INT64, NONE),
        "attention_mask": (attention, TENSOR, NONE),
        "completion_mask": (torch.ones(B, T - 1, dtype=torch.long), TENSOR, NONE),
        "prune": (True, FLAG, NONE),
    },
}


def test_every_operator_is_here():
    public = {name for name in flashpo.ops.__all__ if name.islower()}
    assert set(MISUSE) == public | {"pack"}


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, arguments in MISUSE.items() for name in arguments])
@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_misuse(op, name):
    good = {argument: value for argument, (value, *_) in MISUSE[op].items()}
    getattr(flashpo, op)(**good)
    value, *wrong = MISUSE[op][name]
    for bad in (each for some in wrong for kind in some for each in kind(value)):
        shown = f"a {bad.layout} {bad.dtype} {bad.device} tensor" if isinstance(bad, torch.Tensor) else repr(bad)
        with pytest.raises((TypeError, ValueError)) as raised:
            pytest.fail(f"{op}({name}={shown}) gave {getattr(flashpo, op)(**(good | {name: bad}))}")
        assert re.search(rf"\b{name}\b", str(raised.value)), f"{shown}: {raised.value}"
        assert traceback.extract_tb(raised.value.__traceback__)[-1].filename.startswith(PACKAGE), f"{shown}: {raised}"
