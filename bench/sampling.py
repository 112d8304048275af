"""sample against torch.multinomial and an inverse CDF in torch, each alone and after transformers' logits warpers."""

import importlib.util
from collections.abc import Iterator
from functools import partial

import torch

import flashpo
from flashpo import sample
from flashpo.bench.timing import Clock, Device, KernelTable

SHAPES = [(32, 32768), (64, 151936)]  # (B, V)
FILTERS = {
    "": {},
    ", top-k 50": {"top_k": 50},
    ", top-p 0.95": {"top_p": 0.95},
    ", min-p 0.05": {"min_p": 0.05},
    ", top-k 50 and top-p 0.95": {"top_k": 50, "top_p": 0.95},
}


def multinomial(logits):
    logp = logits.float().log_softmax(-1)
    token = torch.multinomial(logp.exp(), 1)
    return token, logp.gather(-1, token)


def inverse_cdf(logits):
    logp = logits.float().log_softmax(-1)
    sums = logp.exp().cumsum(-1)
    token = torch.searchsorted(sums, torch.rand_like(sums[:, :1]) * sums[:, -1:]).clamp(max=logits.shape[1] - 1)
    return token, logp.gather(-1, token)


def warped(top_k=0, top_p=1.0, min_p=0.0):
    """What `generate` does; its log-probs are those of the filtered distribution only."""
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []

    def run(logits):
        for warper in warpers:
            logits = warper(None, logits)
        return multinomial(logits)

    return run


def records(device: Device, shape: tuple[int, int], dtype, clock: Clock, with_peers: bool) -> Iterator[dict]:
    rows, vocab = shape
    logits = (torch.randn(rows, vocab, device=device.name) * 3).to(dtype)
    seed = torch.arange(rows, device=device.name)
    for options in FILTERS.values():
        ours = sample(logits, **options, seed=seed, offset=0)
        with flashpo.backend("torch"):
            exact = sample(logits.double(), **options, seed=seed, offset=0)
        if not torch.equal(ours.token, exact.token):
            raise AssertionError(f"sample draws other tokens than its specification, with {options}")
    errors = {
        "FlashPO": _error(logits, ours.token[:, None], ours.logprob_full[:, None]),
        "torch multinomial": _error(logits, *multinomial(logits)),
    }
    words = logits.view(torch.int32)
    variants = {"read (max)": lambda: words.amax()}
    if with_peers:
        variants |= {"torch multinomial": lambda: multinomial(logits), "torch inverse CDF": lambda: inverse_cdf(logits)}
    for name, options in FILTERS.items():
        variants[f"FlashPO{name}"] = lambda options=options: sample(logits, **options, seed=seed, offset=0)
        if with_peers and options and importlib.util.find_spec("transformers"):
            peer = warped(**options)
            variants[f"transformers{name}"] = lambda peer=peer: peer(logits)
    seconds = clock(variants)
    for name, time in seconds.items():
        record = {"variant": name, "ms": time * 1e3}
        if name != "read (max)":
            record["times_flashpo"] = time / seconds["FlashPO" + "".join(name.partition(", ")[1:])]
        if name in ("read (max)", "FlashPO"):
            record["gb_per_s"] = logits.numel() * logits.itemsize / time / 1e9
        yield record | ({"error_nats": errors[name]} if name in errors else {})


def _error(logits, token, logprob) -> float:
    return logits.double().log_softmax(-1).gather(-1, token).sub(logprob).abs().max().item()


def tables(device: Device, quick: bool) -> Iterator[KernelTable]:
    variants = ("read (max)", *(f"FlashPO{name}" for name in FILTERS))
    peers = ("torch multinomial", "torch inverse CDF", *(f"transformers{name}" for name in FILTERS if name))
    for shape in SHAPES[: 1 if quick else None]:
        for dtype in (torch.float32, torch.bfloat16):
            title = f"sample B={shape[0]} V={shape[1]} {str(dtype)[6:]}"
            yield KernelTable(title, variants, peers, partial(records, device, shape, dtype))
