"""Canonical layouts as rows of small numbers, and as the features that the surrogate sees. Pure NumPy.

A *row* is what the search for the next layout computes with: the effective mask's bits and the position of
the rank among the space's ranks, ``L + 1`` bytes. The empty layout is all zeros, as its rank means nothing,
so equal layouts are equal rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from milp_ray.memory.layout import CanonicalLayout, spread

if TYPE_CHECKING:
    from milp_ray.memory.space import SearchSpace

Rows: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True)
class CanonicalRows:
    """The canonical layouts of a space, as rows of shape (n, L + 1)."""

    space: SearchSpace

    def encode(self, layouts: Iterable[CanonicalLayout]) -> Rows:
        """Rows of layouts of the space, in their order."""
        found = [[*layout.mask, self._position(layout)] for layout in layouts]
        return np.array(found, dtype=np.uint8).reshape(-1, self.space.n_layers + 1)

    def decode(self, row: Rows) -> CanonicalLayout:
        """The layout of one row."""
        return CanonicalLayout(tuple(bool(bit) for bit in row[:-1]), self._ranks[int(row[-1])])

    def raw(self, row: Rows) -> dict[str, Any]:
        """A raw point of the space whose canonical layout is that of one row."""
        return dict(self.space.raw(self.decode(row)))

    def features(self, rows: Rows) -> NDArray[np.float64]:
        """What the surrogate sees, in [0, 1], shape (n, L + 2).

        The mask's bits, their number over L, and the rank's position over the last one's. Layouts of one
        number of LoRAs and of one rank are so as near to each other as they should be, wherever they are.
        """
        masks = rows[:, :-1].astype(float)
        rank = rows[:, -1:] / max(1, len(self._ranks) - 1)
        return np.concatenate([masks, masks.mean(axis=1, keepdims=True), rank], axis=1)

    def all(self) -> Rows:
        """Every layout of the space; only for small spaces (``space.n_canonical``)."""
        return self._with_ranks(np.array(self._all_masks(), dtype=np.uint8))

    def random(self, n: int, rng: np.random.Generator) -> Rows:
        """``n`` random rows, repeats and the empty one among them.

        The density is drawn first and then the bits, so that few and many layers are as likely as half.
        """
        if "layers" not in self.space.factors:
            rows = self.all()
            return rows[rng.integers(len(rows), size=n)]
        bits = rng.random((n, self.space.n_layers))
        # The smallest coordinates are active: those below the density, at most as many as are allowed.
        order = bits.argsort(axis=1).argsort(axis=1)
        masks = (bits < rng.random((n, 1))) & (order < self._most_loras)
        ranks = rng.integers(len(self._ranks), size=n) * masks.any(axis=1)
        return np.column_stack([masks, ranks]).astype(np.uint8)

    def neighbours(self, row: Rows) -> Rows:
        """Layouts one step from that of one row: (k, L + 1), all different, ``row`` not among them.

        A step turns one layer on or off, moves one LoRA to another layer, leaves fewer LoRAs evenly spread
        over the active layers (a smaller n under the same α), or takes another rank.
        """
        if "layers" not in self.space.factors:  # a few dozen layouts, all near
            found = self.all()
        else:
            masks = self._neighbour_masks(row[:-1])
            if row[:-1].any():
                ranks = np.full(len(masks), row[-1])
                moved = np.column_stack([masks, ranks * masks.any(axis=1)]).astype(np.uint8)
                found = np.concatenate([moved, self._with_ranks(row[None, :-1])])
            else:  # the rank of the empty layout is none: all ranks are one step away
                found = self._with_ranks(masks)
        return found[(found != row).any(axis=1)]

    def canonical(self, active: Rows, number: NDArray[np.int64], rank: NDArray[np.int64]) -> Rows:
        """Rows of raw layouts, many at once.

        Args:
            active: α, (n, L).
            number: how many LoRAs, (n,).
            rank: positions among the ranks, (n,).
        """
        position = active.cumsum(axis=1, dtype=np.int64) - 1
        carried = self._carried[active.sum(axis=1, dtype=np.int64)[:, None], number[:, None], position]
        masks = active * carried
        return np.column_stack([masks, rank * masks.any(axis=1)]).astype(np.uint8)

    def _neighbour_masks(self, mask: Rows) -> Rows:
        n_layers = len(mask)
        active, inactive = np.flatnonzero(mask), np.flatnonzero(mask == 0)
        flipped = mask ^ np.eye(n_layers, dtype=np.uint8)
        swaps = np.repeat(mask[None], len(active) * len(inactive), axis=0)
        pairs = np.arange(len(swaps))
        swaps[pairs, np.repeat(active, len(inactive))] = 0
        swaps[pairs, np.tile(inactive, len(active))] = 1
        # With one LoRA fewer than the mask has the flips already hold every choice.
        thinner = np.zeros((max(0, len(active) - 2), n_layers), dtype=np.uint8)
        for n, other in enumerate(thinner, start=1):
            other[active[list(spread(len(active), n))]] = 1
        masks = np.concatenate([flipped, swaps, thinner])
        if len(active) == 2:  # its thinned masks are flips
            masks = masks[: n_layers + len(swaps)]
        return masks[masks.sum(axis=1) <= self._most_loras]

    def _all_masks(self) -> list[list[int]]:
        n_layers, number = self.space.n_layers, self.space.fixed_number
        if "layers" in self.space.factors:
            chosen: Iterable[tuple[int, ...]] = (
                layers
                for n in range(self._most_loras + 1)
                for layers in itertools.combinations(range(n_layers), n)
            )
        else:
            held = self.space.fixed_layers
            active = tuple(range(n_layers)) if held is None else tuple(sorted(set(held)))
            if "number" in self.space.factors:
                numbers: Iterable[int] = range(len(active) + 1)
            else:
                numbers = [len(active) if number is None else min(number, len(active))]
            chosen = (tuple(active[i] for i in spread(len(active), n)) for n in numbers)
        return [[int(index in layers) for index in range(n_layers)] for layers in chosen]

    def _with_ranks(self, masks: Rows) -> Rows:
        """Every mask with every rank; the empty one once."""
        n_ranks = len(self._ranks)
        rows = np.column_stack([np.repeat(masks, n_ranks, axis=0), np.tile(np.arange(n_ranks), len(masks))])
        return rows[rows[:, :-1].any(axis=1) | (rows[:, -1] == 0)].astype(np.uint8)

    def _position(self, layout: CanonicalLayout) -> int:
        return 0 if layout.is_empty else self._ranks.index(layout.rank)

    @cached_property
    def _carried(self) -> NDArray[np.bool_]:
        """[k, n, p]: whether the p-th of k active layers carries one of n LoRAs."""
        n_layers = self.space.n_layers
        carried = np.zeros((n_layers + 1, n_layers + 1, n_layers), dtype=bool)
        for k, n in itertools.product(range(n_layers + 1), repeat=2):
            carried[k, n, list(spread(k, n))] = True
        return carried

    @cached_property
    def _ranks(self) -> tuple[int, ...]:
        """Ranks that a layout may have; one where the rank is held."""
        if "rank" in self.space.factors:
            return self.space.ranks
        return (self.space.ranks[0] if self.space.fixed_rank is None else self.space.fixed_rank,)

    @property
    def _most_loras(self) -> int:
        """How many LoRAs a layout may have where the layers are searched."""
        number = self.space.fixed_number
        return self.space.n_layers if number is None else number


def row_keys(rows: Rows) -> list[bytes]:
    """A hashable key of every row, the same for the same layout of one base."""
    return [row.tobytes() for row in np.ascontiguousarray(rows)]
