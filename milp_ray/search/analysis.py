"""What a surrogate of a study's trials says: which factors matter for an objective, and what a layout will
probably reach.

It is fitted to the study's own trials alone. The one that a warm-started study proposes with may take a trend
from earlier studies beside (:mod:`milp_ray.search.earlier`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from milp_ray.search import surrogate
from milp_ray.search.features import CanonicalRows, Rows
from milp_ray.search.surrogate import Surrogate

if TYPE_CHECKING:
    from milp_ray.config.search import SurrogateSection
    from milp_ray.memory.layout import CanonicalLayout
    from milp_ray.memory.space import SearchSpace
    from milp_ray.search.observations import Observation

Floats = NDArray[np.float64]

# Random layouts that effects are estimated with; errors fall with the root of their number.
N_RANDOM_LAYOUTS = 2048
# Of the samples of the hyperparameters, the share that an interval holds.
INTERVAL = 0.9
# Layouts predicted at once, so that memory stays small.
_BATCH = 4096


@dataclass(frozen=True)
class Importance:
    """How much one factor decides one objective, as shares of its variance over random layouts.

    ``main`` is what the factor decides by itself, ``total`` what it decides alone and together with others;
    both are means over the samples of the hyperparameters. ``low`` to ``high`` holds the middle nine tenths
    of the samples' totals. The factors are "layer 0", "layer 1", …, "n" and "rank".
    """

    factor: str
    main: float
    total: float
    low: float
    high: float


@dataclass(frozen=True)
class Prediction:
    """Posterior mean and standard deviation of an objective for one layout, in the objective's own units."""

    mean: float
    sd: float


@dataclass(frozen=True)
class ObjectiveAnalysis:
    """One objective: a factor's importance each, a prediction for each layout that was asked about.

    ``unexplained``, (mean, low, high) over the samples of the hyperparameters as an importance has them, is
    the share of the variance of a random layout's measured value that no factor tells: what a layout has of
    its own, and noise.
    """

    objective: str
    importances: tuple[Importance, ...]
    predictions: tuple[Prediction, ...]
    unexplained: tuple[float, float, float]


@dataclass(frozen=True)
class Analysis:
    """Of all objectives, in their order, from ``n_observations`` trials with values."""

    objectives: tuple[ObjectiveAnalysis, ...]
    n_observations: int


def analyse(
    space: SearchSpace,
    objectives: Sequence[str],
    section: SurrogateSection,
    observations: Sequence[Observation],
    layouts: Sequence[CanonicalLayout],
    seed: int,
) -> Analysis:
    """Fit the surrogate to a study's observations and ask it.

    Importances are Sobol' indices of the posterior mean where every searched factor is drawn by itself,
    uniform over its values: first-order ones ("main") and total ones (Saltelli et al. 2010, with Jansen's
    estimators, table 2 (b) and (f)). A factor that is held is not among them.

    Args:
        layouts: that are predicted, of the space.
        seed: of the random layouts, and of NUTS.

    Raises:
        ValueError: fewer than two observations have values.
        torch.linalg.LinAlgError: the surrogate could not be fitted.
    """
    n_measured = sum(o.values is not None for o in observations)
    if n_measured < 2:
        raise ValueError(f"{n_measured} trials have values: an analysis needs at least two")
    fitted = surrogate.fit(space, objectives, section, observations, seed)
    importances, variance = _importances(fitted, np.random.default_rng(seed))
    predictions = _predictions(fitted, layouts)
    unexplained = _unexplained(fitted, variance)
    found = zip(objectives, importances, predictions, unexplained, strict=True)
    return Analysis(tuple(ObjectiveAnalysis(*parts) for parts in found), len(fitted.final.measured))


def _predictions(fitted: Surrogate, layouts: Sequence[CanonicalLayout]) -> list[tuple[Prediction, ...]]:
    mean, variance = (
        part.numpy()
        for part in fitted.posterior.mean_and_variance(fitted.features(fitted.rows.encode(layouts)))
    )
    found: list[tuple[Prediction, ...]] = []
    for objective in range(len(mean)):
        centre, spread = fitted.outputs.backward(objective, mean[objective], variance[objective])  # s x q
        # A mixture of the samples: the law of total variance.
        deviation = np.sqrt((spread**2).mean(axis=0) + centre.var(axis=0))
        pairs = zip(centre.mean(axis=0).tolist(), deviation.tolist(), strict=True)
        found.append(tuple(Prediction(m, sd) for m, sd in pairs))
    return found


