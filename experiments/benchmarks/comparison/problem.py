"""What a search is compared on: problems that answer at once, with known fronts.

Every problem is a search for a layout with the space, the objectives and the kind of values that a study has:
learning curves, seconds, and values by probe user.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from milp_ray.memory.layout import CanonicalLayout
from milp_ray.memory.space import SearchSpace
from milp_ray.objectives import ADAPTER_PARAMETERS, KNOWN_OBJECTIVES
from milp_ray.search.front import hypervolume, pareto_front, reference_point

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """One trial as it would go.

    ``values`` of shape (n_epochs, m) are what would be measured after each epoch, the last row being the
    trial's own values; ``train_seconds`` (n_epochs,) counts from the trial's start to the end of each epoch,
    ``score_seconds`` is what generating and scoring at the end takes. ``per_user`` has the final values by
    probe user of every objective that is measured on users.
    """

    values: Floats
    train_seconds: Floats
    score_seconds: float
    per_user: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Of a trial that is not stopped."""
        return float(self.train_seconds[-1]) + self.score_seconds


class Problem(Protocol):
    """A search whose answer is known.

    ``objectives`` are names of :mod:`milp_ray.objectives` and ``signs`` (m,) their directions. ``front``
    (k, m) are the values of the best possible Pareto front, ``reference`` (m,) the corner from which
    hypervolumes are measured; both are free of noise.
    """

    name: str
    space: SearchSpace
    objectives: tuple[str, ...]

    @property
    def signs(self) -> tuple[float, ...]:
        """Directions of the objectives."""

    @property
    def front(self) -> Floats:
        """Values of the best possible Pareto front."""

    @property
    def reference(self) -> Floats:
        """The corner of the hypervolume."""

    def measured(self, layout: CanonicalLayout) -> CanonicalLayout:
        """The layout that is measured in place of ``layout``: itself wherever the problem knows it."""

    def evaluate(self, layout: CanonicalLayout) -> Curve:
        """The trial of a layout; the same at every call."""

    def truth(self, layout: CanonicalLayout) -> Floats:
        """The values (m,) of a layout without noise."""


class Enumerated(ABC):
    """What follows from the values of all layouts: of a problem that can list them."""

    objectives: tuple[str, ...]

    @cached_property
    @abstractmethod
    def all_values(self) -> Floats:
        """Values (n, m) of all layouts without noise."""

    @property
    def signs(self) -> tuple[float, ...]:
        """Directions of the objectives."""
        return signs_of(self.objectives)

    @cached_property
    def front(self) -> Floats:
        """The non-dominated ones of all values."""
        return front_of(self.all_values, self.signs)

    @cached_property
    def reference(self) -> Floats:
        """By the rule of a study, over all values; the largest adapter's size is known beforehand."""
        largest = self.all_values.max(axis=0).tolist()
        sizes = zip(self.objectives, largest, strict=True)
        worst = [value if name == ADAPTER_PARAMETERS.name else None for name, value in sizes]
        return reference_point(self.all_values, self.signs, worst)


def best_hypervolume(problem: Problem) -> float:
    """Hypervolume of the problem's own front."""
    return hypervolume(problem.front, problem.signs, problem.reference)


def front_of(values: Floats, signs: Sequence[float]) -> Floats:
    """The non-dominated rows of ``values`` (n, m), without repeats; in blocks, since n may be large."""
    block = 500
    best = np.unique(values, axis=0)
    while True:
        parts = [best[i : i + block] for i in range(0, len(best), block)]
        kept = np.concatenate([part[pareto_front(part, signs)] for part in parts])
        if len(parts) == 1:
            return np.asarray(kept)
        if len(kept) > 0.9 * len(best):  # blocks alone no longer help
            return np.asarray(kept[pareto_front(kept, signs)])
        # Neighbours in a sorted list hardly dominate each other: deal the rows out anew.
        best = kept[np.random.default_rng(0).permutation(len(kept))]


def signs_of(objectives: Sequence[str]) -> tuple[float, ...]:
    """Directions of objectives by name, (m,)."""
    return tuple(KNOWN_OBJECTIVES[name].sign for name in objectives)
