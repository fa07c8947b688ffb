"""Boxes that tile what a front of three objectives does not dominate, found by a sweep.

BoTorch's general algorithm (Lacour et al. 2017) takes 15 to 30 ms a front of a dozen points, and noisy
hypervolume improvement needs one front a posterior draw. For three objectives a sweep over one of them does
it in a fraction of a millisecond, with 2 n + 1 boxes at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Strip: TypeAlias = tuple[float, float, float, float]
Box: TypeAlias = tuple[tuple[float, float, float], tuple[float, float, float]]


def nondominated_boxes(values: ArrayLike, reference: Sequence[float]) -> NDArray[np.float64]:
    """Disjoint boxes whose union is the part above ``reference`` that no point dominates; all is maximised.

    The sweep goes down the third objective. Between two points' levels the dominated area of the first two
    objectives is a staircase; a point only changes the strips that it covers, whose boxes end at its level.

    Args:
        values: shape (n, 3); dominated points, repeats and points not above ``reference`` are allowed.
        reference: shape (3,).

    Returns:
        Shape (2, n_boxes, 3): lower and upper corners, the upper ones infinite where a box is unbounded.
    """
    x_ref, y_ref, z_ref = (float(bound) for bound in reference)
    points = [tuple(row) for row in np.asarray(values, dtype=float).reshape(-1, 3).tolist()]
    points = [p for p in points if p[0] > x_ref and p[1] > y_ref and p[2] > z_ref]
    boxes: list[Box] = []
    # Strips from left to right: (x from, x to, y from which nothing dominates, z where the strip began).
    strips: list[Strip] = [(x_ref, np.inf, y_ref, np.inf)]
    for x, y, z in sorted(points, key=lambda p: (-p[2], -p[1], -p[0])):
        kept: list[Strip] = []
        rest: list[Strip] = []
        start: float | None = None
        for strip in strips:
            left, right, floor, top = strip
            if floor >= y or left >= x:  # the point covers nothing of it
                (kept if start is None and left < x else rest).append(strip)
                continue
            start = left if start is None else start
            edge = min(right, x)
            if top > z:
                boxes.append(((left, floor, z), (edge, np.inf, top)))
            if right > x:
                rest.append((x, right, floor, top))
        if start is not None:
            strips = [*kept, (start, x, y, z), *rest]
    boxes += [
        ((left, floor, z_ref), (right, np.inf, top)) for left, right, floor, top in strips if top > z_ref
    ]
    return np.asarray(boxes, dtype=float).transpose(1, 0, 2)
