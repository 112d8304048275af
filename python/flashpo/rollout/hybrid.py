"""Recurrent states of hybrid models: gated delta nets, state spaces and short convolutions, for each row.

Such a layer keeps a state of fixed size instead of keys and values. Each completion starts with a copy of its prompt's
state. A state moves with its row when the decode batch changes.
"""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from flashpo import _recurrent
from flashpo._causal_lm import STATEFUL, WITH_ATTENTION, CausalLM, Unsupported
from flashpo._hosts.transformers import layer_types
from flashpo.ops._lineage import Lineage
from flashpo.rollout.prefix_tree import Segment
from flashpo.rollout.scheduler import Row

State = dict[tuple[int, str, int], Tensor]  # (layer, kind, number) -> the state tensor, usually of one row


def is_hybrid(config: PreTrainedConfig) -> bool:
    return any(kind in STATEFUL for kind in layer_types(config)[0])


def cache_keyword(backbone: nn.Module) -> str:
    """The keyword by which the backbone's forward takes a cache; in older transformers "past_key_values"."""
    kind: Any = type(backbone)
    return _cache_keyword(kind)


@functools.cache
def _cache_keyword(kind: Any) -> str:
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


class States(Cache):
    """The `past_key_values` of one batch of a hybrid model: the recurrent states of its rows.

    The keys and values of its attention layers are not in it; they are in the engine's KV cache.

    Args:
        states: For each row of the batch its state from `take`; None for a row that has read no token yet.
    """

    def __init__(self, config: PreTrainedConfig, states: Sequence[State | None]):
        layers: list[Any] = []
        for kind, options in zip(*layer_types(config)):
            number = options.get("number_of_states", 1)
            if kind not in STATEFUL:
                layers.append(_Attention())
            elif kind in WITH_ATTENTION:
                layers.append(_Both(number_of_states=number))
            else:
                layers.append(LinearAttentionLayer(number_of_states=number))
        super().__init__(layers=layers)
        past = [state for state in states if state is not None]
        if past and len(past) < len(states):
            raise ValueError("states: rows with a past and rows without one cannot be in the same batch")
        for layer, kind, number in past[0] if past else ():
            value = torch.stack([state[layer, kind, number] for state in past])
            into = layers[layer]
            getattr(into, f"{kind}_states")[number] = value
            getattr(into, f"is_{kind}_states_initialized")[number] = into.has_previous_state[number] = True
            into.dtype, into.device = value.dtype, value.device
            if kind == "conv":
                into.conv_kernel_size[number] = value.shape[-1]

    def load(self, states: Sequence[State]) -> None:
        """Copies the states into the first rows of the existing tensors, whose addresses a CUDA graph has captured."""
        for key, value in self._tensors().items():
            value[: len(states)].copy_(torch.stack([state[key] for state in states]))

    def take(self, row: int) -> State:
        """A copy of the state of one row."""
        return {key: value[row].clone() for key, value in self._tensors().items()}

    def _tensors(self) -> State:
        """The state tensors of all rows."""
        return {
            (i, kind, number): value
            for i, layer in enumerate(self.layers)
            if isinstance(layer, LinearAttentionLayer)
            for kind in ("conv", "recurrent")
            for number, value in getattr(layer, f"{kind}_states").items()
            if value is not None
        }


def states_of(config: PreTrainedConfig, kept: dict[str, list[Tensor]], rows: int) -> list[State]:
    """The state of each row (here: of each piece of a prefill), from the tensors that the layers have kept.

    Args:
        kept: For each kind of state ("conv", "recurrent") the tensors of all layers that have one, in layer order.

    Raises:
        Unsupported: The number of tensors is not the number of layers that have such a state.
    """
    keys = [
        (layer, kind, number)
        for layer, (of, options) in enumerate(zip(*layer_types(config)))
        if of in STATEFUL
        for kind, count in (("conv", options.get("number_of_states", 1)), ("recurrent", 0 if of == "conv" else 1))
        for number in range(count)
    ]
    states: list[State] = [{} for _ in range(rows)]
    for kind in ("conv", "recurrent"):
        wanted, found = [key for key in keys if key[1] == kind], kept.get(kind, [])
        if len(found) != len(wanted):
            raise Unsupported(f"{len(found)} layers returned a {kind} state for a token tree, expected {len(wanted)}")
        for key, values in zip(wanted, found):
            for state, value in zip(states, values):
                state[key] = value.clone()  # a view would keep the tensor of all rows alive
    return states


class _PassThrough:
    def update(self, key_states, value_states, *args, **kwargs):
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0


class _Attention(_PassThrough, DynamicLayer):
    pass


class _Both(_PassThrough, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc, override]  # as theirs
    pass


class RowStates:
    """Carries the states of the rows of a generation from one decode batch to the next.

    trees: Whether the layers can run token trees. Then pieces whose sequences begin in the same prefill run together.
    fresh: The states of rows that have just been prefilled, which happens to a row after a preemption.
    """

    def __init__(self, lm: CausalLM):
        self.config = lm.base.config.get_text_config()
        kinds = layer_types(self.config)[0]
        refusals = _recurrent.refusals(lm.text, [kind for kind in kinds if kind in STATEFUL])
        self.trees = _recurrent.reached_by_keyword(lm.text) and not any(refusals)
        if self.trees:
            _recurrent.install(lm.text)
        self.fresh: dict[Segment, State] = {}
        self._batch: States | None = None
        self._places: dict[Row, int] = {}

    def of(self, rows: Sequence[Row]) -> list[State]:
        """The states of the rows of the next batch."""
        return [self._state(row) for row in rows]

    def run(self, batch: States | None, rows: Sequence[Row]) -> None:
        """Records that from now on the states of these rows are in `batch`."""
        self._batch, self._places = batch, {row: i for i, row in enumerate(rows)}

    def _state(self, row: Row) -> State:
        if row in self.fresh:
            return self.fresh.pop(row)
        if self._batch is not None and row in self._places:
            return self._batch.take(self._places[row])
        return row.parent.payload.state

    def taken(self, states: States | Lineage, pieces: int) -> list[State]:
        """The state after each of the pieces that a forward has run with `states`."""
        if isinstance(states, States):
            return [states.take(0)]
        return states_of(self.config, states.kept or {}, pieces)

    def behind(self, segment: Segment, ends: dict[Segment, State]) -> States:
        """The states with which the next piece of a segment starts.

        Args:
            ends: The state after the last computed token of each segment that this prefill has worked on so far.
        """
        state = ends.get(segment)
        if state is None and segment.parent.payload is not None:
            state = segment.parent.payload.state
        return States(self.config, [ends.get(segment.parent) if state is None else state])
