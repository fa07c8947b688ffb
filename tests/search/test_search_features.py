"""Layouts as rows and features: what is encoded, enumerated, drawn and next to what."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from milp_ray.memory.layout import CanonicalLayout
from milp_ray.memory.space import SearchSpace
from milp_ray.search.features import CanonicalRows, row_keys

SPACES = [
    SearchSpace(5, (2, 4, 8)),
    SearchSpace(5, (2, 4, 8), factors=("layers", "rank"), fixed_number=2),
    SearchSpace(5, (2, 4), factors=("layers",)),
    SearchSpace(6, (2, 4), factors=("number", "rank"), fixed_layers=(0, 2, 3, 5)),
    SearchSpace(6, (2, 4), factors=("rank",), fixed_layers=(0, 2, 3, 5), fixed_number=3),
    SearchSpace(4, (8,), factors=("layers", "number"), fixed_rank=16),
    SearchSpace(3, (2, 4, 8), factors=("rank",)),
]


def layouts_of(space: SearchSpace) -> set[CanonicalLayout]:
    """By way of raw points, every one of a space."""
    rng = np.random.default_rng(0)
    found: set[CanonicalLayout] = set()
    while len(found) < space.n_canonical:
        found.add(space.layout(space.sample(rng)).canonical())
    return found


@given(st.sampled_from(SPACES), st.integers(0, 2**31 - 1))
def test_features_are_the_canonical_layout(space: SearchSpace, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = CanonicalRows(space)
    layouts = [space.layout(space.sample(rng)).canonical() for _ in range(6)]
    for features, layout in zip(rows.features(rows.encode(layouts)).tolist(), layouts, strict=True):
        has_rank = "rank" in space.factors and len(space.ranks) > 1 and not layout.is_empty
        rank = space.ranks.index(layout.rank) / (len(space.ranks) - 1) if has_rank else 0.0
        assert features == pytest.approx([*map(float, layout.mask), sum(layout.mask) / space.n_layers, rank])


@given(st.sampled_from(SPACES), st.integers(0, 2**31 - 1))
def test_rows_lose_nothing(space: SearchSpace, seed: int) -> None:
    layout = space.layout(space.sample(np.random.default_rng(seed))).canonical()
    rows = CanonicalRows(space)
    row = rows.encode([layout])[0]
    assert rows.decode(row) == layout
    assert space.layout(rows.raw(row)).canonical() == layout


@pytest.mark.parametrize("space", SPACES)
def test_all_rows_are_all_layouts_once(space: SearchSpace) -> None:
    rows = CanonicalRows(space)
    found = [rows.decode(row) for row in rows.all()]
    assert len(found) == len(set(found)) == space.n_canonical
    assert set(found) == layouts_of(space)


@pytest.mark.parametrize("space", SPACES)
def test_random_rows_are_of_the_space_and_reach_all_of_it(space: SearchSpace) -> None:
    rows = CanonicalRows(space)
    drawn = set(row_keys(rows.random(4000, np.random.default_rng(0))))
    everything = set(row_keys(rows.all()))
    assert drawn <= everything
    assert len(drawn) > 0.9 * len(everything)


@pytest.mark.parametrize("space", SPACES)
def test_neighbours_are_other_layouts_of_the_space_and_connect_it(space: SearchSpace) -> None:
    rows = CanonicalRows(space)
    everything = dict(zip(row_keys(rows.all()), rows.all(), strict=True))
    first = next(iter(everything))
    reached, to_visit = {first}, [first]
    while to_visit:
        key = to_visit.pop()
        near = row_keys(rows.neighbours(everything[key]))
        assert len(near) == len(set(near))
        assert key not in near
        assert set(near) <= set(everything)
        to_visit += set(near) - reached
        reached |= set(near)
    assert reached == set(everything)


def test_the_steps_of_a_layout() -> None:
    rows = CanonicalRows(SearchSpace(6, (2, 4, 8)))
    layout = CanonicalLayout((True, True, True, True, False, False), 4)
    found = {rows.decode(row).key for row in rows.neighbours(rows.encode([layout])[0])}
    assert {"111000-r4", "111110-r4", "011110-r4", "111100-r2", "111100-r8"} <= found
    assert "010000-r4" not in found  # one LoRA on four active layers sits on the third
    assert {"001000-r4", "010100-r4"} <= found
    assert len(found) == 6 + 4 * 2 + 2 + 2  # flips, swaps, thinned to one and two, ranks
