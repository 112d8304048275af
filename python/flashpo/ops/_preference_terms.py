"""The preference losses as data: for each name a function from a batch of pairs to one value per pair.

Notation. l_c and l_w are the log-probabilities of a pair's chosen and rejected completion, as sums over n_c and n_w
tokens. x = l - l_ref is the log-ratio to the reference; without a reference x is l itself. f is the score of the
f-divergence, by default the identity. b is beta, e is label_smoothing, and s is the logistic function.

    d = f(x_c) - f(x_w)    dn = f(x_c) / n_c - f(x_w) / n_w    dm = f(l_c / n_c) - f(l_w / n_w)
    S(z) = -(1 - e) log s(z) - e log s(-z)

Where a value is computed by another expression than its formula, the docstring says why.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from flashpo.ops._first_order import first_order

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def f_score(x: Tensor, divergence: str, alpha: float) -> Tensor:
    """f'(e^x) of the f-divergence up to a constant (f-DPO, arXiv 2309.16240). alpha 1 is reverse KL, 0 is forward KL.

    The alpha divergence gives (e^((alpha - 1) x) - 1) / (alpha - 1). Its exponent is limited before e^ overflows (to 80
    in fp32, as in TRL).
    """
    if divergence == "js_divergence":
        return math.log(2.0) + logsigmoid(x)
    power = {"reverse_kl": 1.0, "forward_kl": 0.0}.get(divergence, alpha) - 1
    if power == 0:
        return x
    held = 700.0 if x.dtype == torch.float64 else 80.0
    return torch.expm1((power * x).clamp(max=held)) / power


@dataclass(frozen=True)
class Pairs:
    """B pairs as tensors (B,), and the options of the losses. The caller gives the lengths that its losses need."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor | None
    ref_rejected: Tensor | None
    chosen_length: Tensor
    rejected_length: Tensor
    sft: Tensor
    sft_length: Tensor
    beta: float
    label_smoothing: float
    f_divergence: str
    f_alpha: float
    gamma: float
    discopop_tau: float

    def score(self, x: Tensor) -> Tensor:
        return f_score(x, self.f_divergence, self.f_alpha)

    def smoothed(self, z: Tensor) -> Tensor:
        """S(z)."""
        return -(1 - self.label_smoothing) * logsigmoid(z) - self.label_smoothing * logsigmoid(-z)

    @property
    def ratios(self) -> tuple[Tensor, Tensor]:
        """(x_c, x_w)."""
        if self.ref_chosen is None or self.ref_rejected is None:
            return self.chosen, self.rejected
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """(l_c / n_c, l_w / n_w)."""
        return per_token(self.chosen, self.chosen_length), per_token(self.rejected, self.rejected_length)

    @property
    def margin(self) -> Tensor:
        """d."""
        x_c, x_w = self.ratios
        return self.score(x_c) - self.score(x_w)

    @property
    def margin_per_token(self) -> Tensor:
        """dn."""
        x_c, x_w = self.ratios
        return per_token(self.score(x_c), self.chosen_length) - per_token(self.score(x_w), self.rejected_length)


def per_token(total: Tensor, length: Tensor) -> Tensor:
    return total / length.clamp(min=1).to(total.dtype)  # the sum of an empty completion is 0, and so is its mean


def sigmoid(p: Pairs) -> Tensor:
    """-log s(b d). DPO, arXiv 2305.18290."""
    return -logsigmoid(p.beta * p.margin)


def cdpo(p: Pairs) -> Tensor:
    """S(b d). Conservative DPO: `sigmoid` with OpenRLHF's smoothing (TRL has none);
    https://ericmitchell.ai/cdpo.pdf."""
    return p.smoothed(p.beta * p.margin)


def hinge(p: Pairs) -> Tensor:
    """max(0, 1 - b d). SLiC, arXiv 2305.10425."""
    return torch.relu(1 - p.beta * p.margin)


