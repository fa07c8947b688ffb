"""Gated cross-attention: a frozen base looks at a few latent vectors of a user from within its layers.

After some of the base's decoder layers stands a block of Flamingo's (Alayrac et al. 2022, arXiv 2204.14198):
h + tanh(gate) · attention(norm(h), latents). The gate begins at 0, so that a fresh block hands on exactly
what it gets. The attention is narrow: down from the base's hidden size, and up again.

The latents take no place in the prompt. Blocks stand on the base for the time alone, as hooks on its layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from milp_ray.errors import MilpError
from milp_ray.memory.layout import spread

if TYPE_CHECKING:
    from milp_ray.config.methods import CrossAttentionSection
    from milp_ray.training.base import Base

KeysValues = tuple[Tensor, Tensor]

# AdamW moves a parameter by about the learning rate a step, however large its gradient. Flamingo's gates have
# hundreds of thousands of steps to open in; with a few hundred they open if they go so much faster.
_GATE_SPEED = 30.0


class CrossAttentionBlock(nn.Module):
    """Attention of hidden states to latents, added to the states through a gate that begins at 0.

    Args:
        n_hidden: numbers of one of the base's hidden states.
        n_latent: numbers of one latent.
        width: numbers of all heads' queries together, and of their keys and values.
        n_heads: among which the width is shared out.
    """

    def __init__(self, n_hidden: int, n_latent: int, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm, self.norm_latents = nn.LayerNorm(n_hidden), nn.LayerNorm(n_latent)
        self.query = nn.Linear(n_hidden, width, bias=False)
        self.key_value = nn.Linear(n_latent, 2 * width, bias=False)
        self.leave = nn.Linear(width, n_hidden, bias=False)
        self.gate = nn.Parameter(torch.zeros(1))  # of one number: DeepSpeed takes none without dimensions

    def keys_values(self, latents: Tensor) -> KeysValues:
        """Of latents (n, n_latents, n_latent), (n, n_heads, n_latents, width / n_heads) each."""
        keys, values = self.key_value(self.norm_latents(latents)).chunk(2, -1)
        return self._by_head(keys), self._by_head(values)

    def forward(self, states: Tensor, looked_at: KeysValues) -> Tensor:
        """Hidden states (n, length, n_hidden) that have looked at the latents; the states' type."""
        queries = self._by_head(self.query(self.norm(states.float())))
        found = functional.scaled_dot_product_attention(queries, *looked_at)
        found = (_GATE_SPEED * self.gate).tanh() * self.leave(found.transpose(1, 2).flatten(2))
        return states + found.to(states.dtype)

    def _by_head(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)


class CrossAttention(nn.Module):
    """The blocks of one base, each after one of its layers; float32, whatever the base's type.

    Args:
        layers: after which layers, counted from 0.
        n_hidden, n_latent, width, n_heads: see :class:`CrossAttentionBlock`.
    """

    def __init__(
        self, layers: SequenceOf[int], n_hidden: int, n_latent: int, width: int, n_heads: int
    ) -> None:
        super().__init__()
        self.layers, self.n_latent = tuple(layers), n_latent
        self.blocks = nn.ModuleList(CrossAttentionBlock(n_hidden, n_latent, width, n_heads) for _ in layers)

    def __getitem__(self, number: int) -> CrossAttentionBlock:
        block = self.blocks[number]
        assert isinstance(block, CrossAttentionBlock)
        return block

    def keys_values(self, latents: Tensor) -> list[KeysValues]:
        """What each block's states look at, of latents (n, n_latents, n_latent)."""
        return [self[number].keys_values(latents) for number in range(len(self.layers))]


@dataclass(frozen=True, slots=True)
class Latents:
    """What texts look at, and by which blocks.

    ``values`` is (n_latents, size) for all texts, or (n_texts, n_latents, size).
    """

    values: Tensor
    blocks: CrossAttention


