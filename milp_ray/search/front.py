"""The Pareto front of measured layouts: non-dominated set, hypervolume, reference point, knee. Pure NumPy.

Every function takes ``values`` of shape (n, m), n points by m objectives as they were measured, and
``signs`` of shape (m,): 1 where smaller is better and -1 where larger is better
(:attr:`milp_ray.objectives.Objective.sign`). Values must be finite.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats: TypeAlias = NDArray[np.float64]

# The reference point lies this share of the range beyond the worst value, so that extreme points count too.
REFERENCE_MARGIN = 0.1
# The same for the corner behind the front.
NADIR_MARGIN = 1.0
# Values further than so many interquartile ranges beyond the worse quartile are diverged training, which
# would otherwise push the reference point so far out that no improvement could be seen.
REFERENCE_OUTLIER_RANGES = 3.0


def pareto_front(values: ArrayLike, signs: ArrayLike) -> list[int]:
    """Indices of the non-dominated points, ascending.

    A point is dominated when another one is at least as good in every objective and better in one; of
    equal points none dominates the other, so all of them are on the front.

    Raises:
        ValueError: a value is not finite, or the shapes do not fit.
    """
    dominated = _dominates(_minimised(values, signs)).any(axis=0)
    return [int(index) for index in np.flatnonzero(~dominated)]


def fronts(values: ArrayLike, signs: ArrayLike) -> Iterator[list[int]]:
    """Indices of the front, then of the front of all others, and so on (Deb et al. 2002), each ascending.

    Raises:
        ValueError: as :func:`pareto_front`.
    """
    dominates = _dominates(_minimised(values, signs))
    n_above = dominates.sum(axis=0)  # points left that dominate each; below 0: it is on a front
    while len(front := np.flatnonzero(n_above == 0)):
        yield front.tolist()
        n_above -= dominates[front].sum(axis=0)
        n_above[front] = -1


def hypervolume(values: ArrayLike, signs: ArrayLike, reference: ArrayLike) -> float:
    """Exact volume that the points dominate inside the box up to ``reference``.

    Points that do not beat the reference in every objective add nothing; no points give 0. Slicing over
    the last objective (While et al. 2006), which is quick for the two or three objectives used here.

    Args:
        reference: shape (m,), in the units and direction of ``values``.
    """
    points = _minimised(values, signs)
    limit = np.asarray(reference, dtype=float) * np.asarray(signs, dtype=float)
    return _dominated_volume(points[(points < limit).all(axis=1)], limit)


def reference_point(
    values: ArrayLike, signs: ArrayLike, worst: Sequence[float | None] | None = None
) -> Floats:
    """The corner from which the hypervolume of a study is measured, shape (m,), in the units of ``values``.

    The rule: of each objective the worst value, diverged ones left out, and a tenth of the range from best
    to worst beyond it (a tenth of the value's size, at least 1e-9, where all are equal). A study applies it
    once, to its initial trials, and then keeps it, so that hypervolumes over trials compare.

    Args:
        values: the points that set it.
        signs: the objectives' directions.
        worst: the worst value of an objective where that is known beforehand (the size of the largest adapter
            of a space), which is then taken in place of the worst one measured; ``None`` elsewhere.

    Raises:
        ValueError: there are no points.
    """
    points = _minimised(values, signs)
    if len(points) == 0:
        raise ValueError("a reference point needs at least one point")
    lower, upper = np.quantile(points, [0.25, 0.75], axis=0)
    fence = upper + REFERENCE_OUTLIER_RANGES * (upper - lower)
    limit = np.where(points <= fence, points, -np.inf).max(axis=0)
    for column, known in enumerate(worst or ()):
        if known is not None:
            limit[column] = known * np.asarray(signs, dtype=float)[column]
    best = points.min(axis=0)
    flat = np.maximum(np.abs(limit), 1e-8)
    margin = REFERENCE_MARGIN * np.where(limit > best, limit - best, flat)
    return np.asarray((limit + margin) * np.asarray(signs, dtype=float))


def nadir(values: ArrayLike, signs: ArrayLike) -> Floats:
    """The corner from which what a new point would add is counted, shape (m,), in the units of ``values``.

    Of each objective the worst value on the front, and once the front's range beyond it (a nadir as of
    Ishibuchi et al. 2011, with room for the ends of the front to be found). It moves with the front and,
    unlike :func:`reference_point`, knows nothing of what the front dominates: neither diverged values nor
    that few points were measured yet. An objective that is the same all over the front takes its range from
    all points.

    Raises:
        ValueError: there are no points.
    """
    points = _minimised(values, signs)
    if len(points) == 0:
        raise ValueError("a nadir needs at least one point")
    front = points[pareto_front(points, np.ones(points.shape[1]))]
    is_flat = np.ptp(front, axis=0) == 0
    best, limit = front.min(axis=0), np.where(is_flat, points.max(axis=0), front.max(axis=0))
    flat = np.maximum(np.abs(limit), 1e-8)
    margin = NADIR_MARGIN * np.where(limit > best, limit - best, flat)
    return np.asarray((limit + margin) * np.asarray(signs, dtype=float))


def knee(values: ArrayLike, signs: ArrayLike) -> int:
    """Index of the knee of a front: the point furthest from the plane of the extremes, towards the ideal.

    Objectives are scaled to [0, 1] over the given points (one that is the same everywhere is left out). The
    plane goes through the best point of each objective (Das 1999); where those points span no plane that
    faces the ideal it is the one with equal weights. Ties, and so the case of two points with two
    objectives, go to the smaller sum of scaled objectives, then to the better first objective, the second
    and so on. One point is its own knee.

    Args:
        values: the points of a front only.

    Raises:
        ValueError: there are no points.
    """
    points = _minimised(values, signs)
    if len(points) == 0:
        raise ValueError("a knee needs at least one point")
    ideal, span = points.min(axis=0), np.ptp(points, axis=0)
    # Rounded, because units change the last bits, and those would decide between points that are level.
    scaled = np.round((points[:, span > 0] - ideal[span > 0]) / span[span > 0], 9)
    if scaled.shape[1] == 0:
        return 0
    normal = _plane_normal(scaled)
    distance = (1.0 - scaled @ normal) / np.linalg.norm(normal)
    # Rounding makes equal distances differ in the last bits and ties go astray.
    keys = [tuple(np.round([-distance[i], scaled[i].sum(), *scaled[i]], 9)) for i in range(len(points))]
    return min(range(len(points)), key=lambda i: keys[i])


def hypervolume_history(
    values: Sequence[Sequence[float] | None], signs: ArrayLike, reference: ArrayLike
) -> list[float]:
    """Hypervolume after each trial in order; ``None`` is a trial without values and adds nothing."""
    history: list[float] = []
    front: list[Sequence[float]] = []
    for point in values:
        volume = history[-1] if history else 0.0
        if point is not None:
            indices = pareto_front([*front, point], signs)
            if indices[-1] == len(front):  # else it is dominated, and the front as it was
                front = [[*front, point][i] for i in indices]
                volume = hypervolume(front, signs, reference)
        history.append(volume)
    return history


def _minimised(values: ArrayLike, signs: ArrayLike) -> Floats:
    """``values`` with every objective to be minimised, shape (n, m)."""
    factors = np.asarray(signs, dtype=float)
    points = np.asarray(values, dtype=float).reshape(-1, len(factors))
    if not np.isfinite(points).all():
        raise ValueError("objective values must be finite")
    return np.asarray(points * factors)


def _dominates(points: Floats) -> NDArray[np.bool_]:
    """[i, j]: point i is as good as point j in every objective and better in one."""
    shape = (len(points), len(points))
    at_least_as_good, better = np.ones(shape, dtype=bool), np.zeros(shape, dtype=bool)
    for column in points.T:
        at_least_as_good &= column[:, None] <= column
        better |= column[:, None] < column
    return at_least_as_good & better


def _dominated_volume(points: Floats, limit: Floats) -> float:
    """Volume dominated by minimised ``points``, all of them below ``limit``."""
    if len(points) == 0:
        return 0.0
    if points.shape[1] == 1:
        return float(limit[0] - points.min())
    points = points[np.argsort(points[:, -1], kind="stable")]
    levels = np.append(points[:, -1], limit[-1])
    volume = 0.0
    for k in range(len(points)):
        depth = levels[k + 1] - levels[k]
        if depth > 0:
            slab = points[: k + 1, :-1]
            slab = slab[pareto_front(slab, np.ones(slab.shape[1]))]
            volume += float(depth) * _dominated_volume(slab, limit[:-1])
    return volume


def _plane_normal(scaled: Floats) -> Floats:
    """Normal a of the plane a · x = 1 through the extremes of ``scaled`` (n, m), all of a positive."""
    m = scaled.shape[1]
    extremes = np.array(
        [scaled[min(range(len(scaled)), key=lambda i: (scaled[i, j], scaled[i].sum()))] for j in range(m)]
    )
    if np.linalg.matrix_rank(extremes, tol=1e-9) == m:
        normal = np.linalg.solve(extremes, np.ones(m))
        if (normal > 0).all():
            return np.asarray(normal)
    return np.ones(m)
