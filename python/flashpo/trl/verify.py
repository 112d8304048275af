"""`verify()`: runs steps of a trainer by TRL's code and again by ours; compares loss, gradients and metrics."""

import contextlib
import copy
import dataclasses
import math
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from flashpo._op import stats
from flashpo.packing.norms import original_norms
from flashpo.trl._precision import autocast_dtype
from flashpo.trl.patch import patched, stock

# Attributes of the trainer that a step changes in place. Each run works on a copy of them. Plain numbers need no copy,
# since a step assigns them anew.
RECORDS = (
    "_metrics", "_logs", "_pending_metrics", "_pending_extra_logs", "state", "control",  # TRL's
    "_pending",  # ours
)  # fmt: skip
# Methods that are random or slow. They run once, and the second run gets their recorded results. The metrics that they
# write are not compared.
REPLAYED = ("_generate", "_calculate_rewards")
CLOCKS = ("step_time", "profiling")  # metrics that are never the same twice
ADDED = ("ratio/", "rollout/", "teacher/", "flashpo/")  # prefixes of metrics that TRL does not have


class VerificationError(AssertionError):
    """TRL and FlashPO disagree by more than rounding, or no operator of FlashPO ran.

    The attribute `report` is the `Report` with every number.
    """

    def __init__(self, message: str, report: "Report"):
        super().__init__(f"{message}\n{report}")
        self.report = report


@dataclasses.dataclass(frozen=True)
class Line:
    """One comparison. For a gradient, `stock` and `ours` are its norms, and `error` is the norm of the difference."""

    step: int
    name: str
    stock: float
    ours: float
    error: float
    allowed: float

    @property
    def agrees(self) -> bool:
        return self.error <= self.allowed


@dataclasses.dataclass(frozen=True)
class Report:
    """What `verify` found; `print` it for a table."""

    dtype: torch.dtype  # the compute dtype, from which the tolerance follows
    tolerance: float  # relative, see `tolerance_for`
    lines: tuple[Line, ...]
    ops: dict[str, dict[str, int]]  # how often each operator of FlashPO ran, by backend, as in `flashpo.stats()`

    @property
    def disagreements(self) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if not line.agrees)

    def __str__(self) -> str:
        ran = ", ".join(f"{op} on {b} x{n}" for op, used in self.ops.items() for b, n in used.items())
        verdict = f"{len(self.disagreements)} disagree" if self.disagreements else "all agree"
        gradient = "" if any(x.stock for x in self.lines if x.name.startswith("grad ")) else "; every gradient is 0"
        verdict = f"{len(self.lines)} comparisons, {verdict}{gradient}; {self.dtype}, tolerance {self.tolerance:.1e}"
        shown = [*self._folded(), *((x.name, x) for x in self.disagreements)]
        width = max([len(name) for name, _ in shown] or [4])
        rows = [
            verdict,
            f"accelerated run: {ran or 'nothing of FlashPO ran'}",
            f"step  {'':{width}}  {'stock':>13}  {'flashpo':>13}  {'error':>8}  {'allowed':>8}",
        ]
        for name, x in shown:
            row = f"{x.step:4}  {name:{width}}  {x.stock:13.6g}  {x.ours:13.6g}  {x.error:8.1e}  {x.allowed:8.1e}"
            rows.append(row if x.agrees else row + "  <-- disagrees")
        return "\n".join([*rows, verdict])

    def _folded(self) -> Iterator[tuple[str, Line]]:
        """The lines that agree, folded into one for each kind: the one whose error is closest to what is allowed."""
        kinds: dict[str, list[Line]] = {"losses": [], "metrics": [], "gradients": []}
        for x in self.lines:
            kind = "losses" if x.name == "loss" else "gradients" if x.name.startswith("grad ") else "metrics"
            kinds[kind] += [x] if x.agrees else []
        for kind, found in kinds.items():
            if found:
                worst = max(found, key=lambda x: x.error / x.allowed if x.allowed else 0.0)
                yield f"{len(found)} {kind} agree, the worst: {worst.name}", worst


