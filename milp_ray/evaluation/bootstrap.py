"""Percentile bootstrap over users (Efron 1979): how far a mean would move with other users.

The unit that is drawn is the user and never the answer: answers of one user are not independent of each
other, and intervals over answers would be too narrow. A user's value is the mean over that user's answers,
so every user weighs the same, however many answers there are.

Differences between two methods are *paired*: they are taken inside each user, on the same queries, before
users are drawn, so that what makes a user easy or hard for both methods drops out.

The draws depend on (seed, number of users, number of draws) alone; two calls with the same three numbers
resample the same positions. Percentile intervals of few users are somewhat too narrow (a simulation with
normal values: at 12 users a nominal 95 % covers about 91 %), and one user gives no interval at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from milp_ray.errors import MilpError

_ELEMENTS_AT_ONCE = 4_000_000  # positions drawn at once: bounds memory at any number of users


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over users with its percentile interval; ``low`` and ``high`` are ``None`` below two users."""

    mean: float
    low: float | None
    high: float | None
    n_users: int

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain types, for JSON."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "n_users": self.n_users}


def interval(
    values: NDArray[np.float64] | list[float],
    *,
    n_bootstrap: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval | None:
    """Mean over users and its interval; ``None`` where no user has a value.

    Args:
        values: one value a user, shape ``(n_users,)``; NaN where a user has none, who is then left out.
        n_bootstrap: draws of as many users as have a value, with replacement.
        confidence: share of the draws' means between the bounds.
        seed: of the draws.

    Raises:
        MilpError: ``values`` is no vector or holds an infinity.
    """
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1 or np.isinf(column).any():
        raise MilpError(
            f"values of shape {column.shape} for an interval over users: give one number a user, none of "
            "them infinite, and NaN for a user without one"
        )
    column = column[~np.isnan(column)]
    n_users = len(column)
    if n_users == 0:
        return None
    mean = float(column.mean())
    if n_users == 1:
        return Interval(mean, None, None, 1)
    means = _resampled_means(column, n_bootstrap, seed)
    tail = 100.0 * (1.0 - confidence) / 2.0
    low, high = np.percentile(means, [tail, 100.0 - tail])
    return Interval(mean, float(low), float(high), n_users)


def difference_interval(
    first: NDArray[np.float64] | list[float],
    second: NDArray[np.float64] | list[float],
    *,
    n_bootstrap: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval | None:
    """Mean of ``first`` − ``second`` over the users that have both; ``None`` where no user has.

    Args:
        first: one value a user, shape ``(n_users,)``, NaN for none.
        second: the same users in the same order, under another method and on the same queries.
        n_bootstrap: see :func:`interval`.
        confidence: see :func:`interval`.
        seed: see :func:`interval`.
    """
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    return interval(differences, n_bootstrap=n_bootstrap, confidence=confidence, seed=seed)


def pooled_interval(
    sums: NDArray[np.float64],
    value: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    *,
    n_bootstrap: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval | None:
    """A measure of all answers together, with the interval that drawing users gives it.

    For measures that are no mean over users, such as corpus BLEU. Users weigh by their answers here.

    Args:
        sums: each user's summed statistics, shape ``(n_users, …)``; users without an answer are not in it.
        value: the measure of a sum over users, ``(n_draws, …)`` → ``(n_draws,)``; NaN where it has no value.
        n_bootstrap: see :func:`interval`.
        confidence: see :func:`interval`.
        seed: see :func:`interval`.

    Returns:
        The measure as ``mean``; ``None`` where it has no value.
    """
    n_users = len(sums)
    whole = float(value(sums.sum(axis=0, keepdims=True))[0]) if n_users else float("nan")
    if not np.isfinite(whole):
        return None
    if n_users == 1:
        return Interval(whole, None, None, 1)
    drawn = value(_resampled_sums(sums, n_bootstrap, seed))
    drawn = drawn[np.isfinite(drawn)]
    tail = 100.0 * (1.0 - confidence) / 2.0
    low, high = np.percentile(drawn, [tail, 100.0 - tail])
    return Interval(whole, float(low), float(high), n_users)


def _resampled_sums(sums: NDArray[np.float64], n_bootstrap: int, seed: int) -> NDArray[np.float64]:
    """Sums over users of ``n_bootstrap`` draws with replacement, shape ``(n_bootstrap, …)``."""
    n_users = len(sums)
    flat = sums.reshape(n_users, -1)
    if n_users * n_bootstrap <= _ELEMENTS_AT_ONCE:
        parts = [_times_drawn(_positions(n_users, n_bootstrap, seed)) @ flat]
    else:
        rng = np.random.default_rng(seed)
        at_once = max(1, _ELEMENTS_AT_ONCE // n_users)
        parts = [
            _times_drawn(rng.integers(0, n_users, size=(min(at_once, n_bootstrap - start), n_users))) @ flat
            for start in range(0, n_bootstrap, at_once)
        ]
    return np.concatenate(parts).reshape(n_bootstrap, *sums.shape[1:])


def _times_drawn(positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """How often each user is in each draw, shape ``(n_draws, n_users)``."""
    n_draws, n_users = positions.shape
    places = positions + n_users * np.arange(n_draws)[:, None]
    return np.bincount(places.ravel(), minlength=positions.size).reshape(n_draws, n_users).astype(np.float64)


def _resampled_means(values: NDArray[np.float64], n_bootstrap: int, seed: int) -> NDArray[np.float64]:
    """Means of ``n_bootstrap`` draws with replacement, shape ``(n_bootstrap,)``."""
    n_users = len(values)
    if n_users * n_bootstrap <= _ELEMENTS_AT_ONCE:
        return values[_positions(n_users, n_bootstrap, seed)].mean(axis=1)
    rng = np.random.default_rng(seed)
    at_once = max(1, _ELEMENTS_AT_ONCE // n_users)
    parts = [
        values[rng.integers(0, n_users, size=(min(at_once, n_bootstrap - start), n_users))].mean(axis=1)
        for start in range(0, n_bootstrap, at_once)
    ]
    return np.concatenate(parts)


@lru_cache(maxsize=4)
def _positions(n_users: int, n_bootstrap: int, seed: int) -> NDArray[np.int64]:
    """The drawn positions, shape ``(n_bootstrap, n_users)``: a comparison asks for the same ones often."""
    return np.random.default_rng(seed).integers(0, n_users, size=(n_bootstrap, n_users))
