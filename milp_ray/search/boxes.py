"""Boxes that tile what a front does not dominate: what an improvement of its hypervolume is made of.

Noisy hypervolume improvement needs one front a posterior draw, for which BoTorch's general algorithm (Lacour
et al. 2017) is slow. For two objectives sorting does it, for all fronts at once; for three a sweep over one
of them, with 2 n + 1 boxes at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

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


def nondominated_cells(values: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Disjoint cells that tile what is above ``reference`` and not dominated, for many fronts at once.

    For two objectives they are strips, found by sorting; for three boxes by :func:`nondominated_boxes`; for
    more BoTorch's (Lacour et al. 2017).

    Args:
        values: b x p x m, p points of b fronts, all maximised; p may be 0.
        reference: m.

    Returns:
        Lower corners and side lengths, b x c x m each: every front has as many cells as the one with the
        most, the others are filled up with cells of length 0. Lengths are infinite where a cell is
        unbounded.
    """
    if values.shape[-1] == 2:
        return _strips(values, reference)
    found = [_boxes(front, reference) for front in values]
    n_cells = max(lower.shape[0] for lower, _ in found)
    shape = (len(values), n_cells, values.shape[-1])
    lower, length = values.new_zeros(shape), values.new_zeros(shape)
    for index, (own_lower, own_upper) in enumerate(found):
        lower[index, : len(own_lower)] = own_lower
        length[index, : len(own_lower)] = own_upper - own_lower
    return lower, length


def _strips(values: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Cells of two objectives, from right to left: each begins at the stairs of the points on its right."""
    b, p, _ = values.shape
    inside = (values > reference).all(dim=2, keepdim=True)
    # A point outside lies on the reference, where it makes strips of no width.
    x, order = torch.where(inside, values, reference)[:, :, 0].sort(dim=1, descending=True, stable=True)
    y = torch.where(inside, values, reference)[:, :, 1].gather(1, order)
    floor = torch.cat([reference[1].expand(b, 1), y.cummax(dim=1).values if p else y], dim=1)
    left = torch.cat([x, reference[0].expand(b, 1)], dim=1)
    # Only where the stairs rise does a strip end: the points below are dominated.
    keep = torch.cat([floor[:, 1:] > floor[:, :-1], floor.new_ones(b, 1, dtype=torch.bool)], dim=1)
    n_strips = int(keep.sum(dim=1).max())
    position = keep.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :n_strips]
    left, is_strip = left.gather(1, position), keep.gather(1, position)
    # A strip's floor is what the strips on its right have risen to: the floor at its own end.
    floor = floor.gather(1, position)
    right = torch.cat([left.new_full((b, 1), torch.inf), left[:, :-1]], dim=1)
    width = torch.where(is_strip, right - left, 0.0)
    height = torch.where(is_strip, torch.inf, 0.0).to(width)
    return torch.stack([left, floor], dim=2), torch.stack([width, height], dim=2)


def _boxes(front: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    if front.shape[-1] == 3:
        corners = torch.from_numpy(nondominated_boxes(front.cpu().numpy(), reference.tolist()).copy())
    else:
        from botorch.utils.multi_objective.box_decompositions.non_dominated import (
            FastNondominatedPartitioning,
        )

        corners = FastNondominatedPartitioning(reference, Y=front).get_hypercell_bounds()
    lower, upper = corners.to(front)
    return lower, upper
