"""Rules of the search space: what is searched, what is held, and which ranks a base allows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milp_ray.config.search import SpaceSection
from milp_ray.errors import MilpError
from milp_ray.memory.architecture import FfnShapes
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.memory.space import FACTORS, SearchSpace

SHAPES = FfnShapes(4, (("mlp.up_proj", 64, 172), ("mlp.down_proj", 172, 64)))


@st.composite
def spaces(draw: st.DrawFn, max_layers: int = 6) -> SearchSpace:
    n_layers = draw(st.integers(1, max_layers))
    factors = tuple(f for f in FACTORS if draw(st.booleans()))
    layer = st.integers(0, n_layers - 1)
    return SearchSpace(
        n_layers=n_layers,
        ranks=(8, 16, 96),
        factors=factors,
        fixed_layers=None if "layers" in factors else draw(st.none() | st.lists(layer).map(tuple)),
        fixed_number=None if "number" in factors else draw(st.none() | st.integers(0, n_layers)),
        fixed_rank=None if "rank" in factors else draw(st.none() | st.sampled_from((4, 8))),
    )


def all_canonical(space: SearchSpace) -> set[CanonicalLayout]:
    parameters = space.parameters()
    points = itertools.product(*(p.values for p in parameters))
    return {
        space.layout(dict(zip((p.name for p in parameters), point, strict=True))).canonical()
        for point in points
    }


@given(spaces(), st.integers(0, 2**32 - 1))
def test_canonical_to_raw_and_back_is_the_same_layout(space: SearchSpace, seed: int) -> None:
    layout = space.layout(space.sample(np.random.default_rng(seed)))
    assert space.layout(space.raw(layout)) == layout
    canonical = layout.canonical()
    assert space.layout(space.raw(canonical)).canonical() == canonical


@settings(max_examples=30)
@given(spaces(max_layers=5))
def test_n_canonical_is_what_enumeration_finds(space: SearchSpace) -> None:
    assert space.n_canonical == len(all_canonical(space))


def test_the_full_space_has_every_mask_at_every_rank_and_one_empty_layout() -> None:
    space = SearchSpace(n_layers=8, ranks=(8, 16, 32, 64, 96))
    assert space.n_canonical == (2**8 - 1) * 5 + 1


def test_parameters_are_a_bit_a_layer_the_number_and_the_rank() -> None:
    found = {p.name: (p.kind, p.values) for p in SearchSpace(2, (16, 8)).parameters()}
    assert found == {
        "layer_0": ("bool", (False, True)),
        "layer_1": ("bool", (False, True)),
        "n_loras": ("int", (0, 1, 2)),
        "rank": ("choice", (8, 16)),
    }


def test_held_factors_take_their_fixed_values() -> None:
    space = SearchSpace(4, (8, 16), factors=("number",), fixed_layers=(1, 3), fixed_rank=16)
    assert space.layout({"n_loras": 4}).canonical() == CanonicalLayout((False, True, False, True), 16)


def test_held_factors_without_a_value_are_all_layers_a_lora_on_each_and_the_smallest_rank() -> None:
    canonical = SearchSpace(3, (16, 8), factors=()).layout({}).canonical()
    assert canonical == CanonicalLayout((True, True, True), 8)


def test_ranks_above_the_smaller_side_are_dropped_and_kept_for_the_notice() -> None:
    space = SearchSpace.for_base(SpaceSection(), SHAPES)
    assert space.ranks == (8, 16, 32, 64)
    assert space.dropped_ranks == (96,)


def test_no_rank_left_says_which_map_is_too_small_and_what_fits() -> None:
    with pytest.raises(
        MilpError, match=r"rank 65 is above the smaller side of .*mlp.*\(64\); use at most 64"
    ):
        SearchSpace.for_base(SpaceSection(ranks=(65, 96)), SHAPES)


def test_a_fixed_rank_that_is_too_large_is_refused() -> None:
    with pytest.raises(MilpError, match=r"rank 96 .* use at most 64"):
        SearchSpace.for_base(SpaceSection(factors=("layers", "number"), fixed_rank=96), SHAPES)


def test_a_fixed_rank_may_stand_outside_the_searched_ones() -> None:
    space = SearchSpace.for_base(SpaceSection(ranks=(96,), factors=("layers",), fixed_rank=4), SHAPES)
    assert space.layout(dict.fromkeys(("layer_0", "layer_1", "layer_2", "layer_3"), True)).rank == 4


@pytest.mark.parametrize(
    "section",
    [
        SpaceSection(fixed_rank=8),
        SpaceSection(fixed_layers=(0,)),
        SpaceSection(fixed_number=1),
        SpaceSection(factors=("rank",), fixed_layers=(4,)),
        SpaceSection(factors=("rank",), fixed_number=5),
    ],
)
def test_fixed_values_that_contradict_the_search_or_the_base_are_refused(section: SpaceSection) -> None:
    with pytest.raises(MilpError, match=r"space\.fixed_"):
        SearchSpace.for_base(section, SHAPES)


def test_a_layout_outside_the_space_has_no_raw_point() -> None:
    space = SearchSpace(3, (8,), factors=("number", "rank"), fixed_layers=(0, 1))
    with pytest.raises(MilpError, match="outside the search space"):
        space.raw(CanonicalLayout((False, False, True), 8))
    with pytest.raises(MilpError, match="outside the search space"):
        space.raw(CanonicalLayout((True, True), 8))


@pytest.mark.parametrize(
    "raw",
    [{"n_loras": 1}, {"n_loras": 1, "rank": 9}, {"n_loras": 4, "rank": 8}, {"n_loras": 1, "rank": 8, "x": 1}],
)
def test_a_point_with_a_missing_unknown_or_impossible_value_is_refused(raw: dict[str, int]) -> None:
    with pytest.raises(MilpError):
        SearchSpace(3, (8,), factors=("number", "rank")).layout(raw)


def test_uniform_points_reach_every_value() -> None:
    space = SearchSpace(2, (8, 16))
    rng = np.random.default_rng(0)
    seen = [space.sample(rng) for _ in range(200)]
    for parameter in space.parameters():
        assert {point[parameter.name] for point in seen} == set(parameter.values)
