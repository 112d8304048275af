"""verl's advantage estimators out of `flashpo.group_advantages` and `flashpo.gae`: verl 0.9.1's arguments and results.

Each returns (advantages, returns), (B, T). Where they differ from verl: a NaN reward concerns its own row alone, which
gets 0; groups of equal rewards get exactly 0; masked tokens of `gae` and `remax` have 0 instead of a carried value.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashpo.ops._wide import wide
from flashpo.ops.gae import gae as estimate
from flashpo.ops.group_advantages import CONVENTIONS, group_advantages
from flashpo.verl.losses import live

EPSILON = CONVENTIONS["verl"].eps
WHITENING_EPSILON = 1e-8
BY_NAME_ALONE = 'verl hands them to the name "{}" alone: VERL_USE_EXTERNAL_MODULES=flashpo.verl.replace'


def gae(
    token_level_rewards: Tensor,
    values: Tensor | None = None,
    response_mask: Tensor | None = None,
    gamma: float | None = None,
    lam: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Steps over observation tokens; advantages are whitened over the live tokens.

    verl gives values, gamma and lam to an estimator of the name "gae" alone.
    """
    if values is None or response_mask is None or gamma is None or lam is None:
        raise ValueError(f"values, response_mask, gamma and lam are needed; {BY_NAME_ALONE.format('gae')}")
    return estimate(token_level_rewards, values, live(response_mask), gamma=float(gamma), lam=float(lam), whiten=True)


