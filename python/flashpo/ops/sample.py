"""Sampling one token per row of logits with temperature, top-k, top-p and min-p, together with its log-probabilities.

z = logits / temperature      p = softmax(z)

Tokens are sorted: larger logits first, and of equal logits the smaller id first. Each filter keeps a prefix of that
order. The filters apply in the order of transformers' logits warpers, and agree with them up to ties:

    top_k   the first k tokens
    top_p   a token if the tokens before it have less than top_p of the mass that top_k kept (Holtzman et al. 2020)
    min_p   the tokens with p >= min_p max p (Nguyen et al. 2024, arXiv 2407.01082)

The sampled token is the first in the order of ids at which the cumulative mass of the kept tokens exceeds u times their
total. u in [0, 1) is 53 bits of Philox4x32-10 (Salmon et al. 2011) with key `seed` and counter `offset`, and depends on
nothing else.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flashpo._op import native, op
from flashpo.ops._check import (
    KERNEL_DTYPES,
    check_device,
    check_dtype,
    check_float,
    check_int,
    check_number,
    check_share,
    check_that,
)
from flashpo.ops._layout import dense_rows
from flashpo.ops._wide import wide_dtype

SMALLEST_TEMPERATURE, LARGEST_TEMPERATURE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


class Sample(NamedTuple):
    """One entry per row; log-probs and mass are float32, in nats. `logprob` is `logprob_full - log(kept_mass)`."""

    token: Tensor  # (B,) int64
    logprob: Tensor  # under the distribution that the filters kept, renormalised
    logprob_full: Tensor  # under the full softmax at the temperature, as a trainer recomputes it
    kept_mass: Tensor  # the share of the full distribution that the filters kept


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor,
    offset: int | Tensor,
) -> Sample:
    """Sample a token of softmax(logits / temperature) for each row, after top-k, top-p and min-p.

    Every parameter is one number for all rows or a (B,) tensor on the logits' device. The result of a row depends only
    on its own logits and parameters, not on its index or the other rows. Nothing waits for a GPU, and the call can be
    captured in a CUDA graph.

    Args:
        logits: (B, V) float32, bfloat16 or float16 (float64: reference only). Rows may be strided. -inf means
            impossible.
        temperature: positive (a normal float32), or 0. With 0 the result is the token with the largest logit, of equal
            ones the smallest id; filters change nothing, `logprob` is 0, and `logprob_full` is that at temperature 1.
        top_k: at least 0. 0, or V and more, means no such filter.
        top_p: in [0, 1]. 1 means no such filter. The first token is always kept.
        min_p: in [0, 1]. 0 means no such filter.
        seed: int64: identifies the stream of random numbers, for instance one stream per sequence.
        offset: int64: the index within the stream, for instance the token's position. Rows with equal seed and offset
            use the same u. Therefore, if B > 1, one of the two must be a tensor.

    Returns:
        Sample of shape (B,). A row with NaN or +inf, or with nothing but -inf, gets token 0 and NaN for all numbers.
        The results do not require grad.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes or devices disagree, the vocabulary is empty, or a parameter is out of its range. Values of
            tensors on CUDA are checked by a device assertion.
    """
    check_float("logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be (B, V) with V >= 1, got {tuple(logits.shape)}")
    if not isinstance(seed, Tensor) and not isinstance(offset, Tensor) and logits.shape[0] > 1:
        raise ValueError("seed and offset are numbers: all rows would draw alike; one of them must be a (B,) tensor")
    if not isinstance(temperature, Tensor):
        _check_temperature(temperature)
    for name, share in (("top_p", top_p), ("min_p", min_p)):
        if not isinstance(share, Tensor):
            check_share(name, share)
    if not isinstance(top_k, Tensor):
        check_int("top_k", top_k, 0)
    token, numbers = sample_rows(
        logits.detach(),
        _per_row("temperature", temperature, logits, torch.float32),
        _per_row("top_k", top_k, logits, torch.int64, absent=0),
        _per_row("top_p", top_p, logits, torch.float32, absent=1),
        _per_row("min_p", min_p, logits, torch.float32, absent=0),
        _per_row("seed", seed, logits, torch.int64),
        _per_row("offset", offset, logits, torch.int64),
    )
    return Sample(token, *numbers.unbind(0))


def _check_temperature(value: float) -> None:
    if isinstance(value, (int, float)) and value != 0 and not SMALLEST_TEMPERATURE <= value <= LARGEST_TEMPERATURE:
        raise ValueError(f"temperature must be 0 or a normal positive number, got {value}")
    check_number("temperature", value)


def _per_row(name: str, value, logits: Tensor, dtype: torch.dtype, absent: float | None = None) -> Tensor | None:
    """The parameter as a contiguous (B,) tensor of `dtype`; None if it is the number `absent`, which filters
    nothing."""
    rows = logits.shape[0]
    if not isinstance(value, Tensor):
        if dtype == torch.int64:
            check_int(name, value)
        return None if value == absent else logits.new_full((rows,), value, dtype=dtype)
    if dtype == torch.float32:
        check_float(name, value)
    else:
        check_dtype(name, value, *((torch.int64, torch.int32) if name == "top_k" else (torch.int64,)))
    if value.shape != (rows,):
        raise ValueError(f"{name} must be a number or (B,) = ({rows},), got {tuple(value.shape)}")
    check_device(name, value, "logits", logits)
    return value.detach().to(dtype).contiguous()


@op
def sample_rows(
    logits: Tensor,  # (B, V)
    temperature: Tensor,  # (B,) float32
    top_k: Tensor | None,  # (B,) int64; None: 0
    top_p: Tensor | None,  # (B,) float32; None: 1
    min_p: Tensor | None,  # (B,) float32; None: 0
    seed: Tensor,  # (B,) int64
    offset: Tensor,  # (B,) int64
) -> tuple[Tensor, Tensor]:
    """(token (B,), numbers (3, B): logprob, logprob_full, kept_mass), computed in float64."""
    vocab = logits.shape[1]
    fine = (temperature == 0) | ((temperature >= SMALLEST_TEMPERATURE) & (temperature < torch.inf))
    check_that(fine.all(), "temperature must be 0 or a normal positive number")
    x = logits.double()
    usable = x.amax(-1).isfinite()  # amax of a row with NaN is NaN
    x = x.where(usable[:, None], 0.0)
    greedy = temperature == 0
    logp = (x / temperature.double().where(~greedy, 1.0)[:, None]).log_softmax(-1)

    by_logit, order = x.sort(dim=-1, descending=True, stable=True)
    p = logp.exp().gather(-1, order)
    rank = torch.arange(vocab, device=x.device)
    kept = by_logit > -torch.inf
    if top_k is not None:
        check_that((top_k >= 0).all(), "top_k must not be negative")
        kept &= rank < top_k.where(top_k > 0, vocab)[:, None]
    if top_p is not None:
        check_that(((top_p >= 0) & (top_p <= 1)).all(), "top_p must be in [0, 1]")
        left = p.where(kept, 0.0)
        before = left.cumsum(-1) - left
        limit = top_p.double() * left.sum(-1)
        kept &= (before < limit[:, None]) | (top_p == 1)[:, None]
    if min_p is not None:
        check_that(((min_p >= 0) & (min_p <= 1)).all(), "min_p must be in [0, 1]")
        kept &= p >= min_p.double()[:, None] * p[:, :1]
    kept = torch.where(greedy[:, None], rank < 1, kept | (rank == 0))
    kept = torch.zeros_like(kept).scatter_(-1, order, kept)

    mass = logp.exp().where(kept, 0.0)
    sums = mass.cumsum(-1)
    last = (rank * (mass > 0)).amax(-1)  # needed where u times the total rounds to the total
    token = (sums <= (uniform(seed, offset) * sums[:, -1])[:, None]).sum(-1).minimum(last).where(usable, 0)
    full = logp.gather(-1, token[:, None])[:, 0]
    numbers = torch.stack((full - sums[:, -1].log(), full, sums[:, -1]))
    dtype = wide_dtype(logits.dtype)
    return token, numbers.masked_fill(~usable, torch.nan).to(dtype)


@sample_rows.fake
def _(logits, *rest):
    rows, dtype = logits.shape[0], wide_dtype(logits.dtype)
    return logits.new_empty((rows,), dtype=torch.int64), logits.new_empty((3, rows), dtype=dtype)


def uniform(seed: Tensor, offset: Tensor) -> Tensor:
    """(B,) float64 in [0, 1): the first 53 bits of Philox4x32-10 with key `seed` and counter (`offset`, 0)."""
    low32 = 0xFFFFFFFF
    keys = [seed & low32, (seed >> 32) & low32]
    c = [offset & low32, (offset >> 32) & low32, torch.zeros_like(offset), torch.zeros_like(offset)]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]  # modulo 2^64; the sign bit counts as a bit
        c = [((b >> 32) & low32) ^ c[1] ^ keys[0], b & low32, ((a >> 32) & low32) ^ c[3] ^ keys[1], a & low32]
        keys = [(keys[0] + 0x9E3779B9) & low32, (keys[1] + 0xBB67AE85) & low32]
    return ((c[0] << 21) | (c[1] >> 11)).double() * 2.0**-53


@sample_rows.backend("native")  # csrc/sample.h, csrc/cpu/sample.cpp, csrc/cuda/sample.cu
def _(logits, *parameters):
    if logits.dtype not in KERNEL_DTYPES:
        return NotImplemented
    rows = logits.shape[0]
    token, numbers = logits.new_empty(rows, dtype=torch.int64), logits.new_empty((3, rows), dtype=torch.float32)
    logits = dense_rows(logits)
    if logits.device.type == "cuda":
        with torch.cuda.device_of(logits):
            native.sample_cuda(logits, *parameters, token, numbers, torch.cuda.current_stream().cuda_stream)
    else:
        native.sample(logits, *parameters, token, numbers, torch.get_num_threads())
    return token, numbers
