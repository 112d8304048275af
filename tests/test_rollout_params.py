"""SamplingParams and Rollouts refuse wrong values, with an error that names the argument."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from flashpo.rollout import Rollouts, RolloutStats, SamplingParams


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("n", 0, ValueError),
        ("n", 2.0, TypeError),
        ("n", True, TypeError),
        ("temperature", -0.1, ValueError),
        ("temperature", float("nan"), ValueError),
        ("temperature", "1", TypeError),
        ("top_k", -1, ValueError),
        ("top_k", None, TypeError),
        ("top_p", 0.0, ValueError),
        ("top_p", 1.1, ValueError),
        ("min_p", -0.1, ValueError),
        ("min_p", 1.1, ValueError),
        ("max_new_tokens", 0, ValueError),
        ("stop_token_ids", 2, TypeError),
        ("stop_token_ids", (2, -1), ValueError),
        ("stop_token_ids", (None,), TypeError),
        ("suppress_token_ids", 2, TypeError),
        ("suppress_token_ids", (2, -1), ValueError),
        ("stop_strings", "stop", TypeError),
        ("stop_strings", ("",), ValueError),
        ("stop_strings", (3,), TypeError),
        ("seed", -1, ValueError),
        ("seed", 2**63, ValueError),
    ],
)
def test_a_wrong_parameter_is_named(name, value, error):
    with pytest.raises(error, match=name):
        SamplingParams(**{name: value})


def test_parameters_are_plain_and_hashable():
    params = SamplingParams(
        n=np.int64(3), temperature=0, top_k=np.int32(5), top_p=np.float64(0.5), stop_token_ids=[7, np.int64(8)]
    )
    assert params == SamplingParams(n=3, temperature=0.0, top_k=5, top_p=0.5, stop_token_ids=(7, 8))
    assert hash(params) == hash(SamplingParams(n=3, temperature=0.0, top_k=5, top_p=0.5, stop_token_ids=(7, 8)))
    kinds = [type(x) for x in (params.n, params.temperature, params.top_k, params.top_p, *params.stop_token_ids)]
    assert kinds == [int, float, int, float, int, int]
    assert (params.greedy, params.truncated) == (True, True)
    assert (SamplingParams().greedy, SamplingParams().truncated) == (False, False)
    assert SamplingParams(min_p=0.1).truncated
    with pytest.raises(FrozenInstanceError):
        params.n = 4


def rollouts(**changes):
    stats = RolloutStats(
        tokens=6, seconds=2.0, steps=3, prefill_tokens=4, prefill_tokens_saved=2, peak_rows=3, mean_rows=2.0,
        cache_bytes=640, peak_cache_bytes=320, preemptions=0, nan_rows=1,
    )  # fmt: skip
    columns = dict(
        prompt_index=[0, 0, 1],
        prompt_ids=[[1, 2], [1, 2], [3, 4]],
        completion_ids=[[5], [6, 7, 8], [9, 10]],
        logprobs=[[-0.5], [-0.6, -0.7, -0.8], [-0.9, float("nan")]],
        truncated_logprobs=[[-0.4], [-0.5, -0.6, -0.7], [-0.8, float("nan")]],
        finish_reasons=["stop", "length", "nan"],
    )
    return Rollouts(stats=stats, **{**columns, **changes})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt_ids", [[1, 2]]),
        ("completion_ids", [[5], [6, 7, 8], []]),
        ("logprobs", [[-0.5], [-0.6], [-0.9, -1.0]]),
        ("truncated_logprobs", [[-0.5], [-0.6], [-0.9, -1.0]]),
        ("finish_reasons", ["stop", "length", "eos"]),
    ],
)
def test_results_that_disagree_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        rollouts(**{name: value})


def test_results_are_reordered():
    out = rollouts()
    assert len(out) == 3
    assert out.stats.tokens_per_second == 3.0
    turned = out.reordered([1, 2, 0])  # the last comes first
    assert turned.completion_ids == [[9, 10], [5], [6, 7, 8]]
    assert turned.prompt_index == [1, 0, 0]
    assert turned.finish_reasons == ["nan", "stop", "length"]
    assert turned.truncated_logprobs[1:] == [[-0.4], [-0.5, -0.6, -0.7]]
    assert turned.stats is out.stats
    same = rollouts(truncated_logprobs=out.logprobs, logprobs=out.logprobs).reordered([1, 2, 0])
    assert same.truncated_logprobs is same.logprobs
    for places in ([0, 1], [0, 0, 1], [1, 2, 3]):
        with pytest.raises(ValueError, match="places must be a permutation"):
            out.reordered(places)
