"""Initial points and random new ones."""

from __future__ import annotations

import itertools

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


def test_a_space_of_few_layouts_among_many_raw_points_is_walked_through_at_once() -> None:
    """2^32 raw points, and 33 layouts."""
    space = SearchSpace(32, (8,), factors=("layers",), fixed_number=1)
    points = initial_points(space, 100, seed=0)
    assert len({key(space, point) for point in points}) == len(points) == 32
    last = points[31]
    seen = {"empty", *(key(space, point) for point in points[:31])}
    for rng in map(np.random.default_rng, range(3)):
        assert random_new_point(space, seen, rng) is not None
    assert random_new_point(space, {*seen, key(space, last)}, np.random.default_rng(0)) is None


@pytest.mark.parametrize("space", SPACES)
def test_the_walk_gives_the_first_of_a_layout_s_raw_points_in_their_order(
    space: SearchSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that points do not depend on how it is walked."""
    parameters = space.parameters()
    first: dict[str, dict] = {}
    for values in itertools.product(*(parameter.values for parameter in parameters)):
        point = {parameter.name: value for parameter, value in zip(parameters, values, strict=True)}
        first.setdefault(key(space, point), point)
    monkeypatch.setattr("milp_ray.search.candidates._MAX_DRAWS", 0)
    seen: set[str] = set()
    walked = []
    while (found := random_new_point(space, seen, np.random.default_rng(0))) is not None:
        walked.append(found)
        seen.add(key(space, found))
    assert walked == list(first.values())
