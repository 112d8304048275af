"""`patch()`: replaces the functions through which TRL's trainers compute log-probs, entropies and divergences.

In `trl.trainer.utils`, for SFT, DPO, KTO, GRPO and RLOO:

    hidden states (`add_fused_lm_head`)     _ChunkedLogProbFunction, _use_triton             -> linear_logprob
    logits (`selective_log_softmax` ...)    is_triton_available, _supports_trl_loss_kernel,
                                            _fused_logprob_entropy                           -> selective_log_softmax

In `trl.trainer.distillation_trainer`:

    hidden states of student and teacher    ChunkedDivergenceFunction, _use_triton           -> linear_divergence

TRL looks these names up in their module at every call. Therefore models that were made before the patch use the
replacements, too, and no mathematics of a trainer has to be written again. Inputs that our operators do not take (other
devices, float64, an index with K tokens for each position) go to TRL's own code. If a TRL version lacks the names of
one of the lines, only that line stays TRL's.

`patch()` is for the whole process. The blocks `patched()` and `stock()` are for the thread that opens them: our
objects are in place as long as any thread needs them, and each of them asks whether the calling thread wants it.
"""

import contextlib
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flashpo._hosts.trl import (
    HEAD,
    OUTPUTS,
    PatchError,
    scoring_seams,
    version,
    why_no_divergence,
    why_no_head,
    why_no_logits,
)
from flashpo._on_import import is_imported, when_imported
from flashpo.ops.linear_divergence import linear_divergence
from flashpo.ops.linear_logprob import LinearLogprob
from flashpo.ops.selective_log_softmax import selective_log_softmax
from flashpo.ops.token_stats import TokenStats, select
from flashpo.trl import switches