def ipo(p: Pairs) -> Tensor:
    """(dn - 1 / (2 b))^2. IPO, arXiv 2310.12036, per token as in its authors' code and in TRL."""
    return (p.margin_per_token - 1 / (2 * p.beta)) ** 2


def exo_pair(p: Pairs) -> Tensor:
    """KL of (s(b d), s(-b d)) from (1 - e, e). EXO, arXiv 2402.00856, equation 16; e > 0."""
    z = p.beta * p.margin
    win = torch.sigmoid(z) * (logsigmoid(z) - math.log1p(-p.label_smoothing))
    return win + torch.sigmoid(-z) * (logsigmoid(-z) - math.log(p.label_smoothing))


def nca_pair(p: Pairs) -> Tensor:
    """-log s(b x_c) - log s(-b x_c) / 2 - log s(-b x_w) / 2. NCA, arXiv 2402.05369."""
    z_c, z_w = (p.beta * x for x in p.ratios)
    return -logsigmoid(z_c) - 0.5 * logsigmoid(-z_c) - 0.5 * logsigmoid(-z_w)


def robust(p: Pairs) -> Tensor:
    """(-(1 - e) log s(b d) + e log s(-b d)) / (1 - 2 e). Robust DPO, arXiv 2403.00409."""
    z, flipped = p.beta * p.margin, p.label_smoothing
    return (-(1 - flipped) * logsigmoid(z) + flipped * logsigmoid(-z)) / (1 - 2 * flipped)


def bco_pair(p: Pairs) -> Tensor:
    """-log s(b x_c) - log s(-b x_w). BCO, arXiv 2404.04656, without its running mean of rewards."""
    x_c, x_w = p.ratios
    return -logsigmoid(p.beta * x_c) - logsigmoid(-p.beta * x_w)


def sppo_hard(p: Pairs) -> Tensor:
    """(x_c - 1 / (2 b))^2 + (x_w + 1 / (2 b))^2. SPPO, arXiv 2405.00675, for preferences that are certain."""
    x_c, x_w = p.ratios
    return (x_c - 0.5 / p.beta) ** 2 + (x_w + 0.5 / p.beta) ** 2


def aot(p: Pairs) -> Tensor:
    """S(b (sorted(l_c - l_w) - sorted(l_ref_c - l_ref_w))), a value per rank in the batch. AOT, arXiv 2406.05882."""
    margin = (p.chosen - p.rejected).sort().values
    if p.ref_chosen is None or p.ref_rejected is None:
        return p.smoothed(p.beta * margin)
    return p.smoothed(p.beta * (margin - (p.ref_chosen - p.ref_rejected).sort().values))


def aot_unpaired(p: Pairs) -> Tensor:
    """S(b (sorted(x_c) - sorted(x_w))), a value per rank in the batch. AOT without pairs."""
    x_c, x_w = p.ratios
    return p.smoothed(p.beta * (x_c.sort().values - x_w.sort().values))


def apo_zero(p: Pairs) -> Tensor:
    """1 - s(b x_c) + s(b x_w). APO, arXiv 2408.06266, equation 7."""
    x_c, x_w = p.ratios
    return torch.sigmoid(-p.beta * x_c) + torch.sigmoid(p.beta * x_w)


def apo_down(p: Pairs) -> Tensor:
    """s(b x_c) + 1 - s(b (x_c - x_w)). APO, equation 8."""
    x_c, x_w = p.ratios
    return torch.sigmoid(p.beta * x_c) + torch.sigmoid(-p.beta * (x_c - x_w))


def discopop(p: Pairs) -> Tensor:
    """-(1 - m) log s(z) + m e^-z, z = b d, m = s(z / tau). DiscoPOP, arXiv 2406.08414, equation 5.

    For very negative z, m underflows and e^-z overflows in fp32. There the product is computed as one exponential.
    """
    z = p.beta * p.margin
    mix = torch.sigmoid(z / p.discopop_tau)
    near = mix * torch.exp(-z.clamp(min=-10))
    far = torch.exp(logsigmoid(z / p.discopop_tau) - z)
    return -(1 - mix) * logsigmoid(z) + torch.where(z < -10, far, near)


