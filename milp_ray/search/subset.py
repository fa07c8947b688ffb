"""Which observations the surrogate is fitted to, where there are more than it can take. Pure NumPy.

The time of a fit grows with the cube of the observations, so that beyond a few hundred a subset of the data
stands for all of them (Quiñonero-Candela and Rasmussen 2005). As with inducing points that are chosen for
optimisation (Moss et al. 2023) quality counts beside coverage, in three equal parts:

- the best: front after front, of one that is too large a spread. What is proposed has to improve on these.
- the newest: they say where the surrogate has just been wrong.
- a spread: each time the layout that is farthest from all that are chosen.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import ArrayLike, NDArray

from milp_ray.search.front import Floats
from milp_ray.search.rungs import ranking

Positions = NDArray[np.int64]


def representative(
    features: Floats, values: Floats, is_measured: NDArray[np.bool_], signs: ArrayLike, limit: int
) -> Positions:
    """Positions of at most ``limit`` of n observations, ascending; all of them where they are no more.

    Args:
        features: n x d, of the layouts, in the order of the trials.
        values: n x m, in the objectives' own units; finite where measured.
        is_measured: n; the others were extrapolated, and are never among the best.
        signs: m, as of the front's functions.
        limit: at least 1.
    """
    n = len(features)
    if n <= limit:
        return np.arange(n)
    is_chosen = np.zeros(n, dtype=bool)
    minimised = values * np.asarray(signs, dtype=float)
    by_rank = ranking({int(position): minimised[position] for position in np.flatnonzero(is_measured)})
    is_chosen[list(itertools.islice(by_rank, -(-limit // 3)))] = True
    newest = np.flatnonzero(~is_chosen)[::-1]
    is_chosen[newest[: (limit - int(is_chosen.sum())) // 2]] = True
    _spread(features, is_chosen, limit - int(is_chosen.sum()))
    return np.flatnonzero(is_chosen)


def _spread(points: Floats, is_chosen: NDArray[np.bool_], count: int) -> None:
    """Choose ``count`` more points, each farthest from all before it (Gonzalez 1985): the first of equals."""
    distance = np.full(len(points), np.inf)
    for position in np.flatnonzero(is_chosen).tolist():
        _approach(distance, points, position)
    for _ in range(count):
        farthest = int(distance.argmax())
        is_chosen[farthest] = True
        _approach(distance, points, farthest)


def _approach(distance: Floats, points: Floats, position: int) -> None:
    """Take in that a point is chosen: squared distances to the nearest one that is; below 0 its own."""
    difference = points - points[position]
    np.minimum(distance, (difference * difference).sum(axis=1), out=distance)
    distance[position] = -1.0
