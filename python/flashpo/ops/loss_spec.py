"""The definition of a policy loss: `LossSpec` has one field for each independent choice; `LOSSES` holds published
losses.

With d = log pi - log pi_old, a ratio w = exp(d) of some level, an advantage A, and sg() for "no gradient flows":

    surrogate   loss of a token
    clip        -min(min(w, ratio_cap) A, clip(w, 1 - clip_low, 1 + clip_high) A), at most -dual_clip A where A < 0
    cispo       -sg(clip(w, 1 - clip_low, 1 + clip_high)) A log pi
    sapo        -4 / t sigmoid(t (w - 1)) A, t = sapo_temperatures[A <= 0]
    vespo       -sg(phi) A log pi, phi = exp(l + k log W - l W) of the sequence's ratio W, (k, l) = vespo_gamma[A < 0]
    gmpo        -A exp(mean over the sequence of d, clipped to [-clip_low, clip_high] on the side where A gains)
    dppo_tv     -sg(min(w, ratio_cap) keep) A log pi, keep: pi - pi_old <= clip_high where A > 0, else >= -clip_low
    dppo_kl     the same with KL((pi_old, 1 - pi_old), (pi, 1 - pi)) in place of |pi - pi_old|
    reinforce   -A log pi

The other fields weigh that loss (importance correction, dropping of sequences that are too far off-policy), add beta
times the KL to a reference, average over tokens, and subtract an entropy bonus. Each preset names its source.
"""

import ast
import functools
from collections.abc import Hashable
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal, get_args

import torch

from flashpo.ops._check import check_flag, check_number

Ratio = Literal["token", "sequence", "sequence_token", "sequence_sum"]
Surrogate = Literal["clip", "cispo", "sapo", "vespo", "gmpo", "dppo_tv", "dppo_kl", "reinforce"]
KL = Literal["k1", "abs", "k2", "k3", "k1+", "abs+", "k3+"]
Importance = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask"]
Aggregation = Literal[
    "token_mean", "token_sum", "sequence_mean", "sequence_sum", "fixed_length", "local_token_mean"
]  # fmt: skip
EmptySequences = Literal["zero", "excluded", "surrogate"]
EntropyMean = Literal["tokens", "loss"]

CHOICES = {  # field -> its values, in the order in which the kernels number them
    "ratio": get_args(Ratio),
    "surrogate": get_args(Surrogate),
    "kl": get_args(KL),
    "importance": get_args(Importance),
    "aggregation": get_args(Aggregation),
    "empty_sequences": get_args(EmptySequences),
    "entropy_mean": get_args(EntropyMean),
}