def sft(p: Pairs) -> Tensor:
    """-l B / sum n. Its mean over the batch is the negative log-likelihood per token."""
    return -p.sft * (p.sft.shape[0] / p.sft_length.sum().clamp(min=1).to(p.sft.dtype))


def sigmoid_norm(p: Pairs) -> Tensor:
    """-log s(b dn). Length-normalised DPO, arXiv 2411.15124."""
    return -logsigmoid(p.beta * p.margin_per_token)


def simpo(p: Pairs) -> Tensor:
    """S(b dm - gamma). SimPO, arXiv 2405.14734; AlphaPO, arXiv 2501.03884, with f = (1 - e^(-a l)) / a."""
    mean_c, mean_w = p.means
    return p.smoothed(p.beta * (p.score(mean_c) - p.score(mean_w)) - p.gamma)


def odds_ratio(p: Pairs) -> Tensor:
    """-b log s(log odds_c - log odds_w), odds = P / (1 - P), P = e^(l / n). ORPO, arXiv 2403.07691."""
    return p.beta * OddsRatio.apply(*p.means)


def cpo(p: Pairs) -> Tensor:
    """S(b d) + sft. CPO, arXiv 2401.08417. TPO, arXiv 2405.16681, if `sft` is that of the gold completion."""
    return cdpo(p) + sft(p)


def orpo(p: Pairs) -> Tensor:
    """odds_ratio + sft."""
    return odds_ratio(p) + sft(p)


class OddsRatio(torch.autograd.Function):
    """-log s(log odds_c - log odds_w) of mean log-probabilities c, w < 0, accurate up to probability 1.

    With Q = 1 - e^l this is log(1 + r), r = e^(w - c) Q_c / Q_w. Its derivatives by c and w are
    -e^w / (e^c Q_w + e^w Q_c) and e^w Q_c / (Q_w (e^c Q_w + e^w Q_c)). At Q_c = 0, autograd would compute them as
    0 * inf. A log-probability above -epsilon may be rounded to 0; it counts as -epsilon.
    """

    @staticmethod
    def forward(ctx, c, w):
        ctx.inputs = c, w
        c, w = (x.where(x < 0, -torch.finfo(x.dtype).eps) for x in (c, w))
        ctx.save_for_backward(c, w)
        return -logsigmoid(c - w - log1mexp(c) + log1mexp(w))

    @staticmethod
    @first_order
    def backward(ctx, d_out):
        c, w = ctx.saved_tensors
        log_q_c, log_q_w = log1mexp(c), log1mexp(w)
        both = torch.logaddexp(c + log_q_w, w + log_q_c)
        return -d_out * (w - both).exp(), d_out * (w + log_q_c - log_q_w - both).exp()


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, by the branch that keeps more digits."""
    return torch.where(x < -math.log(2.0), torch.log1p(-x.exp()), torch.log(-torch.expm1(x)))


PREFERENCE_LOSSES: dict[str, Callable[[Pairs], Tensor]] = {
    loss.__name__: loss
    for loss in (
        *(sigmoid, cdpo, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired),
        *(apo_zero, apo_down, discopop, sft, sigmoid_norm, simpo, odds_ratio, cpo, orpo),
    )
}

# Which losses read an option. The others have no such option.
SMOOTHED = {"cdpo", "exo_pair", "robust", "aot", "aot_unpaired", "simpo", "cpo"}
OF_SCORES = {"sigmoid", "cdpo", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm", "simpo", "cpo"}
OF_MEANS = {"ipo", "sigmoid_norm", "simpo", "odds_ratio", "orpo"}
OF_SFT = {"sft", "cpo", "orpo"}
OF_RANKS = {"aot", "aot_unpaired"}
WITHOUT_REFERENCE = {"simpo", "odds_ratio", "cpo", "orpo"}
