"""Runs decoder layers under torch.compile when they run on token trees.

Between its matrix products a layer has many small operators, each of which starts a kernel and reads and writes the
whole hidden state. The compiler fuses them into few kernels. The tree's attention stays one opaque operator. The number
of tokens is symbolic, so that one graph serves trees of all sizes.

    checkpointing [ compiled [ one layer ] ]        hooks of FSDP2 and DDP stay outside

All layers of one kind share one function and therefore its compilations: one for training, one without gradients. The
first call of each is compared with the uncompiled layer, on the batch of that call. A kind of layers that cannot be
compiled, or whose results differ, runs uncompiled from then on.
"""

import contextlib
import functools
import logging
import types
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from flashpo._causal_lm import text_model
from flashpo._hosts.transformers import HOOKED, DecoderLayer, checkpoints, without_checkpointing
from flashpo._op import CALLS
from flashpo._precision import autocast_to, one_at_a_time
from flashpo.ops._lineage import is_tree
from flashpo.packing import dense
from flashpo.packing.parity import beyond_rounding
from flashpo.packing.trial import is_plain

log = logging.getLogger("flashpo")
BACKEND = "inductor"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
OF_A_PLACE = {"layer_idx", "training", "gradient_checkpointing", HOOKED}  # attributes in which layers of a kind differ