@dataclass(frozen=True)
class LossSpec:
    """A policy loss. `LOSSES["dapo"]` is one; `dataclasses.replace(spec, clip_high=0.3)` makes another.

    The formulas of the surrogates are in the table at the top of flashpo/ops/loss_spec.py.

    Args:
        ratio: the level of the ratio w. "token": each token has its own. "sequence": exp(mean d) of the sequence
            (GSPO). "sequence_token": the same value, but each token's gradient flows to that token only (GSPO-token).
            "sequence_sum": exp(sum d) of the sequence, without the mean (RLOO).
        surrogate: the loss of a token, see the table.
        clip_low, clip_high: how far below and above 1 the ratio may go. None: it is not clipped on that side.
        ratio_cap: the largest ratio. For "clip" this is TRL's delta (INTELLECT-2), for `dppo_*` the cap of the weight.
        dual_clip: c > 1: where A < 0, the loss is at most -c A (arXiv 1912.09729).
        log_ratio_min, log_ratio_max: log w is clamped to these bounds before exp; no gradient flows beyond them (verl).
        sapo_temperatures: the temperature t for A > 0, and for all other tokens.
        vespo_gamma: (k, lambda) for A >= 0, and for A < 0.
        kl_coef: beta, the coefficient of the KL to a reference.
        kl: the estimator of that KL. "k1": log pi - log ref. "abs": |k1|. "k2": k1^2 / 2. "k3": exp(-k1) + k1 - 1
            (Schulman). With "+": the value of the estimator, with the gradient of k2.
        kl_ratio_correction: multiply the KL by w, and differentiate w too, so that the KL is unbiased off-policy
            (DeepSeek-V3.2).
        kl_log_clamp: for k3: |log ref - log pi| is clamped to this number before the estimate (verl).
        kl_clamp: |KL| is clamped to this number after the estimate (verl).
        importance: weights that correct the mismatch of sampler and trainer, from r = pi_old / pi_rollout.
            "token_truncate", "sequence_truncate": r of the token, or the product of r over its sequence, clamped to the
            bounds. "token_mask", "sequence_mask": the same r, but 0 instead where it is outside of the bounds.
            "geometric_mask": r of the token, but 0 where the geometric mean of its sequence is outside. "none": no
            weights. For "vespo", log r is added to log W instead.
        importance_min, importance_max: the bounds. None: there is no bound on that side.
        off_policy_threshold: drop the sequences with A < 0 whose mean of log pi_rollout - log pi is above this number.
        top_entropy: the share of the tokens, those of highest entropy, that have a loss. The KL is over all tokens.
        aggregation: "token_mean": the sum over tokens / their number; the number is that of the global batch if
            `num_items` is given. "local_token_mean": the same, always with the number in this call. "token_sum": the
            sum. "sequence_mean": the mean over sequences of the mean over their tokens. "sequence_sum": the mean over
            sequences of the sum over their tokens. "fixed_length": the mean over sequences of that sum / max_length.
        max_length: for "fixed_length".
        empty_sequences: what a sequence without live tokens contributes. "zero": 0 (TRL). "excluded": it is not counted
            as a sequence (verl). "surrogate": the loss at w = 1, which is -A.
        entropy_coef: the coefficient of the entropy bonus.
        entropy_mean: "tokens": the bonus is a mean over the tokens of this call (TRL). "loss": it is aggregated like
            the loss.

    Raises:
        TypeError, ValueError: a number is not finite, options contradict each other, or an option would do nothing.
            Allowed, though without effect: the numbers of a surrogate that is not selected, and the options of a KL or
            an entropy bonus whose coefficient is 0.
    """

    ratio: Ratio = "token"
    surrogate: Surrogate = "clip"
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    ratio_cap: float | None = None
    dual_clip: float | None = None
    log_ratio_min: float | None = None
    log_ratio_max: float | None = None
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)
    vespo_gamma: tuple[tuple[float, float], tuple[float, float]] = ((2.0, 3.0), (3.0, 2.0))

    kl_coef: float = 0.0
    kl: KL = "k3"
    kl_ratio_correction: bool = False
    kl_log_clamp: float | None = None
    kl_clamp: float | None = None

    importance: Importance = "none"
    importance_min: float | None = None
    importance_max: float | None = None
    off_policy_threshold: float | None = None
    top_entropy: float = 1.0

    aggregation: Aggregation = "token_mean"
    max_length: int | None = None
    empty_sequences: EmptySequences = "zero"
    entropy_coef: float = 0.0
    entropy_mean: EntropyMean = "tokens"

    def __post_init__(self):
        for name, values in CHOICES.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {values}, got {getattr(self, name)!r}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in CHOICES and not (value is None and type(None) in get_args(field.type)):
                _check_numbers(field.name, value, like=field.default)

        def need(fine: bool, message: str) -> None:
            if not fine:
                raise ValueError(message)

        clipped = self.surrogate in ("clip", "gmpo", "dppo_tv", "dppo_kl")
        for name in ("clip_low", "clip_high"):
            value = getattr(self, name)
            need(value is None or not clipped or value >= 0, f"{name} must not be negative, got {value}")
        need(self.clip_low is not None or not clipped, f"{self.surrogate} needs clip_low")
        need(self.clip_high is not None or not clipped, f"{self.surrogate} needs clip_high")
        need(
            self.ratio_cap is None or self.surrogate in ("clip", "dppo_tv", "dppo_kl"),
            f"ratio_cap does nothing for {self.surrogate}",
        )
        need(self.ratio_cap is None or self.ratio_cap > 0, f"ratio_cap must be positive, got {self.ratio_cap}")
        need(self.dual_clip is None or self.surrogate == "clip", f"dual_clip does nothing for {self.surrogate}")
        need(self.dual_clip is None or self.dual_clip > 1, f"dual_clip must be above 1, got {self.dual_clip}")
        need(self.surrogate != "gmpo" or self.ratio == "sequence", "gmpo has a ratio of sequences: ratio='sequence'")
        need(
            not self.surrogate.startswith("dppo") or self.ratio == "token",
            f"{self.surrogate} compares probabilities of tokens: ratio='token'",
        )
        need(self.surrogate != "gmpo" or not self.kl_ratio_correction, "gmpo does not correct its KL by the ratio")
        need(
            all(t > 0 for t in self.sapo_temperatures), f"sapo_temperatures must be positive: {self.sapo_temperatures}"
        )
        if self.surrogate in ("sapo", "vespo", "reinforce"):
            for name, default in (("clip_low", LossSpec.clip_low), ("clip_high", LossSpec.clip_high)):
                need(getattr(self, name) in (None, default), f"{name} does nothing for {self.surrogate}")
        for name in ("kl_log_clamp", "kl_clamp"):
            value = getattr(self, name)
            need(value is None or value > 0, f"{name} must be positive, got {value}")
        need(self.kl_log_clamp is None or self.kl.startswith("k3"), f"kl_log_clamp does nothing for kl={self.kl!r}")
        for name in ("log_ratio", "importance"):
            low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
            need(low is None or high is None or low <= high, f"{name}_min must not be above {name}_max: {low}, {high}")
        need(self.kl_coef != 0 or not self.kl_ratio_correction, "kl_ratio_correction does nothing while kl_coef is 0")
        need(
            self.surrogate != "vespo" or self.importance in ("none", "token_truncate", "token_mask"),
            f"vespo takes importance weights of tokens, not {self.importance}",
        )
        bounded = self.importance_min is not None or self.importance_max is not None
        need(bounded or self.importance == "none", f"importance={self.importance!r} needs importance_min or _max")
        need(not bounded or self.importance != "none", "importance_min and _max do nothing without importance")
        need(0 < self.top_entropy <= 1, f"top_entropy must be in (0, 1], got {self.top_entropy}")
        need(
            self.max_length is None or self.aggregation == "fixed_length",
            f"max_length does nothing for aggregation={self.aggregation!r}",
        )
        need(
            self.max_length is None or (isinstance(self.max_length, int) and self.max_length > 0),
            f"max_length must be a positive integer, got {self.max_length}",
        )
        need(
            self.empty_sequences != "surrogate" or self.aggregation == "sequence_mean",
            "empty_sequences='surrogate' is for aggregation='sequence_mean'",
        )

    @functools.cached_property
    def key(self) -> str:
        """The whole spec as a string, because operators take strings; `from_key` turns it into a spec again."""
        return repr(asdict(self))

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def from_key(key: str) -> "LossSpec":
        return LossSpec(**ast.literal_eval(key))

    @property
    def of_sequences(self) -> bool:
        """Whether a whole sequence has one ratio."""
        return self.ratio != "token"

    @property
    def zero_advantage_is_zero_gradient(self) -> bool:
        """Whether a sequence whose advantage is 0 at every token has no gradient. Each surrogate is proportional to A;
        a KL and an entropy bonus are not."""
        return self.kl_coef == 0 and self.entropy_coef == 0


