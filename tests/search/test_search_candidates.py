"""Initial points, random new ones and neighbours."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milp_ray.memory.layout import CanonicalLayout
from milp_ray.memory.space import SearchSpace
from milp_ray.search.candidates import all_points, initial_points, neighbours, random_new_point

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
    everything = {key(space, point) for point in all_points(space)} - {"empty"}
    assert len(points) == min(12, len(everything))


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
def test_all_points_are_all_canonical_layouts_once(space: SearchSpace) -> None:
    keys = [key(space, point) for point in all_points(space)]
    assert len(keys) == len(set(keys)) == space.n_canonical


@pytest.mark.parametrize("space", SPACES)
def test_random_new_points_visit_every_layout_once_and_then_end(space: SearchSpace) -> None:
    rng = np.random.default_rng(0)
    seen: set[str] = set()
    while (point := random_new_point(space, seen, rng)) is not None:
        assert key(space, point) not in seen
        seen.add(key(space, point))
    assert len(seen) == space.n_canonical


@settings(deadline=None)
@given(st.sampled_from(SPACES), st.integers(0, 2**31 - 1))
def test_neighbours_are_inside_the_space_and_one_step_away(space: SearchSpace, seed: int) -> None:
    layout = space.layout(space.sample(np.random.default_rng(seed))).canonical()
    for point in neighbours(space, layout):
        other = space.layout(point).canonical()  # raises where the point is outside
        changed = [i for i, (a, b) in enumerate(zip(layout.mask, other.mask, strict=True)) if a != b]
        if "layers" in space.factors:
            assert len(changed) <= 2
            if len(changed) == 2:  # a move to the layer next to it
                assert changed[1] - changed[0] == 1
                assert sum(other.mask) == sum(layout.mask)
        assert not (changed and layout.rank != other.rank and not layout.is_empty and not other.is_empty)


@pytest.mark.parametrize("space", [space for space in SPACES if space.n_canonical > 3])
def test_steps_lead_from_any_layout_to_any_other(space: SearchSpace) -> None:
    [start, *_] = all_points(space)
    reached = {key(space, start): space.layout(start).canonical()}
    frontier: list[CanonicalLayout] = list(reached.values())
    while frontier:
        found = [space.layout(p).canonical() for p in neighbours(space, frontier.pop())]
        new = {layout.key: layout for layout in found if layout.key not in reached}
        reached |= new
        frontier += new.values()
    assert len(reached) == space.n_canonical
