"""Benchmark of `linear_divergence` against TRL's kernel for two heads, and against torch with full logits."""

import functools
import importlib.util
from collections.abc import Iterator

import torch

from flashpo import linear_divergence
from flashpo.bench import peers
from flashpo.bench.timing import Clock, Device, KernelTable, dtype_name

# N, H of student and of teacher, V
SHAPES = {"cpu": [(1024, 512, 896, 32768), (1024, 1024, 2048, 151936)], "cuda": [(8192, 2048, 4096, 151936)]}
DTYPES = {"cpu": (torch.bfloat16, torch.float32), "cuda": (torch.bfloat16,)}
PHASES = ("forward", "step", "step, frozen head")
PRODUCTS = tuple(f"GEMM {x}" for x in ("logits", "logits of the teacher", "d hidden", "d weight"))
BETAS = {"forward KL": 0.0, "JSD": 0.5, "reverse KL": 1.0}


def ours(h, w, h_teacher, w_teacher, beta):
    target = torch.zeros(len(h), dtype=torch.long, device=h.device)
    return linear_divergence(h, w, h_teacher, w_teacher, target, beta=beta)[:2]


def run(function, heads, beta, phase):
    """`phase` is forward only, or forward with backward; the student's head may be frozen."""
    leaves = [x.detach() for x in heads]
    wanted = {"forward": [], "step": leaves[:2], "step, frozen head": leaves[:1]}[phase]
    for x in wanted:
        x.requires_grad_()
    d = torch.rand(len(heads[0]), device=heads[0].device)

    def call():
        divergence = function(*leaves, beta)[0]
        return torch.autograd.grad(divergence, wanted, d) if wanted else divergence

    return call


def products(student, teacher) -> dict:
    """All products of a pass, each in its own shape and its best layout, into a buffer that already exists."""
    (h, w), (h_t, w_t) = student, teacher
    tile, flat = (torch.randn(a, b, device=h.device).to(h.dtype) for a, b in ((len(w), len(h)), (len(h), len(w))))
    d_h, d_w = torch.empty_like(h), torch.empty_like(w)
    functions = (
        lambda: torch.mm(w, h.t(), out=tile),
        lambda: torch.mm(w_t, h_t.t(), out=tile),
        lambda: torch.mm(flat, w, out=d_h),
        lambda: torch.mm(tile, h, out=d_w),
    )
    return dict(zip(PRODUCTS, functions))


def table(device: Device, shape, dtype, name: str, clock: Clock, with_peers: bool) -> Iterator[dict]:
    n, *widths, vocab = shape
    beta = BETAS[name]
    heads = []
    for width in widths:
        heads.append(torch.randn(n, width, device=device.name).to(dtype))
        heads.append((torch.randn(vocab, width, device=device.name) * (3 / width**0.5)).to(dtype))
    some = [x[:64].double() if i % 2 == 0 else x.double() for i, x in enumerate(heads)]
    exact = peers.eager_divergence(*some, beta)[0]
    del some
    functions = {"FlashPO": ours}
    if with_peers:
        functions["torch eager"] = peers.eager_divergence
        if importlib.util.find_spec("trl"):
            functions["TRL"] = peers.trl_divergence
    errors = {}
    for system, function in functions.items():
        with torch.no_grad():
            errors[system] = (function(heads[0][:64], heads[1], heads[2][:64], heads[3], beta)[0] - exact).abs().max()
    if errors["FlashPO"] > (2e-4 if dtype == torch.float32 else 0.3):
        raise AssertionError(f"linear_divergence is off by {errors['FlashPO']} nats")

    variants = products(heads[:2], heads[2:])
    for system, function in functions.items():
        for phase in PHASES[: 3 if system == "FlashPO" else 2]:
            variants[f"{system} {phase}"] = run(function, heads, beta, phase)
    seconds = clock(variants)

    student, teacher, d_hidden, d_weight = (seconds[x] for x in PRODUCTS)
    passes = 1 if beta in (0, 1) else 2
    forward = passes * (student + teacher)
    frozen = forward + student + teacher + d_hidden
    floors = {"forward": forward, "step": frozen + d_weight, "step, frozen head": frozen}
    for variant in variants:
        record = {"variant": variant, "ms": seconds[variant] * 1e3}
        system = next((x for x in functions if variant.startswith(f"{x} ")), None)
        if system is not None:
            phase = variant.removeprefix(f"{system} ")
            results = {"forward": 0, "step": 2, "step, frozen head": 1}[phase]
            record |= {
                "times_gemm": seconds[variant] / floors[phase],
                "times_flashpo": seconds[variant] / seconds[f"FlashPO {phase}"],
                "extra_mb": (device.peak_bytes(variants[variant]) - sum(x.nbytes for x in heads[:results])) / 2**20,
                "error_nats": errors[system].item(),
            }
        yield record


def tables(device: Device, quick: bool) -> Iterator[KernelTable]:
    variants = (*PRODUCTS, *(f"FlashPO {phase}" for phase in PHASES))
    of_peers = tuple(f"{name} {phase}" for name in ("torch eager", "TRL") for phase in PHASES[:2])
    for shape in SHAPES[device.name][: 1 if quick else None]:
        for dtype in DTYPES[device.name]:
            for name in BETAS:
                title = "linear_divergence {} N={} H={}/{} V={} {}".format(name, *shape, dtype_name(dtype))
                measure = functools.partial(table, device, shape, dtype, name)
                yield KernelTable(title, variants, of_peers, measure)