def verify(trainer, steps: int = 2) -> Report:
    """Run the batches of `steps` optimizer steps by TRL's code and again by FlashPO's, and compare the results.

    Completions are generated and rewards are computed once; both runs use them. The optimizer does not step. Afterwards
    the trainer is as it was: parameters, gradients, optimizer, metrics, random state. Two things cannot be restored:
    what `reset` of an environment did, and the position of an iterable dataset that cannot be read twice. With several
    processes, each process compares its own losses, gradients and metrics.

    Args:
        trainer: an SFT, DPO, KTO, Reward, GRPO, RLOO or Distillation trainer, TRL's or ours.
        steps: the number of optimizer steps, each of `gradient_accumulation_steps` micro-batches.

    Returns:
        A Report. `print` it, or read its `lines` and `disagreements`.

    Raises:
        VerificationError: a loss, gradient or metric differs by more than rounding in the compute dtype (see
            `tolerance_for`), or none of FlashPO's operators ran.
        ValueError: `steps` is less than 1.
        NotImplementedError: the trainer uses DeepSpeed, which does not keep gradients in `.grad`.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if trainer.is_deepspeed_enabled:
        raise NotImplementedError("verify cannot read gradients under DeepSpeed; run it once without")
    if (phases := vars(trainer).get("_phases")) is not None:
        with phases.stopped():  # the time of these two runs does not count as training
            return _verified(trainer, steps)
    return _verified(trainer, steps)


def _verified(trainer, steps: int) -> Report:
    model = trainer.model_wrapped
    dtype = compute_dtype(trainer, model)
    tapes: dict[str, list] = {name: [] for name in REPLAYED if hasattr(trainer, name)}
    with _untouched(trainer, model):
        batches = _batches(trainer, steps)
        with stock(), original_norms(model):
            expected = _run(trainer, model, batches, tapes, replay=False)
        before = stats()
        with patched():
            actual = _run(trainer, model, batches, tapes, replay=True)
        ops = _since(before)
    tolerance = tolerance_for(dtype)
    lines = tuple(line for i, pair in enumerate(zip(expected, actual)) for line in compare(i, *pair, tolerance))
    report = Report(dtype, tolerance, lines, ops)
    if not ops:
        raise VerificationError("none of FlashPO's operators ran in the accelerated run", report)
    if report.disagreements:
        names = ", ".join(dict.fromkeys(line.name for line in report.disagreements))
        raise VerificationError(f"FlashPO and TRL disagree on {names}", report)
    return report


def compute_dtype(trainer, model: nn.Module) -> torch.dtype:
    """The coarsest dtype between tokens and log-probs: that of the parameters or of autocast, whichever is coarser."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if (autocast := autocast_dtype(trainer.accelerator)) is not None:
        dtypes.add(autocast)
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def tolerance_for(dtype: torch.dtype) -> float:
    """How far two correct computations may differ because of rounding, relative to the size of the result.

    A value is rounded to the compute dtype up to four times (TRL rounds a tile of logits and its gradient, in the
    forward and in the backward pass). Sums over the vocabulary and over tokens are in fp32, for which 256 roundings are
    allowed. The larger of the two is the tolerance.
    """
    return max(4 * torch.finfo(dtype).eps, 256 * torch.finfo(torch.float32).eps)


@dataclasses.dataclass
class Step:
    loss: float
    metrics: dict[str, float]
    gradients: dict[str, Tensor]


def compare(index: int, stock: Step, ours: Step, tolerance: float) -> Iterator[Line]:
    """Compare one step of both runs.

    A scalar may differ by tolerance * max(1, |value|). The 1 is there because log-probs, rewards and ratios are of the
    order of 1, and some metrics are differences of such numbers that cancel. A gradient may differ by
    tolerance * (its norm + share), where share is the part of the whole gradient's norm that this parameter would have
    if all elements were equally large.
    """
    scalars = {"loss": (stock.loss, ours.loss)} | {
        name: (stock.metrics.get(name, math.nan), ours.metrics.get(name, math.nan))
        for name in sorted(stock.metrics.keys() | ours.metrics.keys())
        if not name.startswith(ADDED)
    }
    for name, (a, b) in scalars.items():
        same = a == b or (math.isnan(a) and math.isnan(b))  # infinities that are equal have a NaN difference
        yield Line(index, name, a, b, 0.0 if same else abs(a - b), tolerance * max(1.0, abs(a)))
    norms = {name: _norm(g) for name, g in stock.gradients.items()}
    total, count = math.hypot(*norms.values()), sum(g.numel() for g in stock.gradients.values())
    for name in sorted(stock.gradients.keys() | ours.gradients.keys()):
        g, h = stock.gradients.get(name), ours.gradients.get(name)
        if g is None or h is None:  # only one of the two runs trains this parameter
            a, b = (math.nan if x is None else _norm(x) for x in (g, h))
            yield Line(index, f"grad {name}", a, b, math.inf, 0.0)
            continue
        share = total * math.sqrt(g.numel() / count)
        overflow = not math.isfinite(norms[name]) and not math.isfinite(_norm(h))  # in fp16 such a step is skipped
        error = 0.0 if overflow else _norm(h - g)
        yield Line(index, f"grad {name}", norms[name], _norm(h), error, tolerance * (norms[name] + share))


