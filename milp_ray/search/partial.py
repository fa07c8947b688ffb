"""What trials that were stopped early say of the values that they would have had. Pure NumPy.

The value of an objective at a rung and the final one are close to a line over the trials that have both
(``experiments/benchmarks/problems.py`` prints how close, on measured layouts). A stopped trial enters the
surrogate with the line's value and, on top of the noise that every trial has, with the variance that the line
leaves: never as if it had been measured. What no rung sees (ROUGE-L) stays missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from milp_ray.search.observations import Observation

Floats = NDArray[np.float64]

# Trials with a rung's value and the final one below which there is no line to speak of.
MIN_PAIRS = 4


@dataclass(frozen=True)
class FinalValues:
    """Final values of n trials, measured or extrapolated, in the order of the trials.

    ``values`` n x m has NaN where nothing is known. ``variances`` n x m is what extrapolating adds to the
    noise, 0 for what was measured. ``is_measured`` n says which trials have run to their end.
    """

    observations: tuple[Observation, ...]
    values: Floats
    variances: Floats
    is_measured: NDArray[np.bool_]

    @property
    def measured(self) -> list[Observation]:
        """The trials that have run to their end."""
        return [o for o, is_measured in zip(self.observations, self.is_measured, strict=True) if is_measured]

    def take(self, positions: NDArray[np.int64]) -> FinalValues:
        """Those of the trials at some positions."""
        return FinalValues(
            tuple(self.observations[position] for position in positions),
            self.values[positions],
            self.variances[positions],
            self.is_measured[positions],
        )


def final_values(observations: Sequence[Observation], objectives: Sequence[str]) -> FinalValues:
    """Measured values, and extrapolated ones of trials that were stopped; others are left out.

    A stopped trial is extrapolated from the last rung that it reached; it is left out where fewer than
    :data:`MIN_PAIRS` trials have both that rung and final values.
    """
    measured = [o for o in observations if o.values is not None]
    kept: list[Observation] = []
    rows: list[list[tuple[float, float]]] = []
    for observation in observations:
        if observation.values is not None:
            row = [(observation.values[name], 0.0) for name in objectives]
        else:
            row = [_extrapolate(observation, measured, name) for name in objectives]
            if all(np.isnan(value) for value, _ in row):
                continue
        kept.append(observation)
        rows.append(row)
    table = np.array(rows, dtype=float).reshape(-1, len(objectives), 2)
    is_measured = np.array([o.values is not None for o in kept], dtype=bool)
    return FinalValues(tuple(kept), table[:, :, 0], table[:, :, 1], is_measured)


def _extrapolate(stopped: Observation, measured: Sequence[Observation], name: str) -> tuple[float, float]:
    """The value and its variance; NaN where the rungs do not tell.

    The variance is that of least squares' prediction of a new observation.
    """
    epoch = max((e for e, values in stopped.rungs.items() if name in values), default=None)
    if epoch is None:
        return np.nan, 0.0
    pairs = [
        (o.rungs[epoch][name], (o.values or {})[name]) for o in measured if name in o.rungs.get(epoch, {})
    ]
    if len(pairs) < MIN_PAIRS:
        return np.nan, 0.0
    at_rung, final = np.array(pairs).T
    centre, spread = at_rung.mean(), ((at_rung - at_rung.mean()) ** 2).sum()
    slope = ((at_rung - centre) * final).sum() / spread if spread > 0 else 0.0
    ahead = stopped.rungs[epoch][name] - centre
    residuals = final - final.mean() - slope * (at_rung - centre)
    variance = (residuals**2).sum() / (len(pairs) - 2)
    leverage = 1.0 + 1.0 / len(pairs) + (ahead**2 / spread if spread > 0 else 0.0)
    return float(final.mean() + slope * ahead), float(variance * leverage)
