"""What one pass of `policy_loss` counts, in one small tensor, so that logging costs one copy and no synchronisation."""

import functools
import math

import torch
import torch.distributed as dist
from torch import Tensor

# Log-ratios are counted in the bins between these numbers and their negatives, of which each belongs to its outer bin.
# Half octaves where the usual bounds of clipping are (0.8 ... 1.28), wider bins inwards, down to what separates a
# sampler from a trainer or the ratios of two sequences, and outwards, where the extremes are known besides. A float's
# exponent and first bit of mantissa tell its bin.
LOG_RATIO_EDGES = (2**-10, 2**-8, 2**-6, 2**-5, 1.5 * 2**-5, 2**-4, 1.5 * 2**-4, 2**-3, 1.5 * 2**-3, 2**-2, 2**-1, 2.0)
LOG_RATIO_BINS = tuple(f"log_ratio_bin_{i}" for i in range(2 * len(LOG_RATIO_EDGES) + 1))

# Sums over this call's live tokens, unless said otherwise; a "ratio" is one token's, or one sequence's where the spec
# has ratios of sequences and the advantages are of sequences too.
SUMS = (
    "loss",  # what is returned, divided by nothing more
    "policy_loss",  # without scale and entropy bonus
    "tokens",
    "sequences",
    "live_sequences",  # with at least one live token
    "entropy",
    "kl",  # to the reference, as it enters the loss
    "approx_kl",  # log pi_old - log pi
    "ratios",  # how many
    "ratio",
    "ratio_squared",
    "clip_low",  # below its bound, where that stops the gradient: A < 0
    "clip_high",  # above its bound, A > 0
    "below",  # the same, whatever the sign of A
    "above",
    "capped",  # by dual_clip or ratio_cap
    "saturated",  # |log w| beyond SATURATION
    "weights",  # how many importance weights: of tokens or sequences
    "weight",
    "weight_squared",
    "off_policy_sequences",  # dropped by off_policy_threshold
    "high_entropy_tokens",  # that top_entropy keeps: all tokens where it is 1
    "high_entropy",  # the entropy of those
    "phis",  # how many weights phi of vespo: of sequences, or of tokens where the advantages are theirs
    "phi",
    *LOG_RATIO_BINS,  # how many of the ratios
)
EXTREMES = (  # name -> whether the largest (else the smallest) of all ranks counts
    ("ratio_min", False),
    ("ratio_max", True),
    ("clip_low_min", False),  # over the sequences' fractions
    ("clip_high_max", True),
    ("weight_min", False),
    ("weight_max", True),
)
NAMES = (*SUMS, *(name for name, _ in EXTREMES))
INDEX = {name: i for i, name in enumerate(NAMES)}
QUANTILES = {"ratio_q01": 0.01, "ratio_q05": 0.05, "ratio_q50": 0.5, "ratio_q95": 0.95, "ratio_q99": 0.99}  # as_dict's
# Ways to average a sum: name in SUMS -> what it is divided by
OVER = {
    "entropy": "tokens", "kl": "tokens", "approx_kl": "tokens", "saturated": "tokens",
    "high_entropy": "high_entropy_tokens", "ratio": "ratios", "clip_low": "ratios", "clip_high": "ratios",
    "below": "ratios", "above": "ratios", "capped": "ratios", "weight": "weights",
    "off_policy_sequences": "sequences", "phi": "phis",
}  # fmt: skip


class PolicyStats:
    """Means, counts and extremes of a policy loss; every attribute is a scalar tensor on the device of the loss.

    `stats.kl`, `stats.entropy`, `stats.clip_low` ...: the names of OVER are means; the other names of SUMS are sums;
    those of EXTREMES are extremes (inf or -inf where there was nothing). `effective_sample_size` is
    (sum w)^2 / sum w^2 of the ratios as a share of their number, `weight_sample_size` that of the importance weights.
    `ratio_quantile(q)` is any quantile of the ratios. Where ratios are of sequences, one without live tokens has the
    ratio 1, as in TRL, whether it is a row of padding or an empty part of a flat batch.
    """

    def __init__(self, values: Tensor):
        self.values = values  # (len(NAMES),), or (len(NAMES), M): of M losses

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
        """The quantile q of the ratios, NaN without any: from their counts in bins, the extremes being the ends.

        Log-ratios are taken as spread evenly over a bin, or over its part within the extremes. The result is in the bin
        of one of the two ratios between which `torch.quantile` interpolates, so it is known to that bin's width: 0.2 %
        at 1, 1.6 % in 0.97 ... 1.03, 6.5 % in 0.8 ... 1.28; exactly where q is 0 or 1 or all ratios are the same.
        `ratio_quantiles` is exact everywhere, by more passes.
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
        """The same of all ranks together: two small collectives, still without synchronising the host."""
        sums, extremes = self.values.clone().split([len(SUMS), len(EXTREMES)])
        sign = _column(tuple(1.0 if largest else -1.0 for _, largest in EXTREMES), extremes)
        dist.all_reduce(sums, group=group)
        extremes = extremes * sign
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
        return PolicyStats(torch.cat([sums, extremes * sign]))

    def as_dict(self) -> dict[str, float]:
        """Everything as numbers, by one copy to the host."""
        host = PolicyStats(self.values.detach().cpu())
        names = [name for name in NAMES if name not in LOG_RATIO_BINS]
        found = {name: getattr(host, name).item() for name in (*names, "effective_sample_size", "weight_sample_size")}
        return found | {name: host.ratio_quantile(q).item() for name, q in QUANTILES.items()}


def _column(numbers: tuple[float, ...], like: Tensor) -> Tensor:
    """(len(numbers),) or (len(numbers), 1), as `like` has dimensions."""
    return _kept(numbers, like.dtype, like.device).view(-1, *[1] * (like.dim() - 1))


@functools.lru_cache(maxsize=64)
def _kept(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """From call to call: a copy of the host's numbers would be waited for."""
    return torch.tensor(numbers, dtype=dtype, device=device)
