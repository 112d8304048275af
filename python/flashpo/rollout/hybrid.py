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
)

from flashpo import _recurrent
from flashpo._causal_lm import STATEFUL, WITH_ATTENTION, CausalLM, Unsupported
from flashpo._hosts.transformers import layer_types
from flashpo.ops._lineage import Lineage
from flashpo.rollout.prefix_tree import Segment
from flashpo.rollout.scheduler import Row

State = dict[tuple[int, str, int], Tensor]  # (layer, kind, number) -> the layer's tensor, mostly one row's part of it


def is_hybrid(config: PreTrainedConfig) -> bool:
    return any(kind in STATEFUL for kind in layer_types(config)[0])


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


def states_of(config: PreTrainedConfig, kept: dict[str, list[Tensor]], rows: int) -> list[State]:
    """Of each row, from what the layers have left, kind by kind in their order.

    Raises:
        Unsupported: these are not all layers that have a state.
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
            raise Unsupported(f"{len(found)} layers have left a {kind} state behind a token tree, not {len(wanted)}")
        for key, values in zip(wanted, found):
            for state, value in zip(states, values):
                state[key] = value.clone()  # of a tensor that all rows share
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
    """The states of a generation's rows from one batch to the next.

    trees: whether the layers take token trees, so that several pieces that begin from nothing run at once.
    fresh: of rows that have been prefilled, which is what happens to them after a preemption.
    """

    def __init__(self, lm: CausalLM):
        self.config = lm.base.config.get_text_config()
        kinds = layer_types(self.config)[0]
        why_not = _recurrent.why_not(lm.text, [kind for kind in kinds if kind in STATEFUL])
        self.trees = _recurrent.reached_by_keyword(lm.text) and not any(why_not)
        if self.trees:
            _recurrent.install(lm.text)
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

    def taken(self, states: States | Lineage, pieces: int) -> list[State]:
        """Behind each of the pieces that a forward has run with `states`."""
        if isinstance(states, States):
            return [states.take(0)]
        return states_of(self.config, states.kept or {}, pieces)

    def behind(self, segment: Segment, ends: dict[Segment, State]) -> States:
        """For the next piece of a segment; `ends`: of what this prefill has computed so far."""
        state = ends.get(segment)
        if state is None and segment.parent.payload is not None:
            state = segment.parent.payload.state
        return States(self.config, [ends.get(segment.parent) if state is None else state])