def _check_numbers(name: str, value: object, like: object) -> None:
    """Check a finite Python number, which `key` can write. If `like` is a bool or a tuple, check the same kind of
    value."""
    if isinstance(like, tuple):
        if not isinstance(value, tuple) or len(value) != len(like):
            raise ValueError(f"{name} must be a tuple like {like}, got {value!r}")
        for each, other in zip(value, like):
            _check_numbers(name, each, other)
    elif isinstance(like, bool):
        check_flag(name, value)  # type: ignore[arg-type]
    elif type(value) not in (int, float):
        raise TypeError(f"{name} must be a number of Python, got {type(value).__name__}")
    else:
        check_number(name, value)  # type: ignore[arg-type]


FIELDS = tuple(field.name for field in fields(LossSpec))

_grpo = LossSpec(aggregation="sequence_mean")
_gspo = LossSpec(ratio="sequence", clip_low=3e-4, clip_high=4e-4, aggregation="sequence_mean")
_gmpo = LossSpec(ratio="sequence", surrogate="gmpo", clip_low=0.4, clip_high=0.4, aggregation="sequence_mean")
_dppo = LossSpec(surrogate="dppo_tv", ratio_cap=20.0)
_verl = LossSpec(
    log_ratio_min=-20.0, log_ratio_max=20.0, kl_log_clamp=20.0, kl_clamp=10.0, empty_sequences="excluded"
)  # fmt: skip

