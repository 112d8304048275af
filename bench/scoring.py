"""Benchmarks of the log-prob operators; each gives the records of one table. A result is checked before it is timed."""

import importlib.util
import time
from collections.abc import Iterator
from functools import partial

import torch

from flashpo import linear_logprob, selective_log_softmax
from flashpo.bench import peers
from flashpo.bench.timing import Clock, Device, KernelTable, Tables

HEAD_SHAPES = {"cpu": [(1024, 896, 32768), (2048, 1024, 151936)], "cuda": [(8192, 4096, 151936)]}  # (N, H, V)
LOGITS_SHAPES = {"cpu": (2048, 151936), "cuda": (8192, 151936)}  # larger than any cache
DTYPES = (torch.bfloat16, torch.float32)
HEAD_DTYPES = {"cpu": DTYPES, "cuda": (torch.bfloat16,)}
PHASES = ("forward", "step")
PRODUCTS, FROZEN = ("GEMM logits", "GEMM d hidden", "GEMM d weight"), "FlashPO step, frozen head"
MOVES = ("read (max)", "read (sum)", "copy")


def of(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{name} {phase}" for name in names for phase in PHASES)


def worst_error(function, inputs, target, rows=64) -> float:
    """The largest error of the log-probs against fp64 over the first rows, in nats."""
    x, *head = inputs
    logits = x[:rows].double() @ head[0].double().t() if head else x[:rows].double()
    exact = logits.log_softmax(-1).gather(-1, target[:rows, None])[:, 0]
    return (function(*inputs, target)[0][:rows].double() - exact).abs().max().item()


def forward(function, inputs, target):
    @torch.no_grad()
    def run():
        function(*inputs, target)

    return run


def step(function, inputs, target, upstream, frozen=()):
    """Forward, and backward with a different gradient for each token."""
    leaves = [x.detach().requires_grad_(i not in frozen) for i, x in enumerate(inputs)]
    wanted = [x for x in leaves if x.requires_grad]

    def run():
        out = [x for x in function(*leaves, target) if x is not None]
        loss = sum((x * d).sum() for x, d in zip(out, upstream))
        torch.autograd.grad(loss, wanted)

    return run


def ours(h, w, target):
    return linear_logprob(h, w, target)[:2]


def head(device: Device, shape, dtype, clock: Clock, with_peers: bool) -> Iterator[dict]:
    n, hidden, vocab = shape
    h = torch.randn(n, hidden, device=device.name).to(dtype)
    w = (torch.randn(vocab, hidden, device=device.name) * (3 / hidden**0.5)).to(dtype)
    target = torch.randint(vocab, (n,), device=device.name)
    upstream = torch.randn(2, n, device=device.name)
    inputs = (h, w)
    functions = {"FlashPO": ours}
    if with_peers:
        functions |= peers.installed(device.name)
    errors = {name: worst_error(f, inputs, target) for name, f in functions.items() if name != "Liger"}
    if errors["FlashPO"] > (2e-4 if dtype == torch.float32 else 0.3):
        raise AssertionError(f"linear_logprob is off by {errors['FlashPO']} nats")

    # All products of the pass, each in its own shape and its best layout, into a buffer that exists: the floor of the
    # GEMMs.
    logits, flat = (torch.empty(a, b, dtype=dtype, device=device.name) for a, b in ((vocab, n), (n, vocab)))
    logits.normal_(), flat.normal_()
    d_h, d_w = torch.empty_like(h), torch.empty_like(w)
    products = (
        lambda: torch.mm(w, h.t(), out=logits),
        lambda: torch.mm(flat, w, out=d_h),
        lambda: torch.mm(logits, h, out=d_w),
    )
    variants = dict(zip(PRODUCTS, products))
    for name, f in functions.items():
        variants[f"{name} forward"] = forward(f, inputs, target)
        variants[f"{name} step"] = step(f, inputs, target, upstream)
    variants[FROZEN] = step(ours, inputs, target, upstream, frozen=(1,))
    seconds = clock(variants)

    once, d_hidden, d_weight = (seconds[x] for x in PRODUCTS)
    floors = {"forward": once, "step": 2 * once + d_hidden + d_weight, "step, frozen head": 2 * once + d_hidden}
    for name in variants:
        if name.startswith("GEMM"):
            yield {"variant": name, "ms": seconds[name] * 1e3}
            continue
        system, _, phase = name.partition(" step") if " step" in name else name.rpartition(" forward")
        phase = ("step" + phase) if " step" in name else "forward"
        result_bytes = 0 if phase == "forward" else (h.numel() + (w.numel() if phase == "step" else 0)) * h.itemsize
        yield {
            "variant": name,
            "ms": seconds[name] * 1e3,
            "times_gemm": seconds[name] / floors[phase],
            "times_flashpo": seconds[name] / seconds[f"FlashPO {phase}"],
            "extra_mb": (device.peak_bytes(variants[name]) - result_bytes) / 2**20,
            "error_nats": errors.get(system),
        }


def logits(device: Device, dtype, clock: Clock, with_peers: bool) -> Iterator[dict]:
    n, vocab = LOGITS_SHAPES[device.name]
    x = torch.randn(n, vocab, device=device.name).mul_(3).to(dtype)
    target = torch.randint(vocab, (n,), device=device.name)
    upstream = torch.randn(2, n, device=device.name)
    functions = {"FlashPO": lambda x, t: selective_log_softmax(x, t)[:2]}
    if with_peers:
        functions["torch eager"] = peers.eager_logits
        if importlib.util.find_spec("trl"):
            functions["TRL"] = peers.trl_logits
    errors = {name: worst_error(f, (x,), target) for name, f in functions.items()}
    if errors["FlashPO"] > 1e-4:
        raise AssertionError(f"selective_log_softmax is off by {errors['FlashPO']} nats")
    words = x.view(torch.int32)
    other = torch.empty_like(x)
    moves = (lambda: words.amax(), lambda: x.view(torch.float32).sum(), lambda: other.copy_(x))
    variants = dict(zip(MOVES, moves))
    for name, f in functions.items():
        variants[f"{name} forward"] = forward(f, (x,), target)
        variants[f"{name} step"] = step(f, (x,), target, upstream)
    seconds = clock(variants)
    size = x.numel() * x.itemsize
    read = size / min(seconds["read (max)"], seconds["read (sum)"])
    for name in variants:
        # A step reads the logits twice and writes the gradient
        moved = size * (2 if name == "copy" else 3 if name.endswith("step") else 1)
        phase = name.rpartition(" ")[2]
        record = {"variant": name, "ms": seconds[name] * 1e3, "gb_per_s": moved / seconds[name] / 1e9}
        if phase in ("forward", "step"):
            record["share_of_read_bandwidth"] = record["gb_per_s"] * 1e9 / read
            record["times_flashpo"] = seconds[name] / seconds[f"FlashPO {phase}"]
            record["error_nats"] = errors[name.rpartition(" ")[0]]
        yield record


def overhead(device: Device) -> Iterator[dict]:
    """Microseconds of a whole call on 3 x 8 logits: the cost of Python, dispatch and binding."""
    for grad in (False, True):
        x, t = torch.randn(3, 8, device=device.name), torch.zeros(3, dtype=torch.long, device=device.name)
        x.requires_grad_(grad)
        for name, f in {"FlashPO": selective_log_softmax, "torch eager": peers.eager_logits}.items():
            best = float("inf")
            for _ in range(50):
                start = time.perf_counter()
                for _ in range(100):
                    f(x, t)
                best = min(best, (time.perf_counter() - start) / 100)
            yield {"variant": f"{name}, {'with' if grad else 'no'} grad", "us": best * 1e6}


def linear_logprob_tables(device: Device, quick: bool) -> Iterator[KernelTable]:
    variants = (*PRODUCTS, *of(("FlashPO",)), FROZEN)
    names = ("torch eager", "torch.compile", "TRL", *(("CCE exact", "Liger") if device.cuda else ()))
    for shape in HEAD_SHAPES[device.name][: 1 if quick else None]:
        for dtype in HEAD_DTYPES[device.name]:
            title = f"linear_logprob N={shape[0]} H={shape[1]} V={shape[2]} {str(dtype)[6:]}"
            yield KernelTable(title, variants, of(names), partial(head, device, shape, dtype))


def selective_log_softmax_tables(device: Device, quick: bool) -> Iterator[KernelTable]:
    variants = (*MOVES, *of(("FlashPO",)))
    for dtype in DTYPES:
        title = "selective_log_softmax N={} V={} {}".format(*LOGITS_SHAPES[device.name], str(dtype)[6:])
        yield KernelTable(title, variants, of(("torch eager", "TRL")), partial(logits, device, dtype))


def overhead_tables(device: Device, with_peers: bool, quick: bool) -> Tables:
    yield "overhead of a call", partial(overhead, device)