DEVICES = ("cpu", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IGNORED = -(2**31)  # an index that no caller passes by mistake; an index of -100 must still raise an error

MISSING = object()  # `_fused_logprob_entropy` where Triton is not installed
FIELDS = dict(zip(("log_probs", *OUTPUTS), TokenStats._fields))  # TRL's names of the outputs -> ours


def patch() -> None:
    """From now on TRL's trainers in this process compute log-probs, entropies and divergences with FlashPO.

    This is the smallest change to a script: rollouts and token trees need the trainers of `flashpo.trl`. A second call
    does nothing.

    Raises:
        PatchError: the installed TRL has none of the functions that this replaces. Nothing has been changed then.
    """
    seams = scoring_seams()
    if all(seam.reason for seam in seams):
        raise PatchError(
            f"TRL {version()} has nothing that patch() replaces: {'; '.join(seam.reason for seam in seams)}. "
            "The trainers of flashpo.trl generate, share prompts and compute losses with this TRL; patch() needs "
            "trl 1.14 or newer."
        )
    _state.update(wanted=True)


def unpatch() -> None:
    """Undo `patch()`: TRL gets its own functions back, unless a `patched()` block is still open."""
    _state.update(wanted=False)


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """`patch()` for the duration of a `with` block, in the calling thread only. Blocks can be nested.

    If the installed TRL has none of the functions that `patch()` replaces, nothing is replaced.
    """
    _state.update(users=+1)
    try:
        yield
    finally:
        _state.update(users=-1)


@contextlib.contextmanager
def stock() -> Iterator[None]:
    """TRL's own code for the duration of a block, in the calling thread only.

    It overrides `patch()` and `patched()`. `verify` compares with it.
    """
    _state.update(suspended=+1)
    try:
        yield
    finally:
        _state.update(suspended=-1)


@torch.compiler.disable  # a graph would keep the answer from the time when it was traced
def active() -> bool:
    """Whether FlashPO is active in this thread now.

    Our trainers ask this before everything that they do differently from TRL, so that a `stock` block runs TRL's code.
    """
    here = _state.here
    return (_state.wanted or here.users > 0) and here.suspended == 0


@torch.compiler.disable
def scores() -> bool:
    """Whether FlashPO computes log-probs now: it is active, and its LM head is not turned off (`--no-head`)."""
    return active() and switches.current().head


class _Blocks(threading.local):
    """How many blocks of each kind are open in the calling thread."""

    users = 0
    suspended = 0


class _State:
    def __init__(self):
        self.lock = threading.RLock()
        self.wanted = False  # whether patch() was called
        self.here = _Blocks()
        self.threads = 0  # how many threads have a `patched` block open that no `stock` block suspends
        # module -> name -> TRL's object that we replaced; empty if nothing is replaced
        self.originals: dict[str, dict[str, object]] = {}
        self.watches = False  # whether `see` will be called when a module of MODULES is imported later

    def update(self, wanted: bool | None = None, users: int = 0, suspended: int = 0) -> None:
        with self.lock:
            before = self.wanted, self.threads
            wanted_here = self._wanted_here()
            self.wanted = self.wanted if wanted is None else wanted
            self.here.users += users
            self.here.suspended += suspended
            self.threads += self._wanted_here() - wanted_here
            try:
                self._apply(self.wanted or self.threads > 0)
            except BaseException:
                self.wanted, self.threads = before
                self.here.users -= users
                self.here.suspended -= suspended
                raise

    def _wanted_here(self) -> bool:
        return self.here.users > 0 and self.here.suspended == 0

    def _apply(self, active: bool) -> None:
        if active:
            importlib.import_module(UTILS)
            self._replace()
            if not self.watches:
                self.watches = True
                for name in MODULES:
                    when_imported(name, lambda name: self.see())
            return
        for name, originals in self.originals.items():
            namespace = vars(sys.modules[name])
            for attribute, original in originals.items():
                if original is MISSING:
                    del namespace[attribute]
                else:
                    namespace[attribute] = original
        self.originals = {}

    def see(self) -> None:
        """Called after a module of MODULES has been imported."""
        with self.lock:
            if self.originals:
                self._replace()

    def _replace(self) -> None:
        """Replace the names in all modules that are imported by now and do not have our objects yet."""
        modules = {name: sys.modules[name] for name in MODULES if is_imported(name) and name not in self.originals}
        for name, module in modules.items():
            objects = MODULES[name](module)
            self.originals[name] = {attribute: vars(module).get(attribute, MISSING) for attribute in objects}
            vars(module).update(objects)


_state = _State()


def _seams(utils: ModuleType) -> dict[str, object]:
    """Our object for each name that this TRL has. Where ours does not apply, it calls TRL's object of that name."""
    head = {} if why_no_head(utils) else _seams_of_head(utils)
    return head | ({} if why_no_logits(utils) else _seams_of_logits(utils))


def _seams_of_head(utils: ModuleType) -> dict[str, object]:
    stock_head = utils.__dict__[HEAD]  # None in TRL 1.15 without Triton
    stock_compact: Any = getattr(utils, "_use_triton", None)

    class Head:
        @staticmethod
        def apply(
            hidden: Tensor,  # (N, H), N may be 0
            weight: Tensor,  # (V, H)
            bias: Tensor | None,
            targets: Tensor,  # (N,); TRL has already dropped the ignored ones
            temperature: float,
            chunk_size: int,  # TRL's tile width; our backends choose their own
            final_logit_softcapping: float | None = None,
            logit_scale: float = 1.0,
            outputs: tuple[str, ...] = OUTPUTS,
        ) -> TokenStats:
            if not scores() or hidden.device.type not in DEVICES or hidden.dtype not in DTYPES:
                head = temperature, chunk_size, final_logit_softcapping, logit_scale
                return stock_head.apply(hidden, weight, bias, targets, *head, outputs)
            if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or len(weight) == 0:
                raise ValueError(
                    f"the LM head's weight is {tuple(weight.shape)} for hidden states {tuple(hidden.shape)}: "
                    "it is still sharded, or the hidden states are not those before the head"
                )
            results = LinearLogprob.apply(
                hidden,
                weight,
                targets,
                bias,
                None,
                float(temperature),
                float(logit_scale),
                None if final_logit_softcapping is None else float(final_logit_softcapping),
                -100,
                any(name in outputs for name in OUTPUTS[1:]),
                None,
                lambda: utils.maybe_gather_lm_head_ctx(weight, bias),  # ZeRO-3: backward gathers the head again
            )
            names = tuple(FIELDS[name] for name in outputs)
            return select(names, targets.shape, *results)  # TokenStats' fields are in TRL's order

    ours: dict[str, object] = {HEAD: Head}
    return (
        ours if stock_compact is None else ours | {"_use_triton": _compact(stock_compact)}
    )  # TRL 1.15 always compacts


def _seams_of_logits(utils: ModuleType) -> dict[str, object]:
    stock_supports: Any = utils._supports_trl_loss_kernel
    stock_kernel: Any = getattr(utils, "_fused_logprob_entropy", None)
    stock_triton: Any = getattr(utils, "is_triton_available", None)

    def has_triton(*min_version: str) -> bool:
        return stock_kernel is not None if stock_triton is None else stock_triton(*min_version)

    def ours(logits: Tensor, index: Tensor | None, row_mask: Tensor | None) -> bool:
        return (
            scores()
            and logits.device.type in DEVICES
            and logits.dtype in DTYPES
            and logits.dim() > 0
            and logits.shape[-1] > 0
            and (
                index is None
                or (
                    index.shape == logits.shape[:-1]
                    and index.dtype in (torch.int32, torch.int64)
                    and index.device == logits.device
                )
            )
            and (row_mask is None or (row_mask.shape == logits.shape[:-1] and row_mask.device == logits.device))
        )

    def supports(logits: Tensor, index: Tensor | None = None, row_mask: Tensor | None = None) -> bool:
        return ours(logits, index, row_mask) or (has_triton() and stock_supports(logits, index, row_mask))

    def logprob_entropy(
        logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if not ours(logits, index, row_mask):
            return stock_kernel(logits, index, temperature=temperature, row_mask=row_mask)
        index = index.long()
        if row_mask is not None:
            index = index.masked_fill(row_mask == 0, IGNORED)
        stats = selective_log_softmax(logits, index, temperature=temperature, ignore_index=IGNORED)
        return stats.logprob, stats.entropy

    seams: dict[str, object] = {"_supports_trl_loss_kernel": supports, "_fused_logprob_entropy": logprob_entropy}
    if stock_triton is not None:
        # in this module the name is only used to decide about the kernel for logits; our operator needs no Triton
        seams["is_triton_available"] = lambda *min_version: scores() or has_triton(*min_version)
    return seams


def _compact(stock: Callable[[torch.device], bool]) -> Callable[[torch.device], bool]:
    """Whether only the labelled positions go through the head. On a CPU TRL says no and projects every position."""
    return lambda device: (scores() and device.type in DEVICES) or stock(device)


def _seams_of_distillation(module: ModuleType) -> dict[str, object]:
    if why_no_divergence(module):
        return {}
    stock = module.ChunkedDivergenceFunction

    class Divergence:
        @staticmethod
        def apply(
            student_hidden: Tensor,  # (N, H), N may be 0
            student_weight: Tensor,
            student_bias: Tensor | None,
            teacher_hidden: Tensor,
            teacher_weight: Tensor,
            teacher_bias: Tensor | None,
            beta: float,
            temperature: float = 1.0,
            student_logit_scale: float = 1.0,
            student_final_logit_softcapping: float | None = None,
            teacher_logit_scale: float = 1.0,
            teacher_final_logit_softcapping: float | None = None,
        ) -> tuple[Tensor, Tensor]:
            """Divergence and the student's entropy, (N,) each. No gradient flows through the entropy."""
            both = student_hidden, teacher_hidden
            if not scores() or any(x.device.type not in DEVICES or x.dtype not in DTYPES for x in both):
                heads = student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias
                student = student_logit_scale, student_final_logit_softcapping
                teacher = teacher_logit_scale, teacher_final_logit_softcapping
                return stock.apply(*heads, beta, temperature, *student, *teacher)
            stats = linear_divergence(
                student_hidden,
                student_weight,
                teacher_hidden,
                teacher_weight,
                torch.zeros(len(student_hidden), dtype=torch.int64, device=student_hidden.device),  # an unused target
                student_bias,
                teacher_bias,
                beta=beta,
                temperature=temperature,
                student_logit_scale=student_logit_scale,
                teacher_logit_scale=teacher_logit_scale,
                student_softcap=student_final_logit_softcapping,
                teacher_softcap=teacher_final_logit_softcapping,
            )
            return stats.divergence, stats.entropy.detach()

    return {"ChunkedDivergenceFunction": Divergence, "_use_triton": _compact(module._use_triton)}


UTILS = "trl.trainer.utils"
MODULES: dict[str, Callable[[ModuleType], dict[str, object]]] = {  # module -> makes our objects, by the names replaced
    UTILS: _seams,
    "trl.trainer.distillation_trainer": _seams_of_distillation,
}
