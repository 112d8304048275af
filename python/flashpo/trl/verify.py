"""Runs a trainer's own steps twice, by TRL's code and by ours, and compares loss, every gradient and every metric."""

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

# What a step writes to besides parameters: the trainer's records, copied for each run. Plain numbers are rebound.
RECORDS = (
    "_metrics", "_logs", "_pending_metrics", "_pending_extra_logs", "state", "control",  # TRL's
    "_pending",  # ours
)  # fmt: skip
# Random or slow, and not ours: done once, the second run gets the same results. Their own metrics are left out.
REPLAYED = ("_generate", "_calculate_rewards")
CLOCKS = ("step_time", "profiling")  # metrics that are never the same twice
ADDED = ("ratio/", "rollout/", "teacher/", "flashpo/")  # metrics that TRL does not have begin so


class VerificationError(AssertionError):
    """Stock and accelerated disagree beyond rounding, or nothing of ours ran. `report` has every number."""

    def __init__(self, message: str, report: "Report"):
        super().__init__(f"{message}\n{report}")
        self.report = report


@dataclasses.dataclass(frozen=True)
class Line:
    """One comparison. For a gradient `stock` and `ours` are norms, `error` the norm of the difference."""

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
    dtype: torch.dtype
    tolerance: float
    lines: tuple[Line, ...]
    ops: dict[str, dict[str, int]]  # what of ours ran, as `flashpo.stats()` gives it

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
        """What agrees, a line for each kind: the one that has used most of what it is allowed."""
        kinds: dict[str, list[Line]] = {"losses": [], "metrics": [], "gradients": []}
        for x in self.lines:
            kind = "losses" if x.name == "loss" else "gradients" if x.name.startswith("grad ") else "metrics"
            kinds[kind] += [x] if x.agrees else []
        for kind, found in kinds.items():
            if found:
                worst = max(found, key=lambda x: x.error / x.allowed if x.allowed else 0.0)
                yield f"{len(found)} {kind} agree, the worst: {worst.name}", worst


def verify(trainer, steps: int = 2) -> Report:
    """Take `steps` optimisation steps' worth of the trainer's own batches by TRL's code and by ours, and compare.

    Completions are generated, and rewards computed, once; both runs use them. The optimizer does not step. Afterwards
    the trainer is as it was: parameters, gradients, optimizer, metrics, random state. (An environment's `reset` and an
    iterable dataset that cannot be read twice are outside of its reach.) With several processes each checks its own.

    Args:
        trainer: an SFT, DPO, KTO, Reward, GRPO, RLOO or Distillation trainer, TRL's or ours.
        steps: how many optimisation steps, each of `gradient_accumulation_steps` micro-batches.

    Returns:
        Report: `print` it; `lines` and `disagreements` for programs.

    Raises:
        VerificationError: a loss, gradient or metric differs by more than rounding in the compute dtype, see
            `tolerance_for`, or none of FlashPO's operators ran.
        ValueError: steps is not at least 1.
        NotImplementedError: under DeepSpeed, whose gradients are not in `.grad`.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if trainer.is_deepspeed_enabled:
        raise NotImplementedError("verify cannot read gradients under DeepSpeed; run it once without")
    if (phases := vars(trainer).get("_phases")) is not None:
        with phases.stopped():  # what is run twice here is no time of the training
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
    """The narrowest dtype on the way from tokens to log-probs: autocast's, else the parameters'."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if (autocast := autocast_dtype(trainer.accelerator)) is not None:
        dtypes.add(autocast)
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def tolerance_for(dtype: torch.dtype) -> float:
    """How far rounding alone may take two correct computations apart, relative to the size of the result.

    Four roundings to the compute dtype on the way of a value (the logits tile and its gradient, forward and back: TRL
    rounds both), but never less than 256 roundings of fp32, in which both sum over vocabulary and tokens.
    """
    return max(4 * torch.finfo(dtype).eps, 256 * torch.finfo(torch.float32).eps)


@dataclasses.dataclass
class Step:
    loss: float
    metrics: dict[str, float]
    gradients: dict[str, Tensor]


def compare(index: int, stock: Step, ours: Step, tolerance: float) -> Iterator[Line]:
    """A scalar may differ by tolerance * max(1, |value|): nats, rewards and ratios are of the order of 1, and some of
    them are differences that cancel. A gradient by tolerance * (its norm + its even share of the whole gradient's)."""
    scalars = {"loss": (stock.loss, ours.loss)} | {
        name: (stock.metrics.get(name, math.nan), ours.metrics.get(name, math.nan))
        for name in sorted(stock.metrics.keys() | ours.metrics.keys())
        if not name.startswith(ADDED)
    }
    for name, (a, b) in scalars.items():
        same = a == b or (math.isnan(a) and math.isnan(b))  # equal infinities: their difference is NaN
        yield Line(index, name, a, b, 0.0 if same else abs(a - b), tolerance * max(1.0, abs(a)))
    norms = {name: _norm(g) for name, g in stock.gradients.items()}
    total, count = math.hypot(*norms.values()), sum(g.numel() for g in stock.gradients.values())
    for name in sorted(stock.gradients.keys() | ours.gradients.keys()):
        g, h = stock.gradients.get(name), ours.gradients.get(name)
        if g is None or h is None:  # a parameter that only one of the two trains
            a, b = (math.nan if x is None else _norm(x) for x in (g, h))
            yield Line(index, f"grad {name}", a, b, math.inf, 0.0)
            continue
        share = total * math.sqrt(g.numel() / count)
        overflow = not math.isfinite(norms[name]) and not math.isfinite(_norm(h))  # fp16: the step is skipped
        error = 0.0 if overflow else _norm(h - g)
        yield Line(index, f"grad {name}", norms[name], _norm(h), error, tolerance * (norms[name] + share))


def _norm(gradient: Tensor) -> float:
    return torch.linalg.vector_norm(gradient.float()).item()


def _batches(trainer, steps: int) -> list[tuple[list, object]]:
    """The micro-batches of each optimisation step and their number of items, as `train` would get them."""
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
        if hasattr(trainer, "_buffered_inputs"):  # begin with a generation
            trainer._buffered_inputs, trainer._step = None, 0
        if hasattr(trainer, "flush_metrics"):
            trainer.flush_metrics()  # those of earlier steps, which the loop then clears
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
    """On the host: both runs' gradients are kept, and a device may have no room for them."""
    return (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).detach().to("cpu", copy=True)


def _autocast(trainer, compute_loss):
    """`train` wraps the model's forward in autocast; a trainer that has not begun to train has it bare."""

    def call(*args, **kwargs):
        with trainer.accelerator.autocast():
            return compute_loss(*args, **kwargs)

    return call


def _tape(trainer, name: str, tape, replay: bool):
    """A stand-in for the trainer's method: records its results and the random state that it leaves, or replays them."""
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
    """Let the block write into copies of the trainer's records, then put the records back."""
    saved = {name: trainer.__dict__[name] for name in RECORDS if name in trainer.__dict__}
    trainer.__dict__.update(copy.deepcopy(saved))
    try:
        yield
    finally:
        trainer.__dict__.update(saved)


@contextlib.contextmanager
def _untouched(trainer, model: nn.Module) -> Iterator[None]:
    """Undo whatever the block does to trainer and model, optimizer steps excepted (it makes none)."""
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
