"""Random architectures, adapters, batches, sampling and losses against plain forwards and autograd in float64.

In the test suite the runs are short and draw the same values each time. `make fuzz` runs longer and draws new ones. A
failure prints a line `@reproduce_failure` or the drawn values: keep them as an `@example` of the test.

Each check has a negative control: a deliberate mistake that it has to find in nearly every draw.
"""

import os
import random

import pytest
import torch
from fuzz import VOCAB, Architecture, architectures, assert_within_noise, batches, rows, wide
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from inputs import Case
from packing_models import Batch, alone, backward, packed, padded
from policy_inputs import LENGTHS, compare, random_inputs, random_spec

import flashpo
from flashpo.rollout import RolloutEngine, SamplingParams

EXAMPLES = int(os.environ.get("FLASHPO_FUZZ", "0"))  # of each test; 0: the suite's


def fuzzed(in_suite: int):
    return settings(
        max_examples=EXAMPLES or in_suite,
        phases=list(Phase) if EXAMPLES else [Phase.explicit, Phase.generate],  # to shrink a failure takes minutes
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


def check_tree(architecture: Architecture, batch: Batch, temperature: float = 1.0, mistake=lambda model: None) -> None:
    """Log-probs, entropies and the gradient of every parameter of a token tree."""
    model = architecture.model()
    exact_model = wide(model)
    results = []
    for net, run in ((exact_model, alone), (model, padded), (model, packed)):
        if run is packed:
            mistake(net)
        values = run(net, batch, temperature)
        results.append((values[:2], backward(net, batch, values)))
    (exact, d_exact), (plain, d_plain), (ours, d_ours) = results
    for name, *of_name in zip(("log-probs", "entropies"), ours, exact, plain):
        assert_within_noise(*of_name, name)
    largest = max(g.abs().max().item() for g in d_exact.values() if g is not None)
    for name, g in d_exact.items():
        if g is None or g.abs().max() < 1e-6 * largest:  # of an expert that no token takes
            continue
        assert_within_noise(d_ours[name], g, d_plain[name], f"the gradient of {name}")


@fuzzed(24)
@given(architectures(), batches(), st.sampled_from([0.7, 1.0, 1.3]))
def test_token_trees(architecture, batch, temperature):
    check_tree(architecture, batch, temperature)


@st.composite
def sampling(draw) -> SamplingParams:
    return SamplingParams(
        n=draw(st.integers(1, 4)),
        temperature=draw(st.sampled_from([0.0, 0.6, 1.0, 1.7])),
        top_k=draw(st.sampled_from([0, 1, 3, 20, VOCAB + 5])),
        top_p=draw(st.sampled_from([1.0, 0.95, 0.5, 0.05])),
        min_p=draw(st.sampled_from([0.0, 0.02, 0.4])),
        max_new_tokens=draw(st.integers(1, 20)),
        stop_token_ids=draw(st.lists(st.integers(0, VOCAB - 1), max_size=3)),
        suppress_token_ids=draw(st.lists(st.integers(0, VOCAB + 5), max_size=3)),
        seed=draw(st.integers(0, 2**62)),
    )


def logits_of(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """(tokens of the completion, vocabulary), that each of its tokens is drawn from."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]


def assert_drawable(logits: torch.Tensor, token: int, params: SamplingParams, slack: float) -> None:
    """The filters of transformers, in their order, let `token` through, or would if logits were off by `slack`."""
    assert token not in params.suppress_token_ids
    logits = logits.clone()
    logits[[t for t in params.suppress_token_ids if t < len(logits)]] = -torch.inf
    if params.greedy:
        assert logits[token] >= logits.max() - slack
        return
    p = (logits / params.temperature).softmax(-1)
    near = 1 + 10 * slack / params.temperature
    if 0 < params.top_k < len(p):
        assert p[token] * near >= p.topk(params.top_k).values[-1], "top_k"
        p = p.where(p >= p.topk(params.top_k).values[-1] / near, 0.0)
        p = p / p.sum()
    if params.top_p < 1:
        assert p[p > p[token] * near].sum() < params.top_p * near, "top_p"
    assert p[token] * near >= params.min_p * p.max(), "min_p"


def check_rollout(
    architecture: Architecture, prompts, params: list[SamplingParams], mistake=lambda model: None
) -> None:
    """Log-probs by a plain forward; what is drawn by the filters; ends by the options; the same with less memory."""
    model = architecture.model()
    exact_model, plain_model = wide(model), architecture.model()
    mistake(model)
    engine = RolloutEngine(model, check=False, fallback="error")
    out = engine.generate(prompts, params)
    assert out.prompt_ids == [prompt for prompt, p in zip(prompts, params) for _ in range(p.n)]
    all_exact, all_plain = [], []
    for i, prompt, completion, reason in zip(out.prompt_index, out.prompt_ids, out.completion_ids, out.finish_reasons):
        p = params[i]
        stops = [t in p.stop_token_ids for t in completion]
        assert not any(stops[:-1])
        assert reason == ("stop" if stops[-1] else "length")
        assert stops[-1] or len(completion) == p.max_new_tokens
        exact, plain = (logits_of(m, prompt, completion).double() for m in (exact_model, plain_model))
        all_exact.append(_chosen(exact, completion, p))
        all_plain.append(_chosen(plain, completion, p))
        slack = 1e-5 * max(exact.abs().max().item(), 1.0)
        for row, token in zip(exact, completion):
            assert_drawable(row, token, p, slack)
    all_ours = torch.tensor([x for row in out.logprobs for x in row])
    assert_within_noise(all_ours, torch.cat(all_exact), torch.cat(all_plain), "log-probs")
    small = RolloutEngine(model, check=False, fallback="error", max_sequences=1, prefill_tokens=5)
    again = small.generate(prompts, params)
    if again.completion_ids == out.completion_ids:
        all_again = torch.tensor([x for row in again.logprobs for x in row])
        assert_within_noise(all_again, torch.cat(all_exact), torch.cat(all_plain), "log-probs of one row at a time")


def _chosen(logits: torch.Tensor, completion: list[int], params: SamplingParams) -> torch.Tensor:
    scaled = logits / (1.0 if params.greedy else params.temperature)
    return scaled.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


@fuzzed(24)
@given(architectures(), rows(), st.data())
def test_rollouts(architecture, prompts, data):
    params = [data.draw(sampling()) for _ in prompts]
    check_rollout(architecture, prompts, params)


@fuzzed(40)
@given(st.integers(0, 2**31), st.sampled_from(LENGTHS), st.sampled_from([0.0, 0.7, 1.0]))
def test_policy_losses(seed, lengths, live):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    spec = random_spec(rng)
    spread = rng.choice([0.02, 0.3])
    compare("native", spec, [random_inputs(rng, spec, lengths, live, spread) for _ in range(8)])


@st.composite
def heads(draw) -> Case:
    return Case(
        name="drawn",
        tokens=tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=2))),
        hidden=draw(st.integers(1, 40)),
        vocab=draw(st.integers(2, 3000)),
        bias=draw(st.booleans()),
        temperature=draw(st.sampled_from([1.0, 0.3, 2.5, "token"])),
        logit_scale=draw(st.sampled_from([1.0, 0.2, 3.0])),
        softcap=draw(st.sampled_from([None, 1.0, 30.0])),
        ignored=draw(st.sampled_from(["none", "some", "all"])),
        sliced=draw(st.booleans()),
    )


def check_head(case: Case, seed: int, mistake: float = 1.0) -> None:
    """Values and gradients of the head, several draws together."""
    torch.manual_seed(seed)
    draws = []
    for _ in range(6):
        inputs, target = case.make()
        upstream = torch.randn(5, *case.tokens, dtype=torch.float64)
        results = []
        for function, scale, dtype in (
            (case.ours, mistake, None),
            (case.plain, 1.0, torch.float64),
            (case.plain, 1.0, None),
        ):
            leaves = case.cast([inputs[0] * scale, *inputs[1:]], torch.float32, dtype)
            with flashpo.backend("native"):
                stats = function(leaves, target)
            loss = sum((u.to(x.dtype) * x).sum() for u, x in zip(upstream, stats[:2]))
            results.append([*(x.detach() for x in stats[:4]), *torch.autograd.grad(loss, leaves)])
        draws.append(results)
    for ours, exact, plain in zip(*(zip(*of_one) for of_one in zip(*draws))):
        assert_within_noise(*(torch.cat([x.flatten() for x in y]) for y in (ours, exact, plain)), "the head")


@fuzzed(20)
@given(heads(), st.integers(0, 2**31))
def test_heads(case, seed):
    check_head(case, seed)


# negative controls


def _perturbed(model) -> None:
    """A hundredth more in one weight: what a fused layer would do that forgot a scale."""
    norm = next(m for n, m in model.named_modules() if n.endswith("layers.0.input_layernorm"))
    with torch.no_grad():
        norm.weight.mul_(1.01)


CONTROLS = [
    Architecture(family, heads=4, kv_heads=2, head_dim=8, layers=2, tied=False, window=5, adapter=adapter, seed=seed)
    for seed, (family, adapter) in enumerate(
        [("llama", "none"), ("qwen3", "lora"), ("mistral", "none"), ("phi3", "none")]
    )
]
ROWS = [[5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 7, 8, 20, 21], [30, 31, 32, 33]]


@pytest.mark.parametrize("architecture", CONTROLS, ids=lambda a: a.family)
def test_a_wrong_tree_is_found(architecture):
    torch.manual_seed(0)
    batch = Batch.of(ROWS, [4, 3, 2])
    check_tree(architecture, batch)
    with pytest.raises(AssertionError, match="log-probs"):
        check_tree(architecture, batch, mistake=_perturbed)


@pytest.mark.parametrize("architecture", CONTROLS, ids=lambda a: a.family)
def test_a_wrong_rollout_is_found(architecture):
    params = [SamplingParams(n=2, max_new_tokens=8, top_k=5, seed=3)] * len(ROWS)
    check_rollout(architecture, ROWS, params)
    with pytest.raises(AssertionError):
        check_rollout(architecture, ROWS, params, mistake=_perturbed)


def test_a_wrong_head_is_found():
    case = Case("control", (3, 5), hidden=16, vocab=200)
    check_head(case, 0)
    with pytest.raises(AssertionError, match="error"):
        check_head(case, 0, mistake=1.001)


def test_a_wrong_draw_is_found():
    logits = torch.tensor([3.0, 2.0, 1.0, -4.0], dtype=torch.float64)
    for filters in (dict(top_k=2), dict(top_p=0.6), dict(min_p=0.3), dict(temperature=0.0)):
        params = SamplingParams(**filters)
        assert_drawable(logits, 0, params, 1e-6)
        with pytest.raises(AssertionError):
            assert_drawable(logits, 2, params, 1e-6)
