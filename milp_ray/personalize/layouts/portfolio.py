"""A layout for a user by what was measured on similar probe users, or the chosen one. Pure NumPy.

For each layout the relative validation loss against the chosen one is known for each probe user. A new user's
is predicted by a kernel-weighted mean over the probe users (Nadaraya 1964; Watson 1964) in the space of
standardised traits, shrunk toward zero as if there were further users for whom the layout made no difference.
How far such predictions are to be trusted is measured by leaving out each probe user in turn: a layout is
taken only where its predicted gain exceeds its error there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats: TypeAlias = NDArray[np.float64]

MIN_USERS = 3  # below, leaving one out leaves nothing to predict from


@dataclass(frozen=True, slots=True)
class Pick:
    """What is taken for a user: ``layout`` is a column, ``None`` for the chosen one.

    ``gain`` is the predicted relative fall of the validation loss against the chosen layout of the best
    prediction (0 where none is below the chosen one), ``error`` that layout's leave-one-out error.
    """

    layout: int | None
    gain: float
    error: float


@dataclass(frozen=True, slots=True, eq=False)
class Portfolio:
    """Relative losses by probe user and layout, ready to predict from.

    Attributes:
        traits: (n_users, n_traits), standardised.
        center: (n_traits,) means that were taken off.
        scale: (n_traits,) standard deviations that were divided by; 1 where a trait does not vary.
        relative: (n_users, n_layouts) validation loss over that of the chosen layout, less 1.
        bandwidth: of the kernel, in standardised units.
        shrinkage: weight of the users for whom it makes no difference.
        errors: (n_layouts,) root mean squares of the leave-one-out predictions' errors.
    """

    traits: Floats
    center: Floats
    scale: Floats
    relative: Floats
    bandwidth: float
    shrinkage: float
    errors: Floats

    @classmethod
    def of(
        cls, traits: ArrayLike, losses: ArrayLike, chosen: ArrayLike, *, shrinkage: float = 1.0
    ) -> Portfolio:
        """From what was measured.

        The bandwidth is half of the median distance between two probe users, so that two typical ones
        count little for each other.

        Args:
            traits: (n_users, n_traits), as they are.
            losses: (n_users, n_layouts) validation losses, the chosen layout not among them.
            chosen: (n_users,) those of the chosen layout.
            shrinkage: at least 0.

        Raises:
            ValueError: shapes do not fit, a value is not finite, a loss is not positive, or there are fewer
                users than :data:`MIN_USERS`.
        """
        raw, table, own = (np.asarray(values, dtype=float) for values in (traits, losses, chosen))
        if raw.ndim != 2 or table.ndim != 2 or own.shape != (len(raw),) or len(table) != len(raw):
            raise ValueError(f"traits {raw.shape}, losses {table.shape}, chosen {own.shape} do not fit")
        if len(raw) < MIN_USERS:
            raise ValueError(f"{len(raw)} probe users: a portfolio needs at least {MIN_USERS}")
        if not all(np.isfinite(values).all() for values in (raw, table, own)) or (own <= 0).any():
            raise ValueError("traits and losses must be finite, and the chosen layout's losses positive")
        center, spread = raw.mean(axis=0), raw.std(axis=0)
        scale = np.where(spread > 0, spread, 1.0)
        placed = (raw - center) / scale
        apart = _distances(placed, placed)[np.triu_indices(len(placed), 1)]
        median = float(np.median(apart))
        bandwidth = 0.5 * median if median > 0 else 1.0
        relative = table / own[:, None] - 1.0
        weights = _kernel(_distances(placed, placed), bandwidth)
        np.fill_diagonal(weights, 0.0)
        errors = np.sqrt(((_predicted(weights, relative, shrinkage) - relative) ** 2).mean(axis=0))
        return cls(placed, center, scale, relative, bandwidth, shrinkage, errors)

    def predict(self, traits: Sequence[float]) -> Floats:
        """Predicted relative losses of the layouts for a user with these traits, (n_layouts,)."""
        placed = (np.asarray(traits, dtype=float) - self.center) / self.scale
        weights = _kernel(_distances(placed[None], self.traits), self.bandwidth)
        return _predicted(weights, self.relative, self.shrinkage)[0]

    def pick(self, traits: Sequence[float]) -> Pick:
        """The layout with the largest predicted gain of those whose gain exceeds their error.

        Ties go to the earlier column.
        """
        gains = -self.predict(traits)
        sure = np.flatnonzero((gains > self.errors) & (gains > 0))
        if len(sure):
            best = int(sure[np.argmax(gains[sure])])
            return Pick(best, float(gains[best]), float(self.errors[best]))
        if not len(gains):
            return Pick(None, 0.0, 0.0)
        best = int(np.argmax(gains))
        return Pick(None, max(0.0, float(gains[best])), float(self.errors[best]))


def _distances(some: Floats, others: Floats) -> Floats:
    return np.sqrt(((some[:, None, :] - others[None, :, :]) ** 2).sum(axis=2))


def _kernel(distances: Floats, bandwidth: float) -> Floats:
    return np.asarray(np.exp(-0.5 * (distances / bandwidth) ** 2))


def _predicted(weights: Floats, relative: Floats, shrinkage: float) -> Floats:
    """Weighted means of ``relative`` (n_users, n_layouts), a row a row of ``weights``; no weight gives 0."""
    total = weights.sum(axis=1, keepdims=True) + shrinkage
    return np.asarray((weights @ relative) / np.where(total > 0, total, 1.0))