def _importances(fitted: Surrogate, rng: np.random.Generator) -> tuple[list[tuple[Importance, ...]], Floats]:
    """By objective and factor; and the variance that the factors decide together, m x s."""
    first, second = (_RawLayouts.draw(fitted.rows, rng) for _ in range(2))
    at_first, at_second = _means(fitted, first.rows()), _means(fitted, second.rows())  # m x s x n
    variance = np.concatenate([at_first, at_second], axis=2).var(axis=2)
    scale = np.where(variance > 1e-12, variance, np.inf)  # what never changes is decided by nothing
    found: list[list[Importance]] = [[] for _ in at_first]
    for factor in first.factors():
        mixed = _means(fitted, first.with_factor(factor, second).rows())
        total = 0.5 * ((at_first - mixed) ** 2).mean(axis=2) / scale
        main = np.where(np.isinf(scale), 0.0, 1.0 - 0.5 * ((at_second - mixed) ** 2).mean(axis=2) / scale)
        low, high = _interval(total)
        for objective, importances in enumerate(found):
            importances.append(
                Importance(
                    factor=factor,
                    main=max(0.0, float(main[objective].mean())),
                    total=float(total[objective].mean()),
                    low=float(low[objective]),
                    high=float(high[objective]),
                )
            )
    return [tuple(importances) for importances in found], variance


def _unexplained(fitted: Surrogate, told: Floats) -> list[tuple[float, float, float]]:
    """By objective, of what is ``told``, m x s; see :class:`ObjectiveAnalysis`."""
    rest = (fitted.hyperparameters.noise + fitted.hyperparameters.roughness).numpy()
    share = rest / (told + rest)
    return list(zip(share.mean(axis=1).tolist(), *(end.tolist() for end in _interval(share)), strict=True))


def _interval(samples: Floats) -> Floats:
    """The lower and the upper ends of what holds :data:`INTERVAL` of the samples, m x s: 2 x m."""
    return np.quantile(samples, [0.5 - INTERVAL / 2, 0.5 + INTERVAL / 2], axis=1)


def _means(fitted: Surrogate, rows: Rows) -> Floats:
    """Posterior means by sample in the model's units, m x s x n."""
    parts = [fitted.posterior.mean(part) for part in fitted.features(rows).split(_BATCH)]
    return torch.cat(parts, dim=2).numpy()


@dataclass(frozen=True)
class _RawLayouts:
    """Raw layouts by factor, n of each; a factor that is held is the same in all."""

    canonical: CanonicalRows
    active: Rows  # n x L
    number: NDArray[np.int64]
    rank: NDArray[np.int64]  # positions among the ranks

    @classmethod
    def draw(cls, canonical: CanonicalRows, rng: np.random.Generator) -> _RawLayouts:
        space, n = canonical.space, N_RANDOM_LAYOUTS
        active = rng.integers(2, size=(n, space.n_layers)).astype(np.uint8)
        number = rng.integers(space.n_layers + 1, size=n)
        rank = rng.integers(len(space.ranks), size=n)
        if "layers" not in space.factors:
            held = range(space.n_layers) if space.fixed_layers is None else space.fixed_layers
            active[:] = np.isin(np.arange(space.n_layers), list(held))
        if "number" not in space.factors:
            number[:] = space.n_layers if space.fixed_number is None else space.fixed_number
        if "rank" not in space.factors:
            rank[:] = 0
        return cls(canonical, active, number, rank)

    def factors(self) -> list[str]:
        """Names of the searched factors."""
        space = self.canonical.space
        found = [f"layer {i}" for i in range(space.n_layers)] if "layers" in space.factors else []
        found += ["n"] if "number" in space.factors else []
        return found + (["rank"] if "rank" in space.factors else [])

    def with_factor(self, factor: str, other: _RawLayouts) -> _RawLayouts:
        """These layouts with one factor of the other ones."""
        active, number, rank = self.active, self.number, self.rank
        if factor == "n":
            number = other.number
        elif factor == "rank":
            rank = other.rank
        else:
            layer = int(factor.removeprefix("layer "))
            active = active.copy()
            active[:, layer] = other.active[:, layer]
        return _RawLayouts(self.canonical, active, number, rank)

    def rows(self) -> Rows:
        return self.canonical.canonical(self.active, self.number, self.rank)
