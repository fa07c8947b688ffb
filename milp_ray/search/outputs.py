"""Objective values as the surrogate models them: maximised, and of about one standard deviation.

``standardize`` subtracts the mean and divides by the standard deviation, once diverged values are pulled in
to a fence: how bad they are says nothing about the others. ``copula`` goes by ranks (Salinas et al. 2020):
the k-th smallest of n values becomes the standard normal quantile at k / n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

Floats = NDArray[np.float64]
Kind = Literal["standardize", "copula"]

# Quantiles that ranks are kept within, so that the best and the worst are finite.
_LOWEST_QUANTILE = 1e-4
# Interquartile ranges below the lower quartile at which values stop getting worse (Tukey's inner fence).
_FENCE = 1.5
# Nodes of the quadrature by which a normal posterior is taken back through the copula.
_N_NODES = 32


@dataclass(frozen=True)
class Outputs:
    """The transform of m objectives, made from n observations.

    ``knots`` are values in the objectives' own units, turned to be maximised and ascending, and ``levels``
    what they become; in between and beyond it is linear. Standardising has two knots.
    """

    signs: tuple[float, ...]
    kind: Kind
    knots: tuple[Floats, ...]
    levels: tuple[Floats, ...]
    floors: Floats

    @classmethod
    def of(cls, values: ArrayLike, signs: Sequence[float], kind: Kind) -> Outputs:
        """The transform that observations ask for: ``values`` n x m, signs as of the front's functions.

        NaN is a value that is not known.
        """
        maximised = -np.asarray(values, dtype=float) * np.asarray(signs)
        lower, upper = np.nanquantile(maximised, [0.25, 0.75], axis=0)
        fences = lower - _FENCE * (upper - lower)
        # Where half of the values are equal the quartiles tell no range.
        floors = np.where((upper > lower) & (kind == "standardize"), fences, -np.inf)
        columns = [column[~np.isnan(column)] for column in np.maximum(maximised, floors).T]
        made = [_copula(column) if kind == "copula" else _standard(column) for column in columns]
        knots, levels = zip(*made, strict=True)
        return cls(tuple(signs), kind, knots, levels, floors)

    def observed(self, values: ArrayLike) -> Floats:
        """Observed values n x m in the objectives' own units, in the model's: m x n."""
        return self._forward(np.maximum(self._maximised(values), self.floors))

    def forward(self, values: ArrayLike) -> Floats:
        """Any values n x m in the objectives' own units, however bad, in the model's: m x n."""
        return self._forward(self._maximised(values))

    def _maximised(self, values: ArrayLike) -> Floats:
        return -np.asarray(values, dtype=float).reshape(-1, len(self.signs)) * np.asarray(self.signs)

    def _forward(self, maximised: Floats) -> Floats:
        tables = zip(maximised.T, self.knots, self.levels, strict=True)
        return np.stack([_piecewise(column, knots, levels) for column, knots, levels in tables])

    def noise(self, errors: Sequence[float] | None) -> Floats | None:
        """Variances in the model's units of standard errors in the objectives' own, m; ``None``: to be
        inferred.

        Ranks have no unit that an error could be told in, so a copula's noise is always inferred.
        """
        if errors is None or self.kind == "copula":
            return None
        slopes = [
            np.ptp(levels) / np.ptp(knots) for knots, levels in zip(self.knots, self.levels, strict=True)
        ]
        return np.square(np.asarray(errors) * slopes)

    def variances(self, values: ArrayLike, variances: ArrayLike) -> Floats:
        """Variances n x m of ``values`` n x m in the objectives' own units, in the model's: m x n."""
        centre, deviation = np.asarray(values, dtype=float), np.sqrt(np.asarray(variances, dtype=float))
        above, below = self.observed(centre + deviation), self.observed(centre - deviation)
        return np.square(0.5 * (above - below))

    def backward(self, objective: int, mean: Floats, variance: Floats) -> tuple[Floats, Floats]:
        """Mean and standard deviation in one objective's own units of normal variables in the model's.

        Args:
            objective: which of the m.
            mean, variance: of any one shape.
        """
        knots, levels, sign = self.knots[objective], self.levels[objective], self.signs[objective]
        nodes, weights = np.polynomial.hermite_e.hermegauss(_N_NODES)
        weights = weights / weights.sum()
        at_nodes = mean[..., None] + np.sqrt(variance)[..., None] * nodes
        values = _piecewise(at_nodes, levels, knots)
        centre = values @ weights
        spread = np.square(values - centre[..., None]) @ weights
        return -sign * centre, np.sqrt(spread)


def _standard(column: Floats) -> tuple[Floats, Floats]:
    """Mean to 0, one standard deviation (1 where all values are equal) to 1."""
    centre = float(column.mean())
    spread = 1.0 if _is_flat(column) else float(column.std())
    return np.array([centre, centre + spread]), np.array([0.0, 1.0])


def _is_flat(column: Floats) -> bool:
    """Whether the values differ by no more than rounding: a scale made from that has no meaning."""
    return not float(column.std()) > 1e-12 * max(1.0, abs(float(column.mean())))


def _copula(column: Floats) -> tuple[Floats, Floats]:
    """Different values to the normal quantiles of their ranks; equal values share their middle rank."""
    if _is_flat(column):
        return _standard(column)
    knots, counts = np.unique(column, return_counts=True)
    middle = counts.cumsum() - 0.5 * counts
    quantiles = np.clip(middle / len(column), _LOWEST_QUANTILE, 1.0 - _LOWEST_QUANTILE)
    return knots, np.asarray(ndtri(quantiles))


def _piecewise(x: Floats, knots: Floats, levels: Floats) -> Floats:
    """Linear between the knots; beyond them with the slope of the line through the first and the last."""
    slope = np.ptp(levels) / np.ptp(knots)
    inside = np.interp(x, knots, levels)
    beyond = np.where(x < knots[0], x - knots[0], np.where(x > knots[-1], x - knots[-1], 0.0))
    return np.asarray(inside + slope * beyond)
