"""Recurrences of token trees by kernels with flash-linear-attention's interface. Its own kernels need a GPU."""

import inspect
import itertools

import pytest
import torch
from test_tree_recurrence import SCALE, lineage_of, make_inputs, make_tree

from flashpo import _recurrent, tree_recurrence
from flashpo.ops import _fla as fla


def chunk(q, k, v, g, beta=None, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None):
    """Rows one behind the other in a batch of one, token by token."""
    q, k = (x[0].repeat_interleave(v.shape[2] // q.shape[2], 1) for x in (q, k))
    outs, ends = [], []
    for row, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        state = v.new_zeros(v.shape[2], q.shape[2], v.shape[3]) if initial_state is None else initial_state[row]
        for t in range(begin, end):
            state = state * g[0, t].exp().reshape(v.shape[2], -1, 1)
            u = v[0, t]
            if beta is not None:
                u = beta[0, t, :, None] * (u - torch.einsum("hkv,hk->hv", state, k[t]))
            state = state + k[t][..., None] * u[:, None]
            outs.append(scale * torch.einsum("hkv,hk->hv", state, q[t]))
        ends.append(state)
    return torch.stack(outs)[None], torch.stack(ends)


def same_heads(*args, **options):
    assert args[0].shape[2] == args[2].shape[2]
    return chunk(*args, **options)


@pytest.fixture
def kernels(monkeypatch):
    found = fla.Kernels(delta=chunk, delta_of_features=same_heads, gated=same_heads)
    monkeypatch.setattr(fla, "kernels", lambda: found)


@pytest.mark.parametrize("kind", ["delta", "delta of features", "gated"])
def test_a_tree_is_a_batch_of_rows_for_each_depth(kind, kernels):
    """Values, final states and gradients. Branches that start from one state add up."""
    tree = make_tree()
    inputs = make_inputs(len(tree.tokens), per_feature=kind == "delta of features", delta=kind != "gated")
    lineage, leaves = lineage_of(tree), [x for x in inputs if x is not None]
    results = []
    for recurrence in (fla.tree_recurrence, tree_recurrence):
        torch.manual_seed(0)
        out, ends = recurrence(*inputs, lineage, scale=SCALE, ends=True)
        loss = (out * torch.randn_like(out)).sum() + (ends * torch.randn_like(ends)).sum()
        results.append([out, ends, *torch.autograd.grad(loss, leaves)])
    for ours, exact in zip(*results):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)


def test_it_is_used_where_it_runs(kernels, monkeypatch):
    """On GPUs; here the question for the device is left out."""
    assert not fla.runs(torch.zeros(1))
    monkeypatch.setattr(fla, "runs", lambda x: True)
    calls = []
    monkeypatch.setattr(fla, "tree_recurrence", lambda *args, **options: calls.append(args) or (args[2], None))
    lineage = lineage_of(make_tree())
    q, k, v, decay, beta = (x.detach().bfloat16()[None] for x in make_inputs(lineage.tokens))
    out, _ = _recurrent._delta_rule(lineage, q, k, v, decay, beta)
    assert out.dtype == torch.bfloat16
    assert [x.dtype for x in calls[0][:5]] == [torch.bfloat16] * 3 + [torch.float32] * 2


def test_an_unknown_one_is_left_alone(monkeypatch):
    monkeypatch.setattr(fla.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(fla.importlib, "import_module", lambda name: inspect.getmodule(chunk))
    fla.kernels.cache_clear()
    assert fla.why_not().startswith("flash-linear-attention has no chunk_gated_delta_rule")
    fla.kernels.cache_clear()


def test_its_own_functions_are_known():
    pytest.importorskip("fla")
    assert isinstance(fla.kernels(), fla.Kernels)
