"""The space of layouts that a search proposes from: the raw factors α, n and r, any of them held fixed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout, Layout

if TYPE_CHECKING:
    import numpy as np

    from milp_ray.config.search import SpaceSection
    from milp_ray.memory.architecture import FfnShapes

Factor = Literal["layers", "number", "rank"]
FACTORS: tuple[Factor, ...] = ("layers", "number", "rank")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One searched dimension: ``values`` are all it may take, in ascending order.

    ``kind`` is "bool" (a layer's bit), "int" (a contiguous range) or "choice" (ordered numbers with gaps).
    """

    name: str
    kind: Literal["bool", "int", "choice"]
    values: tuple[int, ...] | tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """Layouts of a base with ``n_layers`` layers.

    ``factors`` are searched. A factor outside them is held: ``fixed_layers`` (indices of the active layers;
    None: all), ``fixed_number`` (None: as many LoRAs as active layers), ``fixed_rank`` (None: the smallest of
    ``ranks``). ``dropped_ranks`` are those left out because a feed-forward map of the base is smaller.

    Raises:
        MilpError: an unknown factor, no rank, a fixed value outside the base, or one for a searched factor.
    """

    n_layers: int
    ranks: tuple[int, ...]
    factors: tuple[Factor, ...] = FACTORS
    fixed_layers: tuple[int, ...] | None = None
    fixed_number: int | None = None
    fixed_rank: int | None = None
    dropped_ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", tuple(sorted(set(self.ranks))))
        unknown = [factor for factor in self.factors if factor not in FACTORS]
        if unknown:
            raise MilpError(f"space.factors {unknown}: the factors are {list(FACTORS)}")
        if not self.ranks or self.ranks[0] < 1:
            raise MilpError(f"space.ranks {list(self.ranks)}: give at least one rank, all of at least 1")
        self._check_fixed()

    def _check_fixed(self) -> None:
        fixed = {"layers": self.fixed_layers, "number": self.fixed_number, "rank": self.fixed_rank}
        for factor in self.factors:
            if fixed[factor] is not None:
                raise MilpError(
                    f"space.fixed_{factor} is given while {factor!r} is searched: "
                    f"leave {factor!r} out of space.factors or fixed_{factor} out of space"
                )
        outside = [layer for layer in self.fixed_layers or () if not 0 <= layer < self.n_layers]
        if outside:
            raise MilpError(
                f"space.fixed_layers {outside}: the base has {self.n_layers} layers; "
                f"use 0 to {self.n_layers - 1}"
            )
        if self.fixed_number is not None and not 0 <= self.fixed_number <= self.n_layers:
            raise MilpError(
                f"space.fixed_number {self.fixed_number}: the base has {self.n_layers} layers; "
                f"use 0 to {self.n_layers}"
            )
        if self.fixed_rank is not None and self.fixed_rank < 1:
            raise MilpError(f"space.fixed_rank {self.fixed_rank}: give at least 1")

    @classmethod
    def for_base(cls, section: SpaceSection, shapes: FfnShapes) -> SearchSpace:
        """The space for one base: ranks above the smaller side of any feed-forward map are dropped.

        Raises:
            MilpError: no rank is left, or the fixed rank is too large.
        """
        ranks = tuple(rank for rank in section.ranks if rank <= shapes.max_rank)
        dropped = tuple(sorted(set(section.ranks) - set(ranks)))
        if section.fixed_rank is not None:
            shapes.check_rank(section.fixed_rank)
            ranks = ranks or (section.fixed_rank,)
        elif not ranks:
            shapes.check_rank(min(section.ranks, default=0))
        return cls(
            n_layers=shapes.n_layers,
            ranks=ranks,
            factors=section.factors,
            fixed_layers=section.fixed_layers,
            fixed_number=section.fixed_number,
            fixed_rank=section.fixed_rank,
            dropped_ranks=dropped if "rank" in section.factors else (),
        )

    def parameters(self) -> tuple[Parameter, ...]:
        """The searched dimensions: "layer_0" … "layer_{L-1}" (bool), "n_loras" (0 to L), "rank" (choice)."""
        found: list[Parameter] = []
        if "layers" in self.factors:
            found += [Parameter(layer_name(i), "bool", (False, True)) for i in range(self.n_layers)]
        if "number" in self.factors:
            found.append(Parameter("n_loras", "int", tuple(range(self.n_layers + 1))))
        if "rank" in self.factors:
            found.append(Parameter("rank", "choice", self.ranks))
        return tuple(found)

    def layout(self, raw: Mapping[str, Any]) -> Layout:
        """The layout at a raw point: a value for every searched parameter; held factors are filled in.

        Raises:
            MilpError: a parameter is missing, unknown, or has a value that it may not take.
        """
        parameters = {parameter.name: parameter for parameter in self.parameters()}
        if set(raw) != set(parameters):
            raise MilpError(f"a point of the search has {sorted(raw)}; it needs exactly {list(parameters)}")
        for name, parameter in parameters.items():
            if raw[name] not in parameter.values:
                raise MilpError(f"{name} = {raw[name]!r}: the space allows {list(parameter.values)}")
        if "layers" in self.factors:
            active = tuple(bool(raw[layer_name(i)]) for i in range(self.n_layers))
        else:
            active = self._held_active()
        if "number" in self.factors:
            n_loras = int(raw["n_loras"])
        else:
            n_loras = sum(active) if self.fixed_number is None else self.fixed_number
        rank = int(raw["rank"]) if "rank" in self.factors else self._held_rank()
        return Layout(active=active, n_loras=n_loras, rank=rank)

    def raw(self, layout: Layout | CanonicalLayout) -> dict[str, bool | int]:
        """A raw point whose layout has the same canonical form as ``layout``.

        A canonical layout is given back as its own mask with n = its number of LoRAs; the empty one with the
        smallest rank.

        Raises:
            MilpError: no point of this space has that canonical form.
        """
        if isinstance(layout, CanonicalLayout):
            layout = Layout(layout.mask, len(layout.layers), layout.rank or self.ranks[0])
        values: dict[str, bool | int] = {layer_name(i): bit for i, bit in enumerate(layout.active)}
        values |= {"n_loras": layout.n_loras, "rank": layout.rank}
        canonical = layout.canonical()
        point: dict[str, bool | int] = {}
        if len(layout.active) == self.n_layers:
            point = {p.name: values[p.name] for p in self.parameters()}
        if len(layout.active) != self.n_layers or self.layout(point).canonical() != canonical:
            raise MilpError(
                f"layout {canonical.key} is outside the search space: {self.n_layers} layers, "
                f"ranks {list(self.ranks)}, searched {list(self.factors)}"
            )
        return point

    def sample(self, rng: np.random.Generator) -> dict[str, bool | int]:
        """One raw point, every parameter uniform over its values."""
        return {p.name: p.values[int(rng.integers(len(p.values)))] for p in self.parameters()}

    @property
    def n_canonical(self) -> int:
        """How many different canonical layouts the space holds, the empty one included where reachable."""
        # masks[k] = number of effective masks with k bits.
        if "layers" in self.factors:
            most = self.n_layers if self.fixed_number is None else self.fixed_number
            masks = [math.comb(self.n_layers, k) for k in range(most + 1)]
        else:
            n_active = sum(self._held_active())
            number = n_active if self.fixed_number is None else min(self.fixed_number, n_active)
            masks = [1 if "number" in self.factors or k == number else 0 for k in range(n_active + 1)]
        n_ranks = len(self.ranks) if "rank" in self.factors else 1
        return masks[0] + sum(masks[1:]) * n_ranks

    def _held_active(self) -> tuple[bool, ...]:
        if self.fixed_layers is None:
            return (True,) * self.n_layers
        return tuple(index in self.fixed_layers for index in range(self.n_layers))

    def _held_rank(self) -> int:
        return self.ranks[0] if self.fixed_rank is None else self.fixed_rank


def layer_name(index: int) -> str:
    """The raw parameter that is layer ``index``'s bit of α."""
    return f"layer_{index}"
