"""verl 0.9.1 on a CPU as the peer of tests: its functions, configurations for them, and batches with edge cases."""

import contextlib
import os
import warnings

import pytest
import torch


@contextlib.contextmanager
def importing():
    """verl warns of engines that are not installed, and sets variables that other tests' processes would inherit."""
    before = dict(os.environ)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


with importing():
    core = pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl is not installed", exc_type=ImportError)
    from verl.trainer.config import AlgoConfig as AlgoConfig
    from verl.workers.config import ActorConfig, PolicyLossConfig


def actor_config(global_batch_info=None, loss_mode="vanilla", dro_beta=0.3, rollout_correction=None, **fields):
    return ActorConfig(
        strategy="fsdp",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=1,
        global_batch_info=global_batch_info or {},
        policy_loss=PolicyLossConfig(loss_mode=loss_mode, dro_beta=dro_beta, rollout_correction=rollout_correction),
        **fields,
    )


def ragged_mask(sequences, tokens):
    """Lengths from 1 to all, tool output inside, and one sequence without any live token."""
    length = torch.randint(2, tokens + 1, (sequences, 1))
    length[-1] = tokens
    mask = (torch.arange(tokens) < length) & (torch.rand(sequences, tokens) < 0.85)
    mask[:, 0] = True
    mask[1] = False
    return mask


def policy_batch(sequences=6, tokens=29, per_sequence=False):
    """(old_log_prob, log_prob, advantages, mask) in fp64: ratios inside and outside of every clip, also beyond e^20."""
    log_prob = -6 * torch.rand(sequences, tokens, dtype=torch.float64) - 0.02
    old = (log_prob + 0.3 * torch.randn_like(log_prob)).clamp(max=-0.01)
    advantages = torch.randn(sequences, 1 if per_sequence else tokens, dtype=torch.float64).expand(-1, tokens).clone()
    mask = ragged_mask(sequences, tokens)
    old[0, 0] -= 26
    log_prob[-1, 0] -= 26
    old[2, 0] -= 1.8
    log_prob[3, 0], old[3, 0] = -0.1, -1.5  # far in probability
    if not per_sequence:
        advantages[0, 0], advantages[2, 0], advantages[3, 0] = -1.0, -0.7, 1.0  # the dual clip holds the first two
    return old, log_prob, advantages, mask
