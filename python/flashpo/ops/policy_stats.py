"""What one pass of `policy_loss` counts, in one small tensor, so that logging costs one copy and no synchronisation."""

import torch
import torch.distributed as dist
from torch import Tensor

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

    def reduce(self, group: dist.ProcessGroup | None = None) -> "PolicyStats":
        """The same of all ranks together: two small collectives, still without synchronising the host."""
        sums, extremes = self.values.clone().split([len(SUMS), len(EXTREMES)])
        sign = extremes.new_tensor([1.0 if largest else -1.0 for _, largest in EXTREMES])
        sign = sign.view(-1, *[1] * (extremes.dim() - 1))
        dist.all_reduce(sums, group=group)
        extremes = extremes * sign
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
        return PolicyStats(torch.cat([sums, extremes * sign]))

    def as_dict(self) -> dict[str, float]:
        """Everything as numbers, by one copy to the host."""
        host = PolicyStats(self.values.detach().cpu())
        names = (*NAMES, "effective_sample_size", "weight_sample_size")
        return {name: getattr(host, name).item() for name in names}
