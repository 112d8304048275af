"""Losses of preference pairs (DPO and its variants, CPO, SimPO, ORPO, TPO) from sums of log-probs per sequence.

The losses themselves are in `PREFERENCE_LOSSES`; this file has what they share, and the checks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flashpo.ops._check import check_beside, check_choice, check_float, check_lengths, check_number, check_positive
from flashpo.ops._preference_terms import (
    F_DIVERGENCES,
    OF_MEANS,
    OF_RANKS,
    OF_SCORES,
    OF_SFT,
    PREFERENCE_LOSSES,
    SMOOTHED,
    WITHOUT_REFERENCE,
    Pairs,
)
from flashpo.ops._wide import wide


class PreferenceLoss(NamedTuple):
    loss: Tensor  # (): the mean of per_pair; 0 for an empty batch
    # (B,): weighted sum of the losses; for `aot` and `aot_unpaired` a value belongs to a rank, not to a pair
    per_pair: Tensor
    # (B,) each, without gradient: beta times the log-ratio to the reference, or times the log-prob if there is no
    # reference; per token if the first loss is simpo, odds_ratio or orpo
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    *,
    loss: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chosen_length: Tensor | None = None,
    rejected_length: Tensor | None = None,
    pair_weight: Tensor | None = None,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    gamma: float = 0.5,
    discopop_tau: float = 0.05,
    sft: Tensor | None = None,
    sft_length: Tensor | None = None,
) -> PreferenceLoss:
    """The mean over pairs of sum_k loss_weights[k] loss_k, with the losses as in TRL's DPO, CPO, ORPO and TPO trainers.

    Args:
        chosen, rejected: (B,) float: for each completion the sum of its tokens' log-probabilities under the policy, for
            instance from `sequence_logprobs`, which also computes LD-DPO's sums and WPO's weights.
        ref_chosen, ref_rejected: the same under the reference. Without them the loss is reference-free.
        loss: one name, or several whose losses are added up. The names are in `PREFERENCE_LOSSES`, whose docstrings
            give formula and source. CPO with another weight of its likelihood term is ("cdpo", "sft"). MPO is
            ("sigmoid", "bco_pair", "sft"). CPO-SimPO is ("simpo", "sft"); TPO-L is the same with the gold completion as
            `sft`.
        loss_weights: a number for each loss; 1 by default.
        beta: a positive number.
        label_smoothing: in [0, 0.5). It is read by cdpo, exo_pair (which needs it), robust, aot, aot_unpaired, simpo
            and cpo. As in TRL, `sigmoid` is never smoothed; `cdpo` is its smoothed form.
        chosen_length, rejected_length: (B,): numbers of tokens; needed by ipo, sigmoid_norm, simpo, odds_ratio and
            orpo.
        pair_weight: (B,): a factor of each pair's losses (WPO, arXiv 2406.11827).
        f_divergence: "reverse_kl", "forward_kl", "js_divergence" or "alpha_divergence" (f-DPO, arXiv 2309.16240), for
            losses of a difference of scores. AlphaPO with its alpha a is simpo or cpo with "alpha_divergence" and
            f_alpha = 1 - a.
        f_alpha: the alpha of "alpha_divergence".
        gamma: the margin of simpo, which is subtracted after the product with beta. Papers and TRL divide it by beta
            and subtract it before.
        discopop_tau: the temperature of discopop.
        sft, sft_length: (B,): sums of log-probs and numbers of tokens whose likelihood is a term of sft, cpo and orpo.
            By default they are those of the chosen completion. TRL's ORPO takes prompt and chosen completion, its TPO a
            gold completion.

    Returns:
        PreferenceLoss, fp32 or wider.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes or devices disagree, a name is unknown, an argument that a loss needs is missing, or an
            option is given that none of the losses reads.
    """
    names = _names(loss)
    weights = _weights(loss_weights, names)
    check_positive("beta", beta)
    check_positive("discopop_tau", discopop_tau)
    for name, value in (("label_smoothing", label_smoothing), ("f_alpha", f_alpha), ("gamma", gamma)):
        check_number(name, value)
    _check_options(names, label_smoothing, f_divergence, f_alpha, gamma, discopop_tau)
    _check_tensors(
        chosen,
        rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
        chosen_length=chosen_length,
        rejected_length=rejected_length,
        pair_weight=pair_weight,
        sft=sft,
        sft_length=sft_length,
    )
    _check_needs(names, ref_chosen, ref_rejected, chosen_length, rejected_length, pair_weight, sft, sft_length)

    if sft is None:
        sft, sft_length = chosen, chosen_length
    pairs = Pairs(  # a length that is None is not read
        chosen=wide(chosen),
        rejected=wide(rejected),
        ref_chosen=None if ref_chosen is None else wide(ref_chosen),
        ref_rejected=None if ref_rejected is None else wide(ref_rejected),
        chosen_length=chosen_length,  # type: ignore[arg-type]
        rejected_length=rejected_length,  # type: ignore[arg-type]
        sft=wide(sft),
        sft_length=sft_length,  # type: ignore[arg-type]
        beta=beta,
        label_smoothing=label_smoothing,
        f_divergence=f_divergence,
        f_alpha=f_alpha,
        gamma=gamma,
        discopop_tau=discopop_tau,
    )
    terms = [weight * PREFERENCE_LOSSES[name](pairs) for name, weight in zip(names, weights)]
    per_pair = torch.stack(terms).sum(0)
    if pair_weight is not None:
        per_pair = per_pair * pair_weight
    of_means = names[0] in WITHOUT_REFERENCE & OF_MEANS
    rewards = (beta * x.detach() for x in (pairs.means if of_means else pairs.ratios))
    return PreferenceLoss(per_pair.sum() / max(per_pair.shape[0], 1), per_pair, *rewards)


def _names(loss: str | Sequence[str]) -> tuple[str, ...]:
    if not isinstance(loss, (str, tuple, list)):
        raise TypeError(f"loss must be a name or a sequence of names, got {type(loss).__name__}")
    names = (loss,) if isinstance(loss, str) else tuple(loss)
    if not names:
        raise ValueError("loss must name at least one loss, got none")
    for name in names:
        check_choice("loss", name, PREFERENCE_LOSSES, "; see also kto_loss")
    return names


def _weights(loss_weights: Sequence[float] | None, names: tuple[str, ...]) -> Sequence[float]:
    if loss_weights is None:
        return (1.0,) * len(names)
    if not isinstance(loss_weights, (tuple, list)):
        raise TypeError(f"loss_weights must be a sequence of numbers, got {type(loss_weights).__name__}")
    if len(loss_weights) != len(names):
        raise ValueError(f"loss_weights has {len(loss_weights)} numbers for {len(names)} losses")
    for weight in loss_weights:
        check_number("loss_weights", weight)
    return loss_weights


def _check_options(names, label_smoothing, f_divergence, f_alpha, gamma, discopop_tau) -> None:
    """Check that each option is in its range and is read by one of the losses."""
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    if "exo_pair" in names and label_smoothing == 0:
        raise ValueError("label_smoothing must be positive for exo_pair; its paper recommends 1e-3")
    check_choice("f_divergence", f_divergence, F_DIVERGENCES)
    if f_divergence != "reverse_kl" and set(names) - OF_SCORES - {"sft"}:
        raise ValueError(f"f_divergence {f_divergence!r} is for {sorted(OF_SCORES)}, got {names}")
    if f_alpha != 0.5 and f_divergence != "alpha_divergence":
        raise ValueError(f"f_alpha is for f_divergence 'alpha_divergence', got {f_divergence!r}")
    for option, given, readers in (
        ("label_smoothing", label_smoothing != 0, SMOOTHED),
        ("f_divergence", f_divergence != "reverse_kl", OF_SCORES),
        ("gamma", gamma != 0.5, {"simpo"}),
        ("discopop_tau", discopop_tau != 0.05, {"discopop"}),
    ):
        if given and not readers & set(names):
            raise ValueError(f"{option} is read by {sorted(readers)} only, got {names}")


def _check_tensors(chosen: Tensor, rejected: Tensor, **optional: Tensor | None) -> None:
    check_float("chosen", chosen)
    if chosen.dim() != 1:
        raise ValueError(f"chosen must have shape (B,), got {tuple(chosen.shape)}")
    given = {name: x for name, x in optional.items() if x is not None}
    for name, x in {"rejected": rejected, **given}.items():
        if name.endswith("_length"):
            check_lengths(name, x)
        else:
            check_float(name, x)
        check_beside(name, x, "chosen", chosen)


def _check_needs(names, ref_chosen, ref_rejected, chosen_length, rejected_length, pair_weight, sft, sft_length) -> None:
    """Check that the arguments which the losses need are given, and that none is given which contradicts them."""
    if (ref_chosen is None) != (ref_rejected is None):
        raise ValueError("ref_chosen and ref_rejected must be given both or neither")
    if (sft is None) != (sft_length is None):
        raise ValueError("sft and sft_length must be given both or neither")
    for name in names:
        if name in WITHOUT_REFERENCE and ref_chosen is not None:
            raise ValueError(f"{name} has no reference: ref_chosen and ref_rejected must be None")
        if name in OF_RANKS and pair_weight is not None:
            raise ValueError(f"pair_weight: {name} sorts the batch, so that a weight would meet another pair's value")
        if name in OF_MEANS:
            for argument, length in (("chosen_length", chosen_length), ("rejected_length", rejected_length)):
                if length is None:
                    raise ValueError(f"{name} needs {argument}")
        if name in OF_SFT and sft is None and chosen_length is None:
            raise ValueError(f"{name} needs chosen_length, or sft and sft_length")
    if sft is not None and not OF_SFT & set(names):
        raise ValueError(f"sft is read by {sorted(OF_SFT)} only, got {names}")
