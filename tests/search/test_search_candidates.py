"""Initial points and random new ones."""

from __future__ import annotations

import numpy as np
import pytest

from milp_ray.memory.space import SearchSpace
from milp_ray.search.candidates import initial_points, random_new_point

SPACES = [
    SearchSpace(4, (2, 4)),
    SearchSpace(5, (2, 4, 8), factors=("layers", "rank"), fixed_number=2),
    SearchSpace(5, (2, 4), factors=("layers",)),
    SearchSpace(6, (2, 4), factors=("number", "rank"), fixed_layers=(0, 2, 3, 5)),
    SearchSpace(4, (2, 4, 8), factors=("rank",)),
    SearchSpace(4, (8,), factors=("layers", "number")),
]


def key(space: SearchSpace, point: dict) -> str:
    return space.layout(point).canonical().key


@pytest.mark.parametrize("space", SPACES)
def test_initial_points_are_different_layouts_and_never_empty(space: SearchSpace) -> None:
    points = initial_points(space, 12, seed=3)
    keys = [key(space, point) for point in points]
    assert len(set(keys)) == len(keys)
    assert "empty" not in keys
    has_empty = space.factors != ("rank",)
    assert len(points) == min(12, space.n_canonical - has_empty)


def test_initial_points_come_from_the_seed_alone_and_a_longer_list_begins_alike() -> None:
    space = SearchSpace(8, (8, 16, 32, 64, 96))
    assert initial_points(space, 16, seed=1) == initial_points(space, 16, seed=1)
    assert initial_points(space, 16, seed=1) != initial_points(space, 16, seed=2)


def test_initial_points_have_few_layers_and_many() -> None:
    space = SearchSpace(16, (8, 16))
    counts = [sum(space.layout(p).active) for p in initial_points(space, 64, seed=0)]
    # Fair bits would put 98 % of the layouts between 4 and 12 layers.
    assert sum(count <= 3 for count in counts) >= 5
    assert sum(count >= 13 for count in counts) >= 5


@pytest.mark.parametrize("space", SPACES)
def test_random_new_points_visit_every_layout_once_and_then_end(space: SearchSpace) -> None:
    rng = np.random.default_rng(0)
    seen: set[str] = set()
    while (point := random_new_point(space, seen, rng)) is not None:
        assert key(space, point) not in seen
        seen.add(key(space, point))
    assert len(seen) == space.n_canonical