def new_cross_attention(
    base: Base, n_latent: int, section: CrossAttentionSection, seed: int
) -> CrossAttention:
    """Fresh blocks, drawn from ``seed`` alone, evenly spread over the base's layers.

    Args:
        base: which they are for.
        n_latent: numbers of one latent.
        section: how many blocks there are, and their sizes.
        seed: of the weights.

    Raises:
        MilpError: the base has fewer layers than there are to be blocks.
    """
    if section.n_blocks > base.n_layers:
        raise MilpError(
            f"methods.uelp.cross_attention.n_blocks is {section.n_blocks}, and each block stands after a "
            f"layer of its own: this base has {base.n_layers}; use at most {base.n_layers}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = spread(base.n_layers, section.n_blocks)
        n_hidden = int(base.model.config.hidden_size)
        made = CrossAttention(layers, n_hidden, n_latent, section.width, section.n_heads)
    return made.to(base.device)


def latents_of_each(latents: Latents | None, n_texts: int) -> list[Tensor | None]:
    """What each of ``n_texts`` texts looks at, (n_latents, size) each; ``None`` where that is nothing.

    Raises:
        MilpError: the latents have another shape, or are of a size that the blocks do not look at.
    """
    if latents is None:
        return [None] * n_texts
    values, size = latents.values, latents.blocks.n_latent
    fits = values.dim() == 2 or (values.dim() == 3 and len(values) == n_texts)
    if not fits or values.shape[-1] != size:
        raise MilpError(
            f"latents of shape {tuple(values.shape)}: for {n_texts} texts and these blocks give "
            f"(n_latents, {size}) or ({n_texts}, n_latents, {size})"
        )
    return [values] * n_texts if values.dim() == 2 else list(values)


def only_blocks(asked: SequenceOf[Latents | None]) -> CrossAttention | None:
    """The blocks by which all who look at latents do; ``None`` where nobody does.

    Raises:
        MilpError: some look by other blocks than others, or at another number of latents: a pass has one set
            of blocks, and rows of one shape.
    """
    found = [one for one in asked if one is not None]
    if not found:
        return None
    n_sets = len({id(one.blocks) for one in found})
    counts = sorted({one.values.shape[-2] for one in found})
    if n_sets > 1 or len(counts) > 1:
        raise MilpError(
            f"one call looks at latents by {n_sets} sets of blocks, and at {counts} latents a text: it can "
            "by one set and at one number; make a call for each"
        )
    return found[0].blocks


@contextmanager
def cross_attended(base: Base, cross: CrossAttention | None) -> Iterator[LatentView]:
    """Let the base's layers look at latents for the time; :meth:`LatentView.show` says at which.

    The base's weights are not touched, and on leaving, whatever happens, it is as it was. ``None``: the base
    is left alone. Adapters may be on the base at the same time.

    Raises:
        MilpError: a block is to stand after a layer that the base does not have.
    """
    view = LatentView(base.device, cross)
    layers: Any = base.model.get_submodule(base.spec.layers_path)
    places = () if cross is None else cross.layers
    if places and max(places) >= len(layers):
        raise MilpError(
            f"a block of cross-attention is to stand after layer {max(places)}, and the base's last is layer "
            f"{len(layers) - 1}; use the base that the blocks were trained on"
        )
    handles = []
    try:
        for number, place in enumerate(places):
            handles.append(layers[place].register_forward_hook(view.hook(number)))
        yield view
    finally:
        for handle in handles:
            handle.remove()


class LatentView:
    """At which latents the rows of the next passes look."""

    def __init__(self, device: torch.device, cross: CrossAttention | None) -> None:
        self._device, self._cross = device, cross
        self._looked_at: list[KeysValues] | None = None  # of each block
        self._looks: Tensor | None = None  # (n_rows, 1, 1) bool: which rows do; None: all

    def show(self, latents: SequenceOf[Tensor | None]) -> None:
        """Row i of the next passes looks at ``latents[i]`` (n_latents, size); ``None``: at nothing.

        Gradients flow to the latents.
        """
        given = [one for one in latents if one is not None]
        self._looked_at = self._looks = None
        if self._cross is None or not given:
            return
        rows = [torch.zeros_like(given[0]) if one is None else one for one in latents]
        self._looked_at = self._cross.keys_values(torch.stack(rows).to(self._device, torch.float32))
        if len(given) < len(latents):
            looks = torch.tensor([one is not None for one in latents], device=self._device)
            self._looks = looks[:, None, None]

    def keep_rows(self, rows: Tensor) -> None:
        """The next passes have the rows (n_kept,) alone, of those that were shown."""
        if self._looked_at is not None:
            self._looked_at = [(keys[rows], values[rows]) for keys, values in self._looked_at]
        if self._looks is not None:
            self._looks = self._looks[rows]

    def hook(self, number: int) -> Any:
        """A forward hook for the layer before block ``number``."""

        def after(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if self._cross is None or self._looked_at is None:
                return output
            # Some architectures' layers answer with a tuple that begins with the states.
            states = output[0] if isinstance(output, tuple) else output
            seen: Tensor = self._cross[number](states, self._looked_at[number])
            if self._looks is not None:
                seen = torch.where(self._looks, seen, states)
            return (seen, *output[1:]) if isinstance(output, tuple) else seen

        return after