LOSSES: dict[str, LossSpec] = {
    "ppo": LossSpec(),  # arXiv 1707.06347
    "grpo": _grpo,  # arXiv 2402.03300, where kl_coef is 0.04
    "bnpo": LossSpec(aggregation="local_token_mean"),  # TRL's name
    "dr_grpo": LossSpec(aggregation="fixed_length"),  # arXiv 2503.20783; needs max_length
    "dapo": LossSpec(clip_high=0.28),  # arXiv 2503.14476
    "gspo": _gspo,  # arXiv 2507.18071
    "gspo_token": replace(_gspo, ratio="sequence_token"),
    "luspo": replace(_gspo, clip_low=2e-3, clip_high=2.5e-3, aggregation="sequence_sum"),  # arXiv 2602.05261
    "cispo": LossSpec(surrogate="cispo", clip_low=None, clip_high=4.0),  # arXiv 2506.13585, the cap of 2510.13786
    "sapo": replace(_grpo, surrogate="sapo"),  # arXiv 2511.20347
    "vespo": LossSpec(surrogate="vespo"),  # arXiv 2602.10693
    "gmpo": replace(_gmpo, empty_sequences="surrogate"),  # arXiv 2507.20673
    "dppo_tv": _dppo,  # arXiv 2602.04879
    "dppo_kl": replace(_dppo, surrogate="dppo_kl"),
    "rloo": replace(_grpo, ratio="sequence_sum", empty_sequences="surrogate"),  # arXiv 2402.14740, as in TRL
    "reinforce": LossSpec(surrogate="reinforce"),
    # verl 0.9.1: dual clip is always on, logarithms are clamped, and empty sequences are not counted. verl clamps the
    # KL for k3 only: with another estimator, set kl_log_clamp and kl_clamp to None.
    "verl_ppo": replace(_verl, dual_clip=3.0),
    "verl_gspo": replace(
        _verl, ratio="sequence_token", log_ratio_min=None, log_ratio_max=10.0, aggregation="sequence_mean"
    ),
    "verl_cispo": replace(_verl, surrogate="cispo"),
    "verl_sapo": replace(_verl, surrogate="sapo", aggregation="sequence_mean"),
    "verl_gmpo": replace(_gmpo, kl_log_clamp=20.0, kl_clamp=10.0),
    "verl_dppo_tv": replace(_verl, surrogate="dppo_tv", ratio_cap=3.0),
    "verl_dppo_kl": replace(_verl, surrogate="dppo_kl", ratio_cap=3.0),
    "openrlhf_ppo": LossSpec(kl_clamp=10.0, empty_sequences="excluded"),
}


@torch.compiler.assume_constant_result  # a function separate from _resolve, because Dynamo looks through a cache
def resolve(loss: str | LossSpec, overrides: tuple[tuple[str, object], ...]) -> LossSpec:
    """The spec that `loss` names or is, with some of its fields replaced."""
    for name, value in (("loss", loss), *overrides):
        if not isinstance(value, Hashable):
            raise TypeError(f"{name} must not be a {type(value).__name__}")
    return _resolve(loss, overrides, tuple(type(value) for _, value in overrides))


@torch.compiler.assume_constant_result  # Dynamo does not see through a cached property
def resolved_key(loss: str | LossSpec, overrides: tuple[tuple[str, object], ...]) -> str:
    """The key of `resolve(loss, overrides)`."""
    return resolve(loss, overrides).key


@functools.lru_cache(maxsize=256)
def _resolve(loss: str | LossSpec, overrides: tuple[tuple[str, object], ...], types: tuple[type, ...]) -> LossSpec:
    """`resolve`, cached. `types` is part of the cache's key, because True and 1.0 are equal keys otherwise."""
    if isinstance(loss, str) and loss.startswith("{"):
        try:
            loss = LossSpec.from_key(loss)
        except (SyntaxError, TypeError, ValueError) as error:
            raise ValueError(f"loss is not the key of a LossSpec: {error}") from error
    elif isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {sorted(LOSSES)} or a LossSpec, got {loss!r}")
        loss = LOSSES[loss]
    elif not isinstance(loss, LossSpec):
        raise TypeError(f"loss must be a name in LOSSES or a LossSpec, got {type(loss).__name__}")
    if unknown := [name for name, _ in overrides if name not in FIELDS]:
        raise TypeError(f"policy_loss has no option {', '.join(unknown)}; a LossSpec has {', '.join(FIELDS)}")
    return replace(loss, **dict(overrides))  # type: ignore[arg-type]  # __post_init__ checks them
