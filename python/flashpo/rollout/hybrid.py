"""States of layers that are not attention (gated delta nets, state spaces, short convolutions), one for each row.

Such a layer keeps a state of fixed size in place of keys and values. A prompt's state is copied for each completion
that starts from it, and moves with its row when rows of the batch come and go.
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
    get_layer_types_and_kwargs,
)

from flashpo.rollout.prefix_tree import Segment
from flashpo.rollout.scheduler import Row

WITH_ATTENTION = ("hybrid", "hybrid_sliding")  # layer types that keep a state beside keys and values
STATEFUL = ("linear_attention", "conv", *WITH_ATTENTION)
State = dict[tuple[int, str, int], Tensor]  # (layer, kind, number) -> the layer's tensor, mostly one row's part of it


def is_hybrid(config: PreTrainedConfig) -> bool:
    return any(kind in STATEFUL for kind in get_layer_types_and_kwargs(config)[0])


def cache_keyword(backbone: nn.Module) -> str:
    """The name under which its forward takes a cache: "past_key_values" in older transformers."""
    kind: Any = type(backbone)
    return _cache_keyword(kind)


@functools.cache
def _cache_keyword(kind: Any) -> str:
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


class States(Cache):
    """The `past_key_values` of one batch of a hybrid model; its attention layers keep theirs in the engine's blocks.

    Args:
        states: of the batch's rows, from `take`; None for rows that have read nothing yet.
    """

    def __init__(self, config: PreTrainedConfig, states: Sequence[State | None]):
        layers: list[Any] = []
        for kind, options in zip(*get_layer_types_and_kwargs(config)):
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
        """Into the first rows, where they are: a CUDA graph knows no other place."""
        for key, value in self._tensors().items():
            value[: len(states)].copy_(torch.stack([state[key] for state in states]))

    def take(self, row: int) -> State:
        """A copy of one row's state."""
        return {key: value[row].clone() for key, value in self._tensors().items()}

    def _tensors(self) -> State:
        """Of all rows."""
        return {
            (i, kind, number): value
            for i, layer in enumerate(self.layers)
            if isinstance(layer, LinearAttentionLayer)
            for kind in ("conv", "recurrent")
            for number, value in getattr(layer, f"{kind}_states").items()
            if value is not None
        }


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
    """The states of a generation's rows from one batch to the next.

    fresh: of rows that have been prefilled, which is what happens to them after a preemption.
    """

    def __init__(self, config: PreTrainedConfig):
        self.config = config
        self.fresh: dict[Segment, State] = {}
        self._batch: States | None = None
        self._places: dict[Row, int] = {}

    def of(self, rows: Sequence[Row]) -> list[State]:
        """Of the rows of the next batch."""
        return [self._state(row) for row in rows]

    def run(self, batch: States | None, rows: Sequence[Row]) -> None:
        """From now on the states of these rows are in `batch`."""
        self._batch, self._places = batch, {row: i for i, row in enumerate(rows)}

    def _state(self, row: Row) -> State:
        if row in self.fresh:
            return self.fresh.pop(row)
        if self._batch is not None and row in self._places:
            return self._batch.take(self._places[row])
        return row.parent.payload.state

    def behind(self, segment: Segment, ends: dict[Segment, State]) -> States:
        """For the next piece of a segment; `ends`: of what this prefill has computed so far."""
        state = ends.get(segment)
        if state is None and segment.parent.payload is not None:
            state = segment.parent.payload.state
        return States(self.config, [ends.get(segment.parent) if state is None else state])
