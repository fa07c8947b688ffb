"""Learning curves that were measured (``lora_table/``), as a problem to search."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from comparison.problem import Curve, Enumerated, Floats

from milp_ray.memory.layout import EMPTY_KEY, CanonicalLayout
from milp_ray.memory.space import SearchSpace
from milp_ray.objectives import ADAPTER_PARAMETERS, ROUGE_L, VALIDATION_LOSS

TABLE = Path(__file__).parent.parent / "lora_table" / "table.parquet"


class LoraTable(Enumerated):
    """Layouts of the embedded base as they were measured on PersonaWorld (``lora_table/README.md``).

    What was measured is the truth here, so that there is no standard error to tell a search of: no values by
    user are given. A layout that the table lacks is answered with the nearest one that it has, the same for
    whoever asks: fewest layers switched on or off, then fewest steps of rank, then the key that sorts first.

    Args:
        objectives: of validation_loss, rouge_l and adapter_parameters.
        path: the table.
        users: which of the three measured users' means are the values, by their place; all of them otherwise.
        time_scale: what the measured seconds are multiplied with. The embedded base's trials take seconds;
            those of the bases that a search is run for take minutes, against which the seconds of a
            suggestion count for less.
    """

    def __init__(
        self,
        objectives: tuple[str, ...] = (VALIDATION_LOSS.name, ROUGE_L.name, ADAPTER_PARAMETERS.name),
        path: Path = TABLE,
        time_scale: float = 1.0,
        users: Sequence[int] | None = None,
    ) -> None:
        import pyarrow.parquet as pq

        self.name = "lora_table"
        self.objectives = objectives
        self._users = users
        rows = pq.read_table(path).to_pylist()
        self._curves: dict[str, Curve] = {}
        for key, group in itertools.groupby(rows, key=lambda row: row["key"]):
            epochs = sorted(group, key=lambda row: row["epoch"])
            self._curves[key] = self._curve(epochs, time_scale)
        n_layers = max(len(key.split("-")[0]) for key in self._curves if key != EMPTY_KEY)
        self._layouts = {key: _layout(key, n_layers) for key in self._curves}
        ranks = tuple(sorted({layout.rank for layout in self._layouts.values() if not layout.is_empty}))
        self.space = SearchSpace(n_layers, ranks)

    def _curve(self, epochs: Sequence[Mapping[str, Any]], time_scale: float) -> Curve:
        return Curve(
            values=np.array([[self._value(row, name) for name in self.objectives] for row in epochs]),
            train_seconds=np.array([row["train_seconds"] for row in epochs], dtype=float) * time_scale,
            score_seconds=float(epochs[-1]["score_seconds"]) * time_scale,
        )

    def _value(self, row: Mapping[str, Any], name: str) -> float:
        if self._users is None or name == ADAPTER_PARAMETERS.name:
            return float(row[name])
        return float(np.mean([row[f"{name}_by_user"][user] for user in self._users]))

    @property
    def layouts(self) -> tuple[CanonicalLayout, ...]:
        """Those that were measured."""
        return tuple(self._layouts.values())

    def measured(self, layout: CanonicalLayout) -> CanonicalLayout:
        """``layout``, or the nearest one that was measured."""
        if layout.key in self._layouts:
            return layout
        return min(self._layouts.values(), key=lambda other: (*self._distance(layout, other), other.key))

    def evaluate(self, layout: CanonicalLayout) -> Curve:
        """The measured curve of ``layout``, or of the nearest layout."""
        return self._curves[self.measured(layout).key]

    def truth(self, layout: CanonicalLayout) -> Floats:
        """What was measured: the table is the world here."""
        return np.asarray(self.evaluate(layout).values[-1])

    @cached_property
    def all_values(self) -> Floats:
        """Values of all measured layouts."""
        return np.array([curve.values[-1] for curve in self._curves.values()])

    def _distance(self, layout: CanonicalLayout, other: CanonicalLayout) -> tuple[int, int]:
        """Layers that differ, and steps of rank; the empty layout has the smallest rank."""
        steps = [self.space.ranks.index(one.rank or self.space.ranks[0]) for one in (layout, other)]
        return sum(a != b for a, b in zip(layout.mask, other.mask, strict=True)), abs(steps[0] - steps[1])


def _layout(key: str, n_layers: int) -> CanonicalLayout:
    """The layout that a key names."""
    if key == EMPTY_KEY:
        return CanonicalLayout((False,) * n_layers, 0)
    bits, _, rank = key.partition("-r")
    return CanonicalLayout(tuple(bit == "1" for bit in bits), int(rank))
