"""Sampling by transformers' `generate`, for models that the engine cannot run.

It is slower than the engine but follows the same rules: each token is drawn by our `sample` operator from the same
random stream, and completions end in the same way.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from flashpo._causal_lm import Unsupported
from flashpo.rollout.generation import Completion
from flashpo.rollout.runner import Draw, draw_tokens


def generate(
    model: Any,
    prompt: Sequence[int],
    completions: Sequence[Completion],
    decode: Callable | None,
    beside: Mapping[str, Tensor],
):
    """Samples all of the completions of one prompt from their beginning.

    Args:
        decode: Token ids to text, for stop strings.
        beside: The image tensors of the prompt, one copy for each completion.
    """
    for completion in completions:
        completion.restart()
    device = next(model.parameters()).device
    ids = torch.tensor([list(prompt)] * len(completions), device=device)
    draws = _Draws(completions, decode, device)
    longest = max(c.draw.limit for c in completions)
    with _own_config(model, GenerationConfig(max_new_tokens=longest, pad_token_id=0)):
        mask = torch.ones_like(ids)
        criteria: dict[str, Any] = {"logits_processor": [draws], "stopping_criteria": [_Ended(draws)]}
        model.generate(input_ids=ids, attention_mask=mask, **beside, **criteria)
    if not all(completion.reason for completion in completions):
        raise Unsupported(
            f"the generate of {type(model).__name__} does not sample with the logits processor it is given"
        )


class _Draws(LogitsProcessor):
    """Draws a token for each row and sets all other logits to -inf, so that `generate`'s greedy search takes it."""

    def __init__(self, completions: Sequence[Completion], decode: Callable | None, device: torch.device):
        self.completions, self.decode = completions, decode
        self.settings = Draw.tensors([c.draw for c in completions], device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = torch.full_like(input_ids[:, 0], input_ids.shape[1])
        drawn = draw_tokens(scores, offset=position, **self.settings)
        columns = drawn.token.tolist(), drawn.logprob_full.tolist(), drawn.logprob.tolist()
        for completion, token, full, truncated in zip(self.completions, *columns):
            if not completion.reason:
                completion.append(token, full, truncated, self.decode)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn.token[:, None], 0.0)


class _Ended(StoppingCriteria):
    def __init__(self, draws: _Draws):
        self.draws = draws

    def __call__(self, input_ids: Tensor, scores: Tensor, **keywords) -> Tensor:
        return torch.tensor([bool(c.reason) for c in self.draws.completions], device=input_ids.device)


@contextlib.contextmanager
def _own_config(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Replaces every generation config of the model by `config`: `generate` would apply their penalties and end tokens.
    PEFT's wrapper has a generation config, too."""
    owners: list[Any] = [
        m for m in model.modules() if isinstance(getattr(m, "generation_config", None), GenerationConfig)
    ]
    before = [m.generation_config for m in owners]
    try:
        for owner in owners:
            owner.generation_config = config
        yield
    finally:
        for owner, theirs in zip(owners, before):
            owner.generation_config = theirs
