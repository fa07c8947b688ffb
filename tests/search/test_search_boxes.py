"""Cells tile exactly what a front does not dominate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from milp_ray.search.boxes import nondominated_boxes, nondominated_cells
from milp_ray.search.front import hypervolume


def rows_of(m: int) -> st.SearchStrategy[list[list[float]]]:
    return st.lists(st.lists(st.integers(-1, 5).map(float), min_size=m, max_size=m), max_size=7)


def unit_cells(m: int) -> np.ndarray:
    return np.stack(np.meshgrid(*[np.arange(6.0)] * m, indexing="ij"), axis=-1).reshape(-1, m)


@settings(deadline=None)
@given(rows_of(3))
def test_boxes_tile_exactly_what_no_point_dominates(rows: list[list[float]]) -> None:
    """Counted in unit cells: one that is not dominated lies in exactly one box, any other in none."""
    lower, upper = nondominated_boxes(rows, [0.0, 0.0, 0.0])
    corners = unit_cells(3)
    inside = ((corners[:, None] >= lower) & (corners[:, None] + 1 <= upper)).all(axis=2).sum(axis=1)
    points = np.array(rows, dtype=float).reshape(-1, 3)
    dominated = (corners[:, None] + 1 <= points).all(axis=2).any(axis=1)
    assert (inside == np.where(dominated, 0, 1)).all()
    assert len(lower) <= 2 * len(rows) + 1


@settings(deadline=None)
@given(st.sampled_from([2, 3]).flatmap(lambda m: st.lists(rows_of(m), min_size=1, max_size=3)))
def test_cells_of_many_fronts_tile_each_of_them(fronts: list[list[list[float]]]) -> None:
    """Fronts of one number of points, as posterior draws are; repeats of a point fill the shorter ones up."""
    m = next((len(row) for rows in fronts for row in rows), 2)
    n = max(len(rows) for rows in fronts)
    outside = [[-1.0] * m]
    values = np.array([[*rows, *outside * (n - len(rows))] for rows in fronts]).reshape(len(fronts), n, m)
    lower, length = (
        cells.numpy() for cells in nondominated_cells(torch.tensor(values), torch.zeros(m).double())
    )
    corners = unit_cells(m)
    for points, low, size in zip(values, lower, length, strict=True):
        inside = ((corners[:, None] >= low) & (corners[:, None] + 1 <= low + size)).all(axis=2).sum(axis=1)
        dominated = (corners[:, None] + 1 <= points).all(axis=2).any(axis=1)
        assert (inside == np.where(dominated, 0, 1)).all()


@pytest.mark.parametrize("m", [2, 3, 4])
def test_cells_agree_with_the_hypervolume(m: int) -> None:
    values = torch.from_numpy(np.random.default_rng(m).normal(size=(3, 12, m)) + 0.5)
    lower, length = nondominated_cells(values, torch.zeros(m).double())
    upper = (lower + length).clamp_max(9.0)
    volumes = (upper - lower).clamp_min(0.0).prod(dim=2).sum(dim=1)
    for front, volume in zip(values.numpy(), volumes.tolist(), strict=True):
        assert volume == pytest.approx(9.0**m - hypervolume(front, [-1.0] * m, [0.0] * m))