def _norm(gradient: Tensor) -> float:
    return torch.linalg.vector_norm(gradient.float()).item()


def _batches(trainer, steps: int) -> list[tuple[list, object]]:
    """The micro-batches of each optimizer step and their number of items, as `train` would get them."""
    loader = iter(trainer.get_train_dataloader())
    device, micro = trainer.args.device, trainer.args.gradient_accumulation_steps
    found = [trainer.get_batch_samples(loader, micro, device) for _ in range(steps)]
    return [(batches, items) for batches, items in found if batches]


def _run(trainer, model: nn.Module, batches: list, tapes: dict[str, list], replay: bool) -> list[Step]:
    done = []
    with _untouched(trainer, model):
        for name, tape in tapes.items():
            setattr(trainer, name, _tape(trainer, name, iter(tape) if replay else tape, replay))
        trainer.compute_loss = _autocast(trainer, trainer.compute_loss)
        if hasattr(trainer, "_buffered_inputs"):  # so that the run begins by generating
            trainer._buffered_inputs, trainer._step = None, 0
        if hasattr(trainer, "flush_metrics"):
            trainer.flush_metrics()  # of earlier steps; the loop below then clears them
        for micro_batches, items in batches:
            trainer.current_gradient_accumulation_steps = len(micro_batches)
            trainer._metrics["train"].clear()
            model.zero_grad(set_to_none=True)
            loss = 0.0
            for batch in micro_batches:
                loss += trainer.training_step(model, copy.deepcopy(batch), items).item()
            if hasattr(trainer, "flush_metrics"):
                trainer.flush_metrics()
            metrics = {
                name: sum(values) / len(values)
                for name, values in trainer._metrics["train"].items()
                if values and not name.startswith(CLOCKS)
            }
            gradients = {name: _whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
            done.append(Step(loss, metrics, gradients))
    return done


def _whole(gradient: Tensor) -> Tensor:
    """The whole gradient, copied to the host: a device may have no room for the gradients of both runs."""
    return (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).detach().to("cpu", copy=True)


def _autocast(trainer, compute_loss):
    """`compute_loss` under autocast: `train` wraps the model's forward in autocast, but it has not run yet."""

    def call(*args, **kwargs):
        with trainer.accelerator.autocast():
            return compute_loss(*args, **kwargs)

    return call


def _tape(trainer, name: str, tape, replay: bool):
    """Replaces the trainer's method: records its results and the random state after it, or replays them."""
    method = getattr(trainer, name)

    def call(*args, **kwargs):
        if replay:
            result, random_state = next(tape)
            _set_random_state(random_state)
            return copy.deepcopy(result)
        with _records(trainer):
            result = method(*args, **kwargs)
        tape.append((copy.deepcopy(result), _random_state()))
        return result

    return call


@contextlib.contextmanager
def _records(trainer) -> Iterator[None]:
    """Within the block the trainer has copies of its RECORDS; afterwards it gets the originals back."""
    saved = {name: trainer.__dict__[name] for name in RECORDS if name in trainer.__dict__}
    trainer.__dict__.update(copy.deepcopy(saved))
    try:
        yield
    finally:
        trainer.__dict__.update(saved)


@contextlib.contextmanager
def _untouched(trainer, model: nn.Module) -> Iterator[None]:
    """Undo whatever the block does to trainer and model. Parameters are not restored: the block makes no optimizer
    step."""
    attributes, random_state = dict(trainer.__dict__), _random_state()
    gradients = {p: p.grad for p in model.parameters()}
    buffers = {b: b.detach().clone() for b in model.buffers()}
    modes = {module: module.training for module in model.modules()}
    accelerator = trainer.accelerator
    loaders, gradient_state = list(accelerator._dataloaders), accelerator.gradient_state
    references = gradient_state.dataloader_references
    try:
        with _records(trainer):
            yield
    finally:
        trainer.__dict__.clear()
        trainer.__dict__.update(attributes)
        for p, gradient in gradients.items():
            p.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
        for module, mode in modes.items():
            module.training = mode
        accelerator._dataloaders[:] = loaders
        gradient_state.dataloader_references = references
        _set_random_state(random_state)


def _random_state() -> tuple:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _set_random_state(state: tuple) -> None:
    python, numpy, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)


def _since(before: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    calls = {
        op: {b: n - before.get(op, {}).get(b, 0) for b, n in used.items() if n > before.get(op, {}).get(b, 0)}
        for op, used in stats().items()
    }
    return {op: used for op, used in calls.items() if used}
