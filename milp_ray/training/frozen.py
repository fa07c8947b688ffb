"""The layers below the lowest LoRA, run once a sequence instead of once an epoch.

Nothing below the lowest LoRA changes while a job trains, and a job sees the same few sequences in every
epoch. So what enters that layer is computed once and replayed: the layers below stand aside for the time.
Without dropout in the base (it is in eval mode) this is the same computation, not an approximation.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from milp_ray.training.data import Batch, Sequence, chunks, make_batches

if TYPE_CHECKING:
    from milp_ray.training.base import Base

# Architectures whose model hands each layer the hidden states first and takes them back bare.
_REPLAYABLE = frozenset({"llama", "mistral", "qwen2", "qwen3", "gpt2", "roberta", "xlm-roberta"})
_MOST_BYTES = 2**30  # of kept hidden states; above it the layers are run each time


class FrozenPrefix:
    """Hidden states that enter layer ``first_layer``, kept for a job's sequences."""

    def __init__(self, first_layer: int, replay: _Replay) -> None:
        self.first_layer = first_layer
        self._replay = replay
        self._states: dict[tuple[int, ...], Tensor] = {}

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.ids in self._states

    def keep(self, sequence: Sequence, states: Tensor) -> None:
        """Remember (length, hidden) states of a sequence."""
        self._states[sequence.ids] = states

    def show(self, batch: Batch) -> None:
        """Let the next forward pass of the model find the states of ``batch``, padded with zeros."""
        states = [self._states[s.ids] for s in batch.sequences]
        padded = states[0].new_zeros((*batch.ids.shape, states[0].shape[-1]))
        for row, state in enumerate(states):
            padded[row, : state.shape[0]] = state
        self._replay.states = padded


@contextmanager
def frozen_prefix(
    base: Base, first_layer: int, sequences: SequenceOf[Sequence], batch_size: int
) -> Iterator[FrozenPrefix | None]:
    """Compute the states of ``sequences`` below ``first_layer``, then let those layers stand aside.

    Yields ``None``, and leaves the model alone, where there is nothing to save: no layer below, an
    architecture that cannot be replayed, or more hidden states than fit the allowance.
    """
    layers: Any = base.model.get_submodule(base.spec.layers_path)
    distinct = sorted({s.ids: s for s in sequences}.values(), key=lambda s: -len(s.ids))
    if first_layer == 0 or not distinct or not _fits(base, distinct):
        yield None
        return
    replay = _Replay(layers[0])
    prefix = FrozenPrefix(first_layer, replay)
    _compute(base, layers[first_layer], prefix, distinct, batch_size)
    whole = [layers[i] for i in range(first_layer)]
    try:
        layers[0] = replay
        for i in range(1, first_layer):
            layers[i] = _Aside(whole[i])
        yield prefix
    finally:
        for i, layer in enumerate(whole):
            layers[i] = layer


def _fits(base: Base, sequences: list[Sequence]) -> bool:
    if base.spec.model_type not in _REPLAYABLE:
        return False
    n_numbers = sum(len(s.ids) for s in sequences) * int(base.model.config.hidden_size)
    return n_numbers * base.dtype.itemsize <= _MOST_BYTES


def _compute(
    base: Base, layer: nn.Module, prefix: FrozenPrefix, sequences: list[Sequence], batch_size: int
) -> None:
    from milp_ray.training.loss import model_inputs

    handle = layer.register_forward_pre_hook(stop_here)
    try:
        for indices in chunks(range(len(sequences)), batch_size):
            for batch in make_batches(sequences, indices, base):
                try:
                    with torch.no_grad():
                        base.model(**model_inputs(batch, base.first_position))
                except ReachedError as reached:
                    for sequence, states in zip(batch.sequences, reached.states, strict=True):
                        prefix.keep(sequence, states[: len(sequence.ids)].clone())
    finally:
        handle.remove()


class ReachedError(Exception):
    """Ends a forward pass where nothing further is wanted."""

    def __init__(self, states: Tensor) -> None:
        super().__init__("reached the lowest layer with LoRA")
        self.states = states


def stop_here(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook before a layer's forward pass: what enters the layer leaves as a :class:`ReachedError`."""
    raise ReachedError(args[0])


class _Aside(nn.Module):
    """Stands in for a layer and hands the hidden states on; other attributes are the layer's own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # Beside the registry of modules: the layer must not be seen, moved or wrapped through here.
        self.__dict__["_layer"] = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


class _Replay(_Aside):
    """Stands in for the first layer and answers with the states of the batch at hand."""

    states: Tensor

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.states
