"""Inputs of the contract tests: the two log-prob operators, also written in plain torch, over a grid of inputs."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import flashpo
from flashpo import TokenStats, linear_logprob, selective_log_softmax

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALL = TokenStats._fields
IGNORED = -100


def eager(z, target):
    """(logprob, entropy, log_sum_sq_probs, mean_logit, is_top1) of logits z, in torch, and zeros where ignored."""
    logp = z.log_softmax(-1)
    finite = logp.where(logp > -torch.inf, 0.0)
    chosen = logp.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    entropy = -(logp.exp() * finite).sum(-1)
    top1 = z.argmax(-1) == target
    live = target != IGNORED
    rows = (chosen, entropy, (2 * logp).logsumexp(-1), z.mean(-1))
    return TokenStats(*(row.where(live, 0.0) for row in rows), top1 & live)


@dataclasses.dataclass(frozen=True)
class Case:
    """`ours(*inputs)` and `plain(*inputs)` are the same function; `inputs` are float64, to be cast."""

    name: str
    tokens: tuple[int, ...]
    hidden: int | None  # None: from logits
    vocab: int
    bias: bool = False
    temperature: float | str = 1.0  # "token": one for each
    logit_scale: float = 1.0
    softcap: float | None = None
    ignored: str = "none"  # none | some | all
    sliced: bool = False  # inputs are views of larger tensors
    masked: int = 0  # so many leading vocabulary entries are -inf

    def make(self):
        target = torch.randint(self.masked, self.vocab, self.tokens)
        if self.ignored != "none":
            target[torch.rand(self.tokens) < (0.4 if self.ignored == "some" else 2)] = IGNORED
        if self.hidden is None:
            x = torch.randn(*self.tokens, self.vocab, dtype=torch.float64) * 4
            x[..., : self.masked] = -torch.inf
            return [x], target
        h = torch.randn(*self.tokens, self.hidden, dtype=torch.float64)
        w = torch.randn(self.vocab, self.hidden, dtype=torch.float64) * (4 / self.hidden**0.5)
        return [h, w] + ([torch.randn(self.vocab, dtype=torch.float64)] if self.bias else []), target

    def cast(self, inputs, dtype, wide=None):
        """Leaves of `dtype`'s precision, kept as `wide`; sliced out of larger tensors where the case says so."""
        leaves = []
        for x in inputs:
            x = x.to(dtype).to(wide or dtype)
            if self.sliced:
                padded = x.new_full([n + 3 for n in x.shape], torch.nan)
                view = padded[tuple(slice(1, n + 1) for n in x.shape)]
                x = view.copy_(x)
            leaves.append(x.requires_grad_())
        return leaves

    def options(self, target):
        if self.temperature == "token":
            generator = torch.Generator().manual_seed(0)
            return {"temperature": torch.rand(target.shape, generator=generator) + 0.5}
        return {"temperature": self.temperature}

    def ours(self, inputs, target):
        options = self.options(target)
        if self.hidden is None:
            return selective_log_softmax(inputs[0], target, outputs=ALL, **options)
        bias = inputs[2] if self.bias else None
        head = {"logit_scale": self.logit_scale, "softcap": self.softcap}
        return linear_logprob(inputs[0], inputs[1], target, bias, outputs=ALL, **head, **options)

    def plain(self, inputs, target):
        z = inputs[0] if self.hidden is None else F.linear(*inputs)
        z = z.to(torch.promote_types(z.dtype, torch.float32)) * self.logit_scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        temperature = self.options(target)["temperature"]
        if isinstance(temperature, torch.Tensor):
            temperature = temperature[..., None].to(z.dtype)
        return eager(z / temperature, target)


CASES = [
    Case("logits", (3, 5), None, 1031),
    Case("logits ragged and sliced", (3, 5), None, 333, temperature=0.7, ignored="some", sliced=True),
    Case("logits one row", (1,), None, 17, temperature=4.0),  # less than a vector; flat, or torch may be exact by luck
    Case("logits four dimensions", (2, 3, 2), None, 64, temperature=1.3),
    Case("logits masked vocabulary", (2, 7), None, 2500, masked=1200),  # the first blocks hold nothing but -inf
    Case("logits all ignored", (2, 3), None, 100, ignored="all"),
    Case("logits empty", (0,), None, 100),
    Case("logits V 32768", (5,), None, 32768),
    Case("logits V 151936", (3,), None, 151936, temperature=1.1),
    Case("logits V 262144", (2,), None, 262144),
    Case("head", (2, 19), 24, 1031),
    Case("head with everything", (37,), 40, 777, True, 0.8, 0.7, 6.0, "some", True),
    Case("head per-token temperature", (3, 11), 16, 515, temperature="token", ignored="some"),
    Case("head scaled", (33,), 64, 256, temperature=1.3, logit_scale=0.25),
    Case("head one row", (1,), 8, 5),
    Case("head all ignored", (2, 3), 8, 100, ignored="all", bias=True),
    Case("head empty", (0,), 8, 100),
    Case("head V 32768", (20,), 32, 32768),
    Case("head V 151936", (9,), 16, 151936, ignored="some"),
    Case("head V 262144", (4,), 8, 262144, softcap=30.0),
    Case("head several blocks of tokens", (4100,), 8, 2100, ignored="some"),  # more than a tile in both directions
]


def backends():
    """The backends that can run here, on CPU tensors."""
    return [b for b in flashpo._op.BACKENDS if not flashpo._op.why_unavailable(b, "cpu")]


# a test over the backends whose C++ case `make sanitize` repeats
sanitized = pytest.mark.parametrize(
    "backend", [pytest.param(b, marks=pytest.mark.native) if b == "native" else b for b in backends()]
)
