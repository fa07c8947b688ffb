"""What lies below the lowest feed-forward block with LoRA, run once a sequence instead of once an epoch.

Nothing there changes while a pack trains: the layers below, and the attention of the lowest layer itself, as
LoRA is on feed-forward maps alone. A job's states are worked out when it gets its slot. What does not fit the
allowance is worked out anew in every step, which is what an ordinary forward pass would do.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from milp_ray.training.flat_batch import Part, Texts, flat_batch, pieces_of, together
from milp_ray.training.frozen import ReachedError, stop_here

if TYPE_CHECKING:
    from milp_ray.training.base import Base
    from milp_ray.training.flat import FlatView


@dataclass(frozen=True, slots=True)
class _Block:
    """Names, from a layer, of what stands before its feed-forward block.

    ``norm`` (``None``: there is none) and ``attention`` are left out; ``behind`` reads what they and the
    residual have made. ``adds``: the layer itself adds what enters it to attention's answer.
    """

    norm: str | None
    attention: str
    behind: str
    adds: bool


_LLAMA = _Block("input_layernorm", "self_attn", "post_attention_layernorm", adds=True)
_ROBERTA = _Block(None, "attention", "intermediate", adds=False)
_BLOCKS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    "gpt2": _Block("ln_1", "attn", "ln_2", adds=True),
    **dict.fromkeys(("roberta", "xlm-roberta"), _ROBERTA),
}
_MOST_BYTES = {"cpu": 2**30, "cuda": 2**33}  # of kept hidden states, of all jobs that have a slot


class FlatPrefix:
    """Hidden states that enter the feed-forward block of layer ``first_layer``, the residual included."""

    def __init__(self, base: Base, view: FlatView, tokens_a_pass: int) -> None:
        self._base, self._view = base, view
        self.first_layer = 0
        self._block = _BLOCKS[base.spec.model_type]
        self.adds = self._block.adds
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
        chosen: list[Texts] = []
        a_token = int(self._base.model.config.hidden_size) * self._base.dtype.itemsize
        kept = self._kept
        for texts in several:
            if kept + texts.starts[-1] * a_token <= self._most:
                kept += texts.starts[-1] * a_token
                chosen.append(texts)
        if not chosen:
            return
        try:
            found = self._below([Part(texts, tuple(range(len(texts))), None) for texts in chosen])
            # Each in storage of its own, which is freed when its job leaves.
            states = [torch.cat(own) for own in found]
        except torch.OutOfMemoryError:
            self._most = self._kept  # there is no room for more than what is kept now
            return
        for texts, own_states in zip(chosen, states, strict=True):
            texts.states = own_states
        self._kept = kept

    def drop(self, texts: Texts) -> None:
        """The job has left its slot."""
        if texts.states is not None:
            self._kept -= texts.states.numel() * texts.states.element_size()
            texts.states = None

    def states_of(self, parts: SequenceOf[Part]) -> Tensor:
        """(n_tokens, hidden) of the line that the parts make."""
        pieces: list[Tensor] = []
        for part in parts:
            texts = part.texts
            if texts.states is None:
                pieces += self._below([part])[0]
            else:
                starts, lengths = texts.starts, texts.lengths
                pieces += [texts.states[starts[i] : starts[i] + lengths[i]] for i in part.chosen]
        return torch.cat(pieces)

    def _below(self, parts: SequenceOf[Part]) -> list[list[Tensor]]:
        """(n_tokens, hidden) of each part's sequences, one after the other, in pieces that view passes."""
        pieces = [
            (i, Part(part.texts, piece, None))
            for i, part in enumerate(parts)
            for piece in pieces_of(part.texts, part.chosen, self._tokens_a_pass)
        ]
        found: list[list[Tensor]] = [[] for _ in parts]
        layers: Any = self._base.model.get_submodule(self._base.spec.layers_path)
        behind = layers[self.first_layer].get_submodule(self._block.behind)
        handle = behind.register_forward_pre_hook(stop_here)
        try:
            with torch.no_grad():
                for some in together(pieces, self._tokens_a_pass):
                    batch = flat_batch([part for _, part in some], self._base.device)
                    try:
                        self._view.hidden_states(batch.ids, batch.rows)
                    except ReachedError as reached:
                        own = reached.states[0].split([part.n_tokens for _, part in some])
                        for (i, _), states in zip(some, own, strict=True):
                            found[i].append(states)
        finally:
            handle.remove()
        return found

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Wherever :attr:`shown` is set, let it stand in for everything below that block."""
        layers: Any = self._base.model.get_submodule(self._base.spec.layers_path)
        with ExitStack() as stack:
            for index, layer in enumerate(list(layers)):
                attention = self._block.attention
                stack.enter_context(_in_place_of(layer, attention, _Attention(layer, attention, index, self)))
                if self._block.norm is not None:
                    norm = self._block.norm
                    stack.enter_context(_in_place_of(layer, norm, _Norm(layer, norm, index, self)))
                name = str(index)
                stack.enter_context(_in_place_of(layers, name, _Layer(layers, name, index, self)))
            yield


class _StandIn(nn.Module):
    """Stands in for a module of a layer; other attributes are the module's own."""

    def __init__(self, owner: nn.Module, name: str, index: int, prefix: FlatPrefix) -> None:
        super().__init__()
        # Beside the registry of modules: the layer must not be seen, moved or wrapped through here.
        self.__dict__.update(own=getattr(owner, name), index=index, prefix=prefix)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["own"], name)

    @property
    def is_lowest(self) -> bool:
        """Whether the module's layer is the one whose block reads what is shown."""
        prefix: FlatPrefix = self.__dict__["prefix"]
        return prefix.shown is not None and self.__dict__["index"] == prefix.first_layer


class _Layer(_StandIn):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        prefix: FlatPrefix = self.__dict__["prefix"]
        if prefix.shown is not None:
            if self.__dict__["index"] < prefix.first_layer:
                return hidden_states
            if self.is_lowest:
                hidden_states = prefix.shown[None]
        return self.__dict__["own"](hidden_states, *args, **kwargs)


class _Norm(_StandIn):
    def forward(self, hidden_states: Tensor) -> Any:
        return hidden_states if self.is_lowest else self.__dict__["own"](hidden_states)


class _Attention(_StandIn):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.is_lowest:
            return self.__dict__["own"](hidden_states, *args, **kwargs)
        return (hidden_states.new_zeros(()) if self.__dict__["prefix"].adds else hidden_states), None


@contextmanager
def _in_place_of(owner: nn.Module, name: str, stand_in: nn.Module) -> Iterator[None]:
    own = getattr(owner, name)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, own)
