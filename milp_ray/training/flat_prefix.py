"""The layers below the lowest LoRA of a pack, run once a sequence instead of once an epoch.

The same idea as :mod:`milp_ray.training.frozen`, for lines of tokens: a job's states are worked out when it
gets its slot. What does not fit the allowance is worked out anew in every step, which is what an ordinary
forward pass would do.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from milp_ray.training.flat_batch import Part, Texts, flat_batch, pieces_of, together
from milp_ray.training.frozen import ReachedError, stop_here

if TYPE_CHECKING:
    from milp_ray.training.base import Base
    from milp_ray.training.flat import FlatView

_MOST_BYTES = {"cpu": 2**30, "cuda": 2**33}  # of kept hidden states, of all jobs that have a slot


class FlatPrefix:
    """Hidden states that enter layer ``first_layer``; there is nothing to keep while that is 0."""

    def __init__(self, base: Base, view: FlatView, tokens_a_pass: int) -> None:
        self._base, self._view = base, view
        self.first_layer = 0
        self._tokens_a_pass = tokens_a_pass
        self._most = _MOST_BYTES.get(base.device.type, 2**30)
        self._kept = 0
        self.shown: Tensor | None = None

    def move(self, first_layer: int, kept: SequenceOf[Texts]) -> None:
        """From now on for another layer: the states of the texts ``kept``, all that are, are forgotten."""
        for texts in kept:
            self.drop(texts)
        self.first_layer = first_layer

    def keep(self, several: SequenceOf[Texts]) -> None:
        """Work out the states of jobs' sequences together, as far as there is room for them."""
        if self.first_layer == 0:
            return
        chosen: list[Texts] = []
        a_token = int(self._base.model.config.hidden_size) * self._base.dtype.itemsize
        for texts in several:
            if self._kept + texts.starts[-1] * a_token <= self._most:
                self._kept += texts.starts[-1] * a_token
                chosen.append(texts)
        if not chosen:
            return
        states = self._below([Part(texts, tuple(range(len(texts))), None) for texts in chosen])
        for texts, own in zip(chosen, states.split([t.starts[-1] for t in chosen]), strict=True):
            texts.states = own

    def drop(self, texts: Texts) -> None:
        """The job has left its slot."""
        if texts.states is not None:
            self._kept -= texts.states.numel() * texts.states.element_size()
            texts.states = None

    def states_of(self, parts: SequenceOf[Part]) -> Tensor | None:
        """(n_tokens, hidden) of the line that the parts make; ``None`` where no layer lies below."""
        if self.first_layer == 0:
            return None
        pieces: list[Tensor] = []
        for part in parts:
            texts = part.texts
            if texts.states is None:
                pieces.append(self._below([part]))
            else:
                starts, lengths = texts.starts, texts.lengths
                pieces += [texts.states[starts[i] : starts[i] + lengths[i]] for i in part.chosen]
        return torch.cat(pieces)

    def _below(self, parts: SequenceOf[Part]) -> Tensor:
        """(n_tokens, hidden) of the parts' sequences, one after the other."""
        pieces = [
            (None, Part(part.texts, piece, None))
            for part in parts
            for piece in pieces_of(part.texts, part.chosen, self._tokens_a_pass)
        ]
        states = []
        layers: Any = self._base.model.get_submodule(self._base.spec.layers_path)
        handle = layers[self.first_layer].register_forward_pre_hook(stop_here)
        try:
            with torch.no_grad():
                for some in together(pieces, self._tokens_a_pass):
                    batch = flat_batch([part for _, part in some], self._base.device)
                    try:
                        self._view.hidden_states(batch.ids, batch.rows)
                    except ReachedError as reached:
                        states.append(reached.states[0])
        finally:
            handle.remove()
        return torch.cat(states)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Let the layers below hand on :attr:`shown` wherever it is set."""
        layers: Any = self._base.model.get_submodule(self._base.spec.layers_path)
        whole = list(layers)
        try:
            for i, layer in enumerate(whole):
                layers[i] = _StandIn(layer, i, self)
            yield
        finally:
            for i, layer in enumerate(whole):
                layers[i] = layer


class _StandIn(nn.Module):
    """Stands in for a layer while it lies below the lowest LoRA; other attributes are the layer's own."""

    def __init__(self, layer: nn.Module, index: int, prefix: FlatPrefix) -> None:
        super().__init__()
        # Beside the registry of modules: the layer must not be seen, moved or wrapped through here.
        self.__dict__.update(_layer=layer, _index=index, _prefix=prefix)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        prefix: FlatPrefix = self.__dict__["_prefix"]
        if prefix.shown is None or self.__dict__["_index"] >= prefix.first_layer:
            return self.__dict__["_layer"](hidden_states, *args, **kwargs)
        return prefix.shown[None]
