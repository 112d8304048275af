"""What one pass of `policy_loss` counts, in one small tensor: logging costs one copy and no other synchronisation."""

import functools
import math

import torch
import torch.distributed as dist
from torch import Tensor

# The edges of the bins in which log-ratios are counted; the negatives of these numbers are edges, too. An edge belongs
# to the bin away from 0. Bins are half octaves around the usual clipping bounds (0.8 ... 1.28). They are wider towards
# 0, where they show the difference between sampler and trainer or between two sequences' ratios, and wider outwards,
# where the extremes are known separately. The exponent and the first bit of the mantissa of a float determine its bin.
LOG_RATIO_EDGES = (2**-10, 2**-8, 2**-6, 2**-5, 1.5 * 2**-5, 2**-4, 1.5 * 2**-4, 2**-3, 1.5 * 2**-3, 2**-2, 2**-1, 2.0)
LOG_RATIO_BINS = tuple(f"log_ratio_bin_{i}" for i in range(2 * len(LOG_RATIO_EDGES) + 1))

# Sums over the live tokens of this call, unless a comment says otherwise. A "ratio" belongs to a token, or to a
# sequence if both the spec's ratios and the advantages are per sequence.
SUMS = (
    "loss",  # the loss that is returned; not a sum
    "policy_loss",  # the loss without scale and entropy bonus
    "tokens",
    "sequences",
    "live_sequences",  # sequences with at least one live token
    "entropy",
    "kl",  # the KL to the reference, as it enters the loss
    "approx_kl",  # log pi_old - log pi
    "ratios",  # the number of ratios
    "ratio",
    "ratio_squared",
    "clip_low",  # ratios below their bound where that stops the gradient: A < 0
    "clip_high",  # ratios above their bound where that stops the gradient: A > 0
    "below",  # the same for any sign of A
    "above",
    "capped",  # ratios held by dual_clip or ratio_cap
    "saturated",  # |log w| beyond SATURATION
    "weights",  # the number of importance weights, of tokens or of sequences
    "weight",
    "weight_squared",
    "off_policy_sequences",  # dropped by off_policy_threshold
    "high_entropy_tokens",  # tokens that top_entropy keeps; all tokens if it is 1
    "high_entropy",  # the sum of their entropy
    "phis",  # the number of vespo's weights phi: one per sequence, or per token if advantages are per token
    "phi",
    *LOG_RATIO_BINS,  # the number of ratios in each bin
)
EXTREMES = (  # name -> whether the extreme over ranks is the largest value (otherwise the smallest)
    ("ratio_min", False),
    ("ratio_max", True),
    ("clip_low_min", False),  # of the fractions of single sequences
    ("clip_high_max", True),
    ("weight_min", False),
    ("weight_max", True),
)
NAMES = (*SUMS, *(name for name, _ in EXTREMES))
INDEX = {name: i for i, name in enumerate(NAMES)}
# For as_dict
QUANTILES = {"ratio_q01": 0.01, "ratio_q05": 0.05, "ratio_q50": 0.5, "ratio_q95": 0.95, "ratio_q99": 0.99}
# How sums are averaged: name in SUMS -> name of the count by which it is divided
OVER = {
    "entropy": "tokens", "kl": "tokens", "approx_kl": "tokens", "saturated": "tokens",
    "high_entropy": "high_entropy_tokens", "ratio": "ratios", "clip_low": "ratios", "clip_high": "ratios",
    "below": "ratios", "above": "ratios", "capped": "ratios", "weight": "weights",
    "off_policy_sequences": "sequences", "phi": "phis",
}  # fmt: skip