def compile_layers(
    backbone: nn.Module,
    refuse: Callable[[str], None],
    timing: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> None:
    """Let the decoder layers of `backbone` run compiled on token trees. This cannot be undone.

    Without a tree the layers run uncompiled, as before. A second call does nothing.

    Args:
        backbone: a model that takes token trees.
        refuse: called with the reason why some or all layers run uncompiled.
        timing: makes a context that is open during each compilation and its comparison with the uncompiled layer.
    """
    text = text_model(backbone)
    layers: list[Any] = [m for m in text.modules() if isinstance(m, DecoderLayer)]
    if any(hasattr(layer, "_flashpo_kind") for layer in layers):
        return
    if reason := _why_not(text, layers):
        refuse(f"{type(text).__name__}: {reason}")
        return
    kinds: dict[Hashable, Kind] = {}
    for layer in layers:
        if any(isinstance(module, nn.Conv1d) for module in layer.modules()):
            refuse(f"{type(layer).__name__}: a layer that reads tokens in order needs the tree on the host")
            continue
        key = _kind(layer)
        if key not in kinds:
            kinds[key] = Kind(layer, refuse, timing)
        layer._flashpo_kind = kinds[key]
        layer._flashpo_hooks = _hooks(layer)
        layer.forward = types.MethodType(compiled_layer_forward, layer)


def compiled_layer_forward(self: Any, *args: Any, **keywords: Any) -> Any:
    """The new forward of `self`, a decoder layer of transformers."""
    if torch.compiler.is_compiling():  # somebody compiles the whole model
        return type(self).forward(self, *args, **keywords)
    run = self._flashpo_kind.run_for(self, args, keywords)
    if run is None:
        return type(self).forward(self, *args, **keywords)
    if checkpoints(self):
        return self._gradient_checkpointing_func(functools.partial(run, self, **keywords), *args)
    return run(self, *args, **keywords)


class Kind:
    """The layers of one kind in one model, and their compiled function."""

    def __init__(self, layer: nn.Module, refuse: Callable[[str], None], timing: Callable):
        self.name, self._refuse, self._timing = type(layer).__name__, refuse, timing
        self.plain = without_checkpointing(type(layer).forward)
        # Dynamo attaches graphs, and the limit on their number, to the code object. With a copy of the code, the graphs
        # are freed together with the model
        copied = types.FunctionType(
            self.plain.__code__.replace(), self.plain.__globals__, "forward", self.plain.__defaults__,
            self.plain.__closure__,
        )  # fmt: skip
        copied.__kwdefaults__ = self.plain.__kwdefaults__
        self.compiled: Callable = torch.compile(copied, backend=BACKEND, fullgraph=True)
        self._judged: set[Hashable] = set()
        self._off = False

    def __deepcopy__(self, memo: dict) -> "Kind":
        return self

    def run_for(self, layer: Any, args: tuple, keywords: dict[str, Any]) -> Callable | None:
        """What to run in place of the class's forward, without checkpointing; None if that has to run."""
        mask = next((x for x in (*args, *keywords.values()) if is_tree(x) and x.dim() == 4), None)
        if self._off or mask is None or not args or keywords.get("past_key_values") is not None:
            return None
        if any(layer._flashpo_hooks):  # hooks that were added later, which a compiled function would not call
            self._turn_off(_why_not_now(layer))
            return None
        variant = self._variant(layer, args[0])
        if variant in self._judged:
            return self._guarded
        tokens = mask.shape[-1]
        if not _mark_tokens((*args, *keywords.values()), tokens):  # try again with a tree of another size
            return None
        with one_at_a_time, self._timing():
            reason = self._why_wrong(layer, args, keywords, tokens)
        if reason:
            self._turn_off(reason)
            return None
        self._judged.add(variant)
        return self._guarded

    def _guarded(self, layer: nn.Module, *args: Any, **keywords: Any) -> Any:
        """Run the compiled layer. If a later compilation fails, run it uncompiled from then on."""
        try:
            return self.compiled(layer, *args, **keywords)
        except _compiler_errors() as error:
            self._turn_off(_first_line(error))
            return self.plain(layer, *args, **keywords)

    def _turn_off(self, reason: str) -> None:
        self._off = True
        self._refuse(f"{self.name}: {reason}")

    def _variant(self, layer: nn.Module, hidden: Tensor) -> Hashable:
        """A key for the circumstances for which the compiler makes separate graphs."""
        autocast = autocast_to(hidden.device.type)
        return torch.is_grad_enabled(), hidden.requires_grad, layer.training, autocast, hidden.dtype

    def _why_wrong(self, layer: nn.Module, args: tuple, keywords: dict[str, Any], tokens: int) -> str:
        """Compile the layer and compare it with the uncompiled one. Returns what is wrong; empty if the two agree.

        tokens: the number of tokens of the tree.
        """
        hidden, calls = args[0], CALLS.copy()
        # reentrant checkpointing runs the forward without gradients first
        gradless = [False] if checkpoints(layer) and _reentrant(layer) else []

        def run(forward: Callable, x: Tensor, grad: bool) -> list[Tensor]:
            with torch.set_grad_enabled(grad):
                x = x.detach().requires_grad_(hidden.requires_grad)
                _mark_tokens((x,), tokens)
                return _results(forward(layer, x, *args[1:], **keywords), [x, *layer.parameters()])

        try:
            with torch.random.fork_rng([hidden.device] if hidden.is_cuda else []):
                for grad in [torch.is_grad_enabled(), *gradless]:
                    nudged = hidden.detach() * (1 + torch.finfo(hidden.dtype).eps * _signs(hidden))
                    usual = run(self.plain, hidden, grad)
                    noise = [(a - b).norm().item() for a, b in zip(run(self.plain, nudged, grad), usual)]
                    for x, y, by_rounding in zip(usual, run(self.compiled, hidden, grad), noise):
                        size, distance = x.norm().item(), (x - y).norm().item()
                        if beyond_rounding(distance, by_rounding, size, _coarser(hidden)):
                            return f"compiled it is off by {distance:.1e}, where rounding makes {by_rounding:.1e}"
        except Exception as error:  # any exception, because the compiler's code runs here
            log.debug("%s is not compiled", self.name, exc_info=True)
            return _first_line(error)
        finally:
            CALLS.clear()
            CALLS.update(calls)
        return ""


def _results(out: Any, wanted: list[Tensor]) -> list[Tensor]:
    """A layer's output and its gradients with respect to the tensors of `wanted` that need one, all in fp32."""
    out = out if isinstance(out, Tensor) else out[0]
    wanted = [x for x in wanted if x.requires_grad] if out.requires_grad else []
    gradients: tuple = ()
    if wanted:
        upstream = torch.linspace(-1, 1, out.shape[-1], device=out.device).cos() * _signs(out)
        with torch.autocast(out.device.type, enabled=False):
            gradients = torch.autograd.grad(out, wanted, upstream.to(out.dtype), allow_unused=True)
    return [x.detach().float() for x in (out, *gradients) if x is not None]


def _signs(x: Tensor) -> Tensor:
    """A tensor of -1 and 1 like `x`: the same each time, and so irregular that sums do not cancel systematically."""
    return 1 - 2 * (torch.arange(x.numel(), device=x.device) * 2654435761 // 65536 % 2).view(x.shape).to(x.dtype)


def _coarser(hidden: Tensor) -> torch.dtype:
    return autocast_to(hidden.device.type) or hidden.dtype


def _mark_tokens(inputs: tuple, tokens: int) -> bool:
    """Tell the compiler which dimensions are the tree's tokens. False if they cannot be told from other dimensions."""
    found = [x for y in inputs for x in (y if isinstance(y, tuple) else (y,)) if isinstance(x, Tensor)]
    places = [[d for d in range(x.dim()) if x.shape[d] == tokens] for x in found]
    if tokens < 2 or any(len(dims) > 1 for dims in places):
        return False
    for x, dims in zip(found, places):
        for d in dims:
            torch._dynamo.mark_dynamic(x, d)
    return True


def _kind(layer: nn.Module) -> Hashable:
    """A key that layers share if one graph serves them."""
    return tuple(
        (
            name,
            type(module),
            frozenset((k, x) for k, x in vars(module).items() if k not in OF_A_PLACE and is_plain(x)),
            frozenset((k, p.shape, p.dtype, p.requires_grad) for k, p in module.named_parameters(recurse=False)),
        )
        for name, module in layer.named_modules()
    )


def _why_not(text: nn.Module, layers: list[nn.Module]) -> str:
    if not layers:
        return "its layers are no decoder layers of transformers"
    if dense.installed(text):
        return "its attention takes a token tree as a whole mask"
    for layer in layers:
        if "forward" in vars(layer):
            return f"{type(layer).__name__} has a forward of its own"
        if layer._compiled_call_impl is not None:
            return f"{type(layer).__name__} is compiled already"
        if reason := _why_not_now(layer):
            return reason
    return ""


def _why_not_now(layer: nn.Module) -> str:
    for name, module in layer.named_modules():
        if "_hf_hook" in vars(module):
            return f"{name or type(layer).__name__} is offloaded or dispatched by accelerate"
        if module is not layer and any(vars(module).get(hooks) for hooks in HOOKS):
            return f"{name} has hooks"
    return ""


def _hooks(layer: nn.Module) -> list[dict]:
    """The dicts into which hooks of the modules inside the layer are put."""
    return [vars(module)[hooks] for module in layer.modules() if module is not layer for hooks in HOOKS]


def _reentrant(layer: Any) -> bool:
    return getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant", False)


def _compiler_errors() -> tuple[type[Exception], ...]:
    exc = torch._dynamo.exc
    return exc.TorchDynamoException, exc.FailOnRecompileLimitHit


def _first_line(error: Exception) -> str:
    inner = getattr(error, "inner_exception", error)  # the exception that the compiler's backend raised
    return f"{type(inner).__name__}: {next(iter(str(inner).strip().splitlines()), '')}"
