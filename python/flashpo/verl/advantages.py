"""verl's advantage estimators, computed by `flashpo.group_advantages` and `flashpo.gae`.

They take the arguments and give the results of verl 0.9.1. Each returns (advantages, returns), both (B, T). They differ
from verl in three cases. A NaN reward affects only its own row, which gets 0. Groups of equal rewards get exactly 0.
Masked tokens of `gae` and `remax` get 0 instead of a carried value.
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
    """Generalised advantage estimation. It skips observation tokens, and whitens the advantages over the live tokens.

    verl passes values, gamma and lam only to the estimator with the name "gae".
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
    """GRPO: the reward minus the group's mean, divided by the group's standard deviation if norm_adv_by_std_in_grpo.

    If norm_adv_by_std_in_grpo is not given, it is read from `config`: to an estimator that verl does not know by name,
    verl passes only the configuration.
    """
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
    """Pass@k: only the best completion of a group has an advantage, its reward minus the second best one.

    As in verl, `config` decides whether it is divided by the standard deviation; the argument is not used.
    """
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
    """GDPO: computes GRPO advantages of each reward separately, then whitens their weighted sum over the live tokens.

    verl passes the single rewards (`non_tensor_batch`) only to the estimator with the name "gdpo".
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
    """RLOO. In a group of one, the advantage is the reward itself, as in verl's loop."""
    return _rloo(token_level_rewards, response_mask, index, "verl")


def rloo_vectorized(
    token_level_rewards: Tensor, response_mask: Tensor, index: Sequence, **_: Any
) -> tuple[Tensor, Tensor]:
    """RLOO. In a group of one, the advantage is 0, as in verl's vectorised form."""
    return _rloo(token_level_rewards, response_mask, index, "trl")


def _rloo(token_level_rewards: Tensor, response_mask: Tensor, index: Sequence, convention: str):
    scores = token_level_rewards.sum(-1)
    result = group_advantages(
        scores, keys(index, scores), baseline="leave_one_out", scale="none", convention=convention
    )
    return spread(result.advantage, response_mask)


def opo(token_level_rewards: Tensor, response_mask: Tensor, index: Sequence, **_: Any) -> tuple[Tensor, Tensor]:
    """OPO: the reward minus the mean of the group's rewards weighted by the number of live tokens.

    A row without live tokens has weight 0 in its group's baseline.
    """
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
    """GPG: (reward - mean of the group) * (size of the batch / number of its non-zero rewards) / f_norm."""
    scores = token_level_rewards.sum(-1)
    alpha = scores.shape[0] / scores.count_nonzero().clamp(min=1)
    result = group_advantages(scores, keys(index, scores), scale="none", convention="verl")
    return spread(alpha * result.advantage / f_norm, response_mask)


def reinforce_plus_plus(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """REINFORCE++: whitened discounted returns, which are GAE with lambda 1 and values 0."""
    if config is None:
        raise ValueError("config must be verl's AlgoConfig, got None")
    nothing = torch.zeros_like(token_level_rewards)
    return estimate(token_level_rewards, nothing, live(response_mask), gamma=float(config.gamma), lam=1.0, whiten=True)


def reinforce_plus_plus_baseline(
    token_level_rewards: Tensor, response_mask: Tensor, index: Sequence, **_: Any
) -> tuple[Tensor, Tensor]:
    """REINFORCE++ with a baseline: the reward minus the group's mean, whitened over the live tokens."""
    scores = token_level_rewards.sum(-1)
    above = group_advantages(scores, keys(index, scores), scale="none", convention="verl").advantage
    return spread(whiten(above, response_mask), response_mask)


def remax(
    token_level_rewards: Tensor, reward_baselines: Tensor, response_mask: Tensor, config: Any = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """ReMax: the reward to go minus the reward of the greedy completion."""
    nothing = torch.zeros_like(token_level_rewards)
    returns = estimate(token_level_rewards, nothing, live(response_mask), gamma=1.0, lam=1.0)[1]
    return returns - reward_baselines[:, None] * response_mask, returns


def check_epsilon(epsilon: float) -> None:
    if epsilon != EPSILON:
        raise ValueError(f"epsilon must be {EPSILON}, got {epsilon}")


def keys(index: Sequence, like: Tensor) -> Tensor:
    """verl's group labels, which are often strings, as int64 numbers (B,) on the device of `like`."""
    numbers: dict[Any, int] = {}
    labels = index.tolist() if isinstance(index, np.ndarray | Tensor) else index
    return torch.tensor([numbers.setdefault(x, len(numbers)) for x in labels], dtype=torch.int64, device=like.device)


def whiten(advantage: Tensor, mask: Tensor) -> Tensor:
    """The advantages (B,) of rows with mean 0 and variance 1 over the live tokens, which all have their row's value."""
    lengths = mask.sum(-1).to(advantage.dtype)
    tokens = lengths.sum()
    centred = advantage - (lengths * advantage).sum() / tokens.clamp(min=1)
    variance = (lengths * centred.square()).sum() / (tokens - 1).clamp(min=1)
    return centred * (variance + WHITENING_EPSILON).rsqrt()


def spread(advantage: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both (B, T): each live token gets its row's advantage (B,), in verl also as the return."""
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
