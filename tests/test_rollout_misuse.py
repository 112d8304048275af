"""The rollout engine refuses wrong values of each argument at once, with an error that names the argument."""

import inspect
import math

import numpy as np
import pytest
import torch
from rollout_models import model, prompts
from torch import nn

from flashpo.rollout import RolloutEngine, SamplingParams

ODD = {
    "None": None, "text": "x", "bytes": b"x", "float": 1.5, "nan": math.nan, "inf": math.inf, "negative": -1, "zero": 0,
    "true": True, "huge": 2**70, "huge float": 1e300, "tiny": 1e-300, "dict": {}, "list": [], "set": {1},
    "object": object(), "class": int, "tensor": torch.ones(2), "nested": [[1]], "ids": [1, 2], "dtype": torch.int64,
    "module": nn.Linear(1, 1), "complex": 1j, "array": np.ones(2), "function": len,
}  # fmt: skip
WHOLE = {"n": 2**20, "top_k": 2**63 - 1, "max_new_tokens": 2**31 - 1, "seed": 2**63 - 1}
FINE = {
    "n": (), "temperature": ("float", "zero", "huge"), "top_k": ("zero",), "top_p": (), "min_p": ("zero", "tiny"),
    "max_new_tokens": (), "seed": ("zero",), "stop_token_ids": ("list", "ids"), "stop_strings": ("list",),
    "suppress_token_ids": ("list", "ids"),
    "model": ("module",), "tokenizer": ("None", "bytes"), "kv_memory": ("None",), "max_sequences": ("None",),
    "expected_tokens": ("None", "float", "huge"), "prefill_tokens": (), "autocast": ("None",), "weights": (),
    "lora": (), "fallback": (), "check": ("true",), "adapters": ("None",), "progress": ("true",),
    "prompts": ("list", "nested"), "params": (), "images": ("None",),
}  # fmt: skip
CALLS = {
    name: function
    for function in (SamplingParams, RolloutEngine, RolloutEngine.generate)
    for name in inspect.signature(function).parameters
    if name != "self"
}


def call(name, value):
    if CALLS[name] is SamplingParams:
        SamplingParams(**{name: value})
    elif CALLS[name] is RolloutEngine:
        RolloutEngine(**{"model": model("qwen3"), name: value})
    else:
        arguments = {"prompts": [[1]], "params": SamplingParams(max_new_tokens=1), name: value}
        RolloutEngine(model("qwen3"), check=False).generate(**arguments)


def test_every_argument_is_here():
    assert set(CALLS) == set(FINE)


@pytest.mark.parametrize("name", CALLS)
def test_what_it_cannot_mean(name):
    for odd, value in ODD.items():
        if odd in FINE[name]:
            call(name, value)
            continue
        with pytest.raises((TypeError, ValueError), match=f"^{name}"):
            call(name, value)


@pytest.mark.parametrize("name", WHOLE)
def test_the_largest_number_that_it_takes(name):
    assert getattr(SamplingParams(**{name: WHOLE[name]}), name) == WHOLE[name]
    with pytest.raises(ValueError, match=f"{name} must be at most {WHOLE[name]}, not"):
        SamplingParams(**{name: WHOLE[name] + 1})


NO_PROMPTS = [
    [None], [[None]], ["ab"], [b"ab"], [[True]], [{1: 2}], [{1, 2}], [1], [[1.0]], [[2**70]], [[-1]], [[]], {0: [1]},
    [torch.tensor([True])], [torch.ones(2)], [torch.ones(1, 1, dtype=torch.int64)], torch.ones(2, dtype=torch.int64),
    torch.tensor(3),
]  # fmt: skip


@pytest.mark.parametrize("odd", NO_PROMPTS, ids=repr)
def test_what_are_no_prompts(odd):
    with pytest.raises((TypeError, ValueError), match=r"^prompts"):
        RolloutEngine(model("qwen3"), check=False).generate(odd, SamplingParams(max_new_tokens=1))


@pytest.mark.parametrize("odd", [[{}], [None], [[]], [SamplingParams], ["x"], [0]], ids=repr)
def test_what_are_no_params(odd):
    with pytest.raises(TypeError, match="params must be SamplingParams, not"):
        RolloutEngine(model("qwen3"), check=False).generate([[1]], odd)


@pytest.mark.parametrize("ids", [[3, 4], (3, 4), range(3, 5), np.array([3, 4]), torch.tensor([3, 4])], ids=repr)
def test_what_prompts_may_be(ids):
    rollouts = RolloutEngine(model("qwen3"), check=False).generate([ids], SamplingParams(max_new_tokens=1))
    assert rollouts.prompt_ids == [[3, 4]]


def test_adapters_are_looked_up_before_anything_runs():
    with pytest.raises(ValueError, match="adapters: no adapter 'other' in the model"):
        RolloutEngine(model("qwen3"), check=False).generate(prompts(3), SamplingParams(), adapters=["other"])


def test_a_model_without_parameters():
    with pytest.raises(ValueError, match="model must have parameters, Identity has none"):
        RolloutEngine(nn.Identity())