class PolicyStats:
    """Means, counts and extremes of a policy loss. Every attribute is a scalar tensor on the loss's device.

    Attributes have the names of this file: those in OVER are means (`stats.kl`, `stats.entropy`, `stats.clip_low`), the
    other ones in SUMS are sums, and those in EXTREMES are extremes (inf or -inf if there was nothing).
    `effective_sample_size` is (sum w)^2 / sum w^2 of the ratios, divided by their number; `weight_sample_size` is the
    same for the importance weights. `ratio_quantile(q)` is any quantile of the ratios. With ratios of sequences, a
    sequence without live tokens counts with the ratio 1, as in TRL, whether it is a row of padding or an empty part of
    a flat batch.
    """

    def __init__(self, values: Tensor):
        self.values = values  # (len(NAMES),), or (len(NAMES), M) for M losses

    def __getattr__(self, name: str) -> Tensor:
        if name not in INDEX:
            raise AttributeError(f"PolicyStats has no {name!r}; it has {', '.join(NAMES)}")
        value = self.values[INDEX[name]]
        return value / self.values[INDEX[OVER[name]]].clamp(min=1) if name in OVER else value

    @property
    def effective_sample_size(self) -> Tensor:
        return self._sample_size("ratio", "ratios")

    @property
    def weight_sample_size(self) -> Tensor:
        return self._sample_size("weight", "weights")

    def _sample_size(self, name: str, count: str) -> Tensor:
        total, squares = self.values[INDEX[name]], self.values[INDEX[f"{name}_squared"]]
        return total * total / (squares * self.values[INDEX[count]]).clamp(min=torch.finfo(total.dtype).tiny)

    def ratio_quantile(self, q: float) -> Tensor:
        """The quantile q of the ratios, estimated from their counts in bins and their extremes. NaN without ratios.

        Log-ratios are assumed to spread evenly over a bin, or over the part of it between the extremes. The result is
        in the bin of one of the two ratios between which `torch.quantile` interpolates. So its error is at most the
        width of that bin: 0.2 % at 1, 1.6 % in 0.97 ... 1.03, 6.5 % in 0.8 ... 1.28. It is exact if q is 0 or 1 or all
        ratios are the same. `ratio_quantiles` is always exact, but needs more passes.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"q must be in [0, 1], got {q}")
        counts = self.values[INDEX[LOG_RATIO_BINS[0]] : INDEX[LOG_RATIO_BINS[-1]] + 1]
        edges = _column((-math.inf, *(-x for x in reversed(LOG_RATIO_EDGES)), *LOG_RATIO_EDGES, math.inf), counts)
        edges = edges.maximum(self.ratio_min.log()).minimum(self.ratio_max.log())
        upto = counts.cumsum(0)
        wanted = q * upto[-1:]
        within = ((upto < wanted) | (upto == 0)).sum(0, keepdim=True).clamp(max=len(counts) - 1)
        low, high, count = edges.gather(0, within), edges.gather(0, within + 1), counts.gather(0, within)
        share = (wanted - upto.gather(0, within) + count) / count  # 0/0 without ratios
        return (low + share * (high - low)).exp()[0]

    def reduce(self, group: dist.ProcessGroup | None = None) -> "PolicyStats":
        """The statistics of all ranks together. Takes two small collectives and does not synchronise the host."""
        sums, extremes = self.values.clone().split([len(SUMS), len(EXTREMES)])
        sign = _column(tuple(1.0 if largest else -1.0 for _, largest in EXTREMES), extremes)
        dist.all_reduce(sums, group=group)
        extremes = extremes * sign
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
        return PolicyStats(torch.cat([sums, extremes * sign]))

    def as_dict(self) -> dict[str, float]:
        """All statistics as Python numbers, by one copy to the host."""
        host = PolicyStats(self.values.detach().cpu())
        names = [name for name in NAMES if name not in LOG_RATIO_BINS]
        found = {name: getattr(host, name).item() for name in (*names, "effective_sample_size", "weight_sample_size")}
        return found | {name: host.ratio_quantile(q).item() for name, q in QUANTILES.items()}


def _column(numbers: tuple[float, ...], like: Tensor) -> Tensor:
    """The numbers as a tensor (len(numbers),), or (len(numbers), 1) if `like` has two dimensions."""
    return _kept(numbers, like.dtype, like.device).view(-1, *[1] * (like.dim() - 1))


@functools.lru_cache(maxsize=64)
def _kept(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Kept between calls, because copying numbers from the host would wait."""
    return torch.tensor(numbers, dtype=dtype, device=device)
