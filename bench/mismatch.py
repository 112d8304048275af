"""How far a rollout's log-probs are from the trainer's, compared with how far the trainer's are from themselves.

The trainer's own forward gives other numbers for the same tokens if the number of rows differs, and others again in a
wider dtype. An engine cannot be closer to the trainer than that, and need not be.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from flashpo.bench.shapes import USUAL, random_model
from flashpo.bench.timing import Device, Tables, dtype_name
from flashpo.rollout import RolloutEngine, Rollouts, SamplingParams

PROMPTS, COMPLETIONS, PROMPT, NEW = 12, 8, 64, 32
PEAKED = 0.08  # initializer_range; with the default, all tokens would be equally likely


@torch.no_grad()
def trained(model, rollouts: Rollouts, rows: int) -> Tensor:
    """Log-probs (completions, NEW) by plain forwards of so many rows at a time."""
    ids = torch.tensor([p + c for p, c in zip(rollouts.prompt_ids, rollouts.completion_ids)], device=model.device)
    found = []
    for some in ids.split(rows):
        logits = model(some, logits_to_keep=NEW + 1).logits[:, :-1].double()
        found.append(logits.log_softmax(-1).gather(-1, some[:, -NEW:, None])[..., 0])
    return torch.cat(found).cpu()


def record(name: str, a: Tensor, b: Tensor) -> dict:
    difference = a - b
    ratio = difference.exp()
    return {
        "variant": name,
        "standard_deviation": difference.std().item(),
        "max": difference.abs().max().item(),
        "ratios_off_by_10_percent": ((ratio < 0.9) | (ratio > 1.1)).double().mean().item(),
        "effective_sample_size": (ratio.sum() ** 2 / (ratio.numel() * (ratio * ratio).sum())).item(),
    }


def records(device: Device, dtype: torch.dtype, shape: str) -> Sequence[dict]:
    torch.manual_seed(0)
    model = random_model(shape, dtype, device.name, initializer_range=PEAKED)
    prompts = torch.randint(model.config.vocab_size, (PROMPTS, PROMPT)).tolist()
    rollouts = RolloutEngine(model, fallback="error").generate(
        prompts, SamplingParams(n=COMPLETIONS, max_new_tokens=NEW)
    )
    one, eight = trained(model, rollouts, 1), trained(model, rollouts, 8)
    sampled = torch.tensor(rollouts.logprobs, dtype=torch.float64)
    pairs = {"rollout and trainer, rows one by one": (sampled, one), "trainer, one by one and 8 together": (eight, one)}
    wider = torch.float64 if dtype == torch.float32 else torch.float32
    pairs[f"trainer, as it is and in {dtype_name(wider)}"] = one, trained(model.to(wider), rollouts, 1)
    return [record(name, *pair) for name, pair in pairs.items()]


def tables(device: Device, with_peers: bool, quick: bool) -> Tables:
    shape = "tiny" if quick else USUAL[device.name]
    for dtype in (torch.float32, torch.bfloat16):
        title = f"mismatch of log-probs, {shape} {dtype_name(dtype)}"
        yield title, partial(records, device, dtype, shape)
        device.collect()
