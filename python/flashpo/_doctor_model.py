"""`flashpo doctor --model PATH`: which parts of FlashPO would run for a model, and why the others would not.

The weights are not loaded. What follows from the configuration is found with a model without memory for its weights.
What only a run can show is found with a small model of the same class that has random weights.
"""

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from flashpo._causal_lm import CausalLM
from flashpo._twin import small_config, small_model
from flashpo.packing import packable
from flashpo.rollout import RolloutEngine, SamplingParams, seam
from flashpo.rollout.fused import LAYERS
from flashpo.rollout.hybrid import is_hybrid
from flashpo.rollout.support import longest

LENGTHS = (1024, 8192)  # the lengths of the sequences whose memory is reported


def lines(path: str) -> list[str]:
    """The lines of the report. Raises ValueError (one line) if `path` has no configuration of a causal language
    model."""
    nothing = FakeTensorMode()  # tensors without memory
    try:
        config = AutoConfig.from_pretrained(path)
        with nothing:
            whole: Any = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # of any kind: from transformers, the hub or the model's own code
        raise ValueError(f"no causal language model at {path}: {str(error).strip().splitlines()[0]}") from None
    parameters = sum(p.numel() for p in whole.parameters())
    found = [f"{path}: {type(whole).__name__}, {parameters / 1e6:,.0f} million parameters"]
    try:
        small = small_model(small_config(config))
    except Exception as error:  # from the model's own code, which may not expect such sizes
        return [*found, f"  cannot be tried in small: {error}", *_static(whole)]
    with nothing:
        memory = _memory(whole, config)
    return found + _tried(small) + memory


def _static(model: nn.Module) -> list[str]:
    trees = packable(model)
    return [_line("token trees", trees.reason, "by its configuration")]


def _tried(small: nn.Module) -> list[str]:
    engine = RolloutEngine(small)
    reason = engine.why_not() or ""
    fused = "" if reason else _why_not_fused(engine)
    return [
        _line("rollout engine", reason),
        *([] if reason else [_line("fused decode", fused)]),
        _line("token trees", packable(small, check=True).reason),
    ]


def _why_not_fused(engine: RolloutEngine) -> str:
    """Find the reason by a rollout of two tokens."""
    engine.generate([[2, 3]], SamplingParams(max_new_tokens=2))
    if engine.pool.runner is not None and engine.pool.runner.fused is not None:
        return ""
    backbone = CausalLM.of(engine.model).backbone
    layers = getattr(backbone, "layers", [backbone])
    others = sorted({type(layer).__name__ for layer in layers} - set(LAYERS))
    if others:
        return f"it is made of {', '.join(others)}; the fused form is for {', '.join(LAYERS)}"
    return "a norm, a dtype or a hook in it is not one that the fused form computes"


def _memory(whole: nn.Module, config: Any) -> list[str]:
    """The memory of the KV cache, found from the attention calls of a forward that computes nothing."""
    try:
        calls = seam.probe(whole)
    except Exception:  # of any kind, from the model's own code; the small model has already reported it
        return []
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    token = sum(call.kv_heads * (call.head_dim + call.value_dim) for call in calls) * dtype.itemsize
    sizes = ", ".join(f"{token * n / 2**20:,.1f} MiB for {n:,} tokens" for n in LENGTHS)
    most = longest(config.get_text_config())
    limit = "" if most is None else f"; sequences of at most {most:,} tokens"
    state = "; its linear layers keep a state in addition" if is_hybrid(config.get_text_config()) else ""
    return [f"  KV cache of a sequence, in {str(dtype).removeprefix('torch.')}: {sizes}{limit}{state}"]


def _line(part: str, reason: str, how: str = "") -> str:
    return f"  {part + ':':16s}{f'no, {reason}' if reason else 'yes'}" + (f" ({how})" if how else "")
