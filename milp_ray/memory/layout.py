"""The layout θ = (α, n, r) of an adapter, and its canonical form.

α says for every layer whether it may carry a LoRA, n how many LoRAs there are, r their rank. Different
(α, n) can put LoRAs on the same layers, so the pair (effective mask, r) is what is trained, cached,
de-duplicated and modelled: :class:`CanonicalLayout`. Pure: no model, no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from milp_ray.errors import MilpError

EMPTY_KEY = "empty"


def spread(n_items: int, n_chosen: int) -> tuple[int, ...]:
    """Positions of ``n_chosen`` items evenly spread over ``n_items`` of them, ascending.

    The items are cut into ``n_chosen`` equal bins and the middle of each bin is taken, so that gaps between
    neighbours differ by at most one and one item alone is the middle one. All items where ``n_chosen`` is
    not below ``n_items``.
    """
    n_chosen = min(n_chosen, n_items)
    return tuple((2 * i + 1) * n_items // (2 * n_chosen) for i in range(n_chosen))


@dataclass(frozen=True, slots=True)
class CanonicalLayout:
    """Which layers carry a LoRA, and its rank.

    ``mask`` has one entry a layer of the base. The empty mask means "no adapter"; the rank says nothing
    there and is held at 0, so that all empty layouts of a base are equal.
    """

    mask: tuple[bool, ...]
    rank: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", tuple(bool(bit) for bit in self.mask))
        if not any(self.mask):
            object.__setattr__(self, "rank", 0)
        elif self.rank < 1:
            raise MilpError(f"rank {self.rank} of a layout with LoRAs: give a whole number of at least 1")

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers that carry a LoRA, ascending."""
        return tuple(index for index, bit in enumerate(self.mask) if bit)

    @property
    def n_layers(self) -> int:
        """Number of layers of the base, with a LoRA or without."""
        return len(self.mask)

    @property
    def is_empty(self) -> bool:
        """Whether no layer carries a LoRA: the base alone."""
        return not any(self.mask)

    @property
    def key(self) -> str:
        """A short name, the same for the same layout and no other of the base: "01011010-r16" or "empty"."""
        if self.is_empty:
            return EMPTY_KEY
        return "".join("1" if bit else "0" for bit in self.mask) + f"-r{self.rank}"

    def to_dict(self) -> dict[str, Any]:
        """The layout in plain types, for JSON and YAML; :meth:`from_dict` reads it."""
        return {"n_layers": self.n_layers, "layers": list(self.layers), "rank": self.rank}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CanonicalLayout:
        """Read what :meth:`to_dict` wrote.

        Raises:
            MilpError: a key is missing, a value is no whole number, or a layer is not one of the base's.
        """
        try:
            n_layers, rank = _whole(values["n_layers"]), _whole(values["rank"])
            layers = [_whole(layer) for layer in values["layers"]]
        except (KeyError, TypeError, ValueError) as error:
            raise MilpError(
                f"a layout has the keys {sorted(map(str, values))}: it needs n_layers, layers (a list) and "
                "rank, all of whole numbers"
            ) from error
        outside = [layer for layer in layers if not 0 <= layer < n_layers]
        if outside:
            raise MilpError(f"layers {outside} of a layout for {n_layers} layers: use 0 to {n_layers - 1}")
        chosen = set(layers)
        return cls(mask=tuple(index in chosen for index in range(n_layers)), rank=rank)


@dataclass(frozen=True, slots=True)
class Layout:
    """A raw search point θ: ``active`` is α (one bit a layer), ``n_loras`` is n, ``rank`` is r.

    Raises:
        MilpError: ``n_loras`` is outside 0 to the number of layers, or the rank is below 1.
    """

    active: tuple[bool, ...]
    n_loras: int
    rank: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "active", tuple(bool(bit) for bit in self.active))
        if not 0 <= self.n_loras <= len(self.active):
            raise MilpError(
                f"n_loras {self.n_loras} for a base of {len(self.active)} layers: use 0 to {len(self.active)}"
            )
        if self.rank < 1:
            raise MilpError(f"rank {self.rank}: give a whole number of at least 1")

    def canonical(self) -> CanonicalLayout:
        """The effective mask with min(n, Σα) bits, evenly spread over the active layers, and the rank."""
        active_layers = [index for index, bit in enumerate(self.active) if bit]
        chosen = {active_layers[position] for position in spread(len(active_layers), self.n_loras)}
        mask = tuple(index in chosen for index in range(len(self.active)))
        return CanonicalLayout(mask=mask, rank=self.rank)


def _whole(value: Any) -> int:
    """``value`` as an int; a bool, a fraction or a string is refused."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{type(value).__name__} is no whole number")
    return value
