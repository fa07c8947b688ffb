"""The search for the best new layout under an acquisition function.

Ax's own search walks the lattice of raw points, where most steps change nothing about the adapter and many
points are the same layout; that takes minutes and proposes repeats. Here the acquisition function is only
asked about canonical layouts that have not been measured: all of them where they are few, else random ones
and the neighbours of the Pareto front, followed by a local search from the best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ax.exceptions.core import SearchSpaceExhausted
from ax.generators.torch.botorch_modular.acquisition import Acquisition
from torch import Tensor

from milp_ray.memory.layout import CanonicalLayout
from milp_ray.search.candidates import all_points, neighbours, random_new_point

if TYPE_CHECKING:
    from ax.core.search_space import SearchSpaceDigest
    from botorch.generation.sampling import SamplingStrategy

    from milp_ray.memory.space import SearchSpace

RawPoint = Mapping[str, Any]

# A space of at most so many layouts is tried as a whole.
TRY_ALL = 256
N_RANDOM = 64
# Points of the front whose neighbours are tried.
N_FRONT = 4
# The local search: the neighbours of so many best points, until none is better, at most so many rounds.
N_STARTS = 2
N_ROUNDS = 8
# Evaluations at once; on a CPU small batches are twice as fast as one of hundreds.
BATCH = 32


@dataclass(frozen=True)
class NewLayouts:
    """What may be proposed: layouts of ``space`` whose keys are not ``seen``; ``front`` is measured."""

    space: SearchSpace
    seen: frozenset[str]
    front: tuple[CanonicalLayout, ...]

    def encode(self, point: RawPoint) -> list[float]:
        """A raw point in Ax's encoding: positions among the values of every parameter that has several."""
        return [
            float(parameter.values.index(point[parameter.name]))
            for parameter in self.space.parameters()
            if len(parameter.values) > 1
        ]

    def decode(self, row: Sequence[float]) -> dict[str, Any]:
        """The raw point that :meth:`encode` makes ``row`` of."""
        positions = iter(row)
        return {
            parameter.name: parameter.values[round(next(positions)) if len(parameter.values) > 1 else 0]
            for parameter in self.space.parameters()
        }

    def key(self, point: RawPoint) -> str:
        """The canonical key of a raw point."""
        return self.space.layout(point).canonical().key

    def best(
        self, score: Callable[[Sequence[RawPoint]], list[float]], taken: set[str], rng: np.random.Generator
    ) -> RawPoint | None:
        """The point found with the highest score, neither seen nor ``taken``; ``None``: none is left."""
        unavailable = self.seen | taken
        scores: dict[str, float] = {}
        points: dict[str, RawPoint] = {}

        def try_out(candidates: Iterable[RawPoint]) -> None:
            fresh = {self.key(p): p for p in candidates}
            fresh = {k: p for k, p in fresh.items() if k not in unavailable and k not in scores}
            scores.update(zip(fresh, score(list(fresh.values())), strict=True) if fresh else ())
            points.update(fresh)

        if self.space.n_canonical <= TRY_ALL:
            try_out(all_points(self.space))
        else:
            try_out(self._starts(unavailable, rng))
            expanded: set[str] = set()
            for _ in range(N_ROUNDS):
                best = [k for k in _ranked(scores)[:N_STARTS] if k not in expanded]
                if not best:
                    break
                expanded.update(best)
                for key in best:
                    try_out(neighbours(self.space, self.space.layout(points[key]).canonical()))
        return points[_ranked(scores)[0]] if scores else None

    def _starts(self, unavailable: Iterable[str], rng: np.random.Generator) -> Iterable[RawPoint]:
        order = rng.permutation(len(self.front))[:N_FRONT]
        for index in sorted(int(i) for i in order):
            yield from neighbours(self.space, self.front[index])
        seen = set(unavailable)
        for _ in range(N_RANDOM):
            point = random_new_point(self.space, seen, rng)
            if point is None:
                return
            seen.add(self.key(point))
            yield point


def _ranked(scores: Mapping[str, float]) -> list[str]:
    """Keys from the highest score down; equal scores by key, so that the order of trying does not matter."""
    return sorted(scores, key=lambda key: (-scores[key], key))


class NewLayoutAcquisition(Acquisition):
    """Ax's acquisition over :class:`NewLayouts`, which are given as ``acquisition_options["layouts"]``."""

    def optimize(
        self,
        n: int,
        search_space_digest: SearchSpaceDigest,
        inequality_constraints: list[tuple[Tensor, Tensor, float]] | None = None,
        equality_constraints: list[tuple[Tensor, Tensor, float]] | None = None,
        fixed_features: dict[int, float] | None = None,
        rounding_func: Callable[[Tensor], Tensor] | None = None,
        optimizer_options: dict[str, Any] | None = None,
        candidate_set: Tensor | None = None,
        sampling_strategy: SamplingStrategy | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``n`` new layouts, chosen one after another; the arguments beyond ``n`` are Ax's and not needed.

        Returns:
            Candidates ``n x d``, their acquisition values ``n``, and weights of 1.

        Raises:
            SearchSpaceExhausted: fewer than ``n`` layouts are left.
        """
        layouts: NewLayouts = self.options["layouts"]
        rng = np.random.default_rng(int(torch.randint(2**31 - 1, (1,))))
        pending: Tensor | None = self.acqf.X_pending
        taken = {layouts.key(layouts.decode(row)) for row in ([] if pending is None else pending.tolist())}
        rows: list[Tensor] = []
        values: list[float] = []
        for _ in range(n):
            point = layouts.best(lambda points: self._score(layouts, points), taken, rng)
            if point is None:
                raise SearchSpaceExhausted("every layout of the space has been measured")
            row = self._rows(layouts, [point])
            rows.append(row)
            values += self._score(layouts, [point])
            taken.add(layouts.key(point))
            if n > 1:
                earlier = [] if pending is None else [pending]
                self.acqf.set_X_pending(torch.cat([*earlier, *rows]))
        if n > 1:
            self.acqf.set_X_pending(pending)
        return torch.cat(rows), torch.tensor(values, dtype=self.dtype), torch.ones(n, dtype=self.dtype)

    def _rows(self, layouts: NewLayouts, points: Sequence[RawPoint]) -> Tensor:
        return torch.tensor([layouts.encode(point) for point in points], dtype=self.dtype, device=self.device)

    def _score(self, layouts: NewLayouts, points: Sequence[RawPoint]) -> list[float]:
        with torch.no_grad():
            parts = [self.evaluate(X=rows.unsqueeze(1)) for rows in self._rows(layouts, points).split(BATCH)]
        return [float(value) for value in torch.cat(parts)]