def grpo(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence,
    epsilon: float = EPSILON,
    norm_adv_by_std_in_grpo: bool | None = None,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """norm_adv_by_std_in_grpo: also of `config`, which is all that verl hands to an estimator that it does not know."""
    check_epsilon(epsilon)
    by_std = norm_adv_by_std_in_grpo
    if by_std is None:
        by_std = True if config is None else config.get("norm_adv_by_std_in_grpo", True)
    scores = token_level_rewards.sum(-1)
    scale = "group" if by_std else "none"
    return spread(
        group_advantages(scores, keys(index, scores), scale=scale, convention="verl").advantage, response_mask
    )


def grpo_passk(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence,
    epsilon: float = EPSILON,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """As in verl, the configuration says whether to divide by the standard deviation, not the argument."""
    check_epsilon(epsilon)
    if config is None:
        raise ValueError("config must be verl's AlgoConfig, got None")
    scores = token_level_rewards.sum(-1)
    group = keys(index, scores)
    if len(index) and group.bincount().min() < 2:
        raise ValueError("index: Pass@k needs at least 2 samples in each group")
    scale = "group" if config.get("norm_adv_by_std_in_grpo", True) else "none"
    result = group_advantages(scores, group, baseline="second_best", scale=scale, convention="verl")
    return spread(result.advantage, response_mask)


def gdpo(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence,
    epsilon: float = EPSILON,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
    non_tensor_batch: Any = None,
    batch: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Each reward in its groups by itself, then their weighted sum whitened over the live tokens.

    verl gives the single rewards (`non_tensor_batch`) to an estimator of the name "gdpo" alone.
    """
    check_epsilon(epsilon)
    names = None if config is None else config.get("gdpo_reward_keys", None)
    weights = None if config is None else config.get("gdpo_reward_weights", None)
    rewards = token_level_rewards.sum(-1)[:, None]
    if non_tensor_batch is not None and config is not None:
        if not names:
            raise ValueError("config.gdpo_reward_keys must name the rewards of GDPO")
        if missing := [name for name in names if name not in non_tensor_batch]:
            raise ValueError(f"config.gdpo_reward_keys: non_tensor_batch has no {missing}")
        columns = [torch.as_tensor(np.asarray(non_tensor_batch[name], dtype=np.float32)) for name in names]
        rewards = torch.stack(columns, 1).to(rewards.device)
    elif names:
        raise ValueError(f"non_tensor_batch is needed for config.gdpo_reward_keys; {BY_NAME_ALONE.format('gdpo')}")
    else:
        weights = None
    group, scale = keys(index, rewards), "group" if norm_adv_by_std_in_grpo else "none"
    single = [group_advantages(r, group, scale=scale, convention="verl").advantage for r in rewards.unbind(1)]
    total = sum(w * a for w, a in zip(weights or [1.0] * len(single), single, strict=True))
    return spread(whiten(total, response_mask), response_mask)


def rloo(token_level_rewards: Tensor, response_mask: Tensor, index: Sequence, **_: Any) -> tuple[Tensor, Tensor]:
    """A group of one keeps its reward, as in verl's loop."""
    return _rloo(token_level_rewards, response_mask, index, "verl")


def rloo_vectorized(
    token_level_rewards: Tensor, response_mask: Tensor, index: Sequence, **_: Any
) -> tuple[Tensor, Tensor]:
    """A group of one gets 0, as in verl's vectorised form."""
    return _rloo(token_level_rewards, response_mask, index, "trl")


def _rloo(token_level_rewards: Tensor, response_mask: Tensor, index: Sequence, convention: str):
    scores = token_level_rewards.sum(-1)
    result = group_advantages(
        scores, keys(index, scores), baseline="leave_one_out", scale="none", convention=convention
    )
    return spread(result.advantage, response_mask)


def opo(token_level_rewards: Tensor, response_mask: Tensor, index: Sequence, **_: Any) -> tuple[Tensor, Tensor]:
    """The baseline weighs each reward by its length; a row without live tokens is a sibling of no weight."""
    lengths = live(response_mask).sum(-1)
    here = lengths > 0
    scores = wide(token_level_rewards.sum(-1)).masked_fill(~here, torch.nan)
    group = keys(index, scores)
    result = group_advantages(scores, group, scale="none", convention="verl", lengths=lengths.clamp(min=1))
    only_weight = (group.bincount(weights=here.double()) == 1) & (group.bincount() > 1)
    return spread(result.advantage.masked_fill(only_weight[group], 0.0), response_mask)


def gpg(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence,
    f_norm: float = 1.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Rewards above their group's mean, times the batch's size over its number of non-zero rewards."""
    scores = token_level_rewards.sum(-1)
    alpha = scores.shape[0] / scores.count_nonzero().clamp(min=1)
    result = group_advantages(scores, keys(index, scores), scale="none", convention="verl")
    return spread(alpha * result.advantage / f_norm, response_mask)


def reinforce_plus_plus(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """Discounted returns of each token, whitened: GAE with lambda 1 and no values."""
    if config is None:
        raise ValueError("config must be verl's AlgoConfig, got None")
    nothing = torch.zeros_like(token_level_rewards)
    return estimate(token_level_rewards, nothing, live(response_mask), gamma=float(config.gamma), lam=1.0, whiten=True)


def reinforce_plus_plus_baseline(
    token_level_rewards: Tensor, response_mask: Tensor, index: Sequence, **_: Any
) -> tuple[Tensor, Tensor]:
    """Rewards above their group's mean, whitened over the live tokens."""
    scores = token_level_rewards.sum(-1)
    above = group_advantages(scores, keys(index, scores), scale="none", convention="verl").advantage
    return spread(whiten(above, response_mask), response_mask)


def remax(
    token_level_rewards: Tensor, reward_baselines: Tensor, response_mask: Tensor, config: Any = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """Reward to go, less the reward of the greedy completion."""
    nothing = torch.zeros_like(token_level_rewards)
    returns = estimate(token_level_rewards, nothing, live(response_mask), gamma=1.0, lam=1.0)[1]
    return returns - reward_baselines[:, None] * response_mask, returns


def check_epsilon(epsilon: float) -> None:
    if epsilon != EPSILON:
        raise ValueError(f"epsilon must be {EPSILON}, got {epsilon}")


def keys(index: Sequence, beside: Tensor) -> Tensor:
    """verl's group labels, often strings, as numbers (B,) on the device of `beside`."""
    numbers: dict[Any, int] = {}
    labels = index.tolist() if isinstance(index, np.ndarray | Tensor) else index
    return torch.tensor([numbers.setdefault(x, len(numbers)) for x in labels], dtype=torch.int64, device=beside.device)


def whiten(advantage: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the live tokens, each of which has its row's advantage (B,)."""
    lengths = mask.sum(-1).to(advantage.dtype)
    tokens = lengths.sum()
    centred = advantage - (lengths * advantage).sum() / tokens.clamp(min=1)
    variance = (lengths * centred.square()).sum() / (tokens - 1).clamp(min=1)
    return centred * (variance + WHITENING_EPSILON).rsqrt()


def spread(advantage: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The row's advantage (B,) for each of its live tokens, which in verl is the return as well."""
    tokens = advantage[:, None] * mask
    return tokens, tokens


ADV_ESTIMATORS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "gae": gae,
    "grpo": grpo,
    "grpo_vectorized": grpo,
    "grpo_passk": grpo_passk,
    "gdpo": gdpo,
    "rloo": rloo,
    "rloo_vectorized": rloo_vectorized,
    "opo": opo,
    "gpg": gpg,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
    "remax": remax,
}
