"""Rules of the layout θ = (α, n, r) and its canonical form."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout, Layout, spread


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    active = tuple(draw(st.lists(st.booleans(), min_size=1, max_size=16)))
    n_loras = draw(st.integers(0, len(active)))
    return Layout(active, n_loras, draw(st.sampled_from((1, 8, 16, 96))))


@given(layouts())
def test_the_effective_mask_has_min_n_and_active_bits_all_on_active_layers(layout: Layout) -> None:
    canonical = layout.canonical()
    assert sum(canonical.mask) == min(layout.n_loras, sum(layout.active))
    assert len(canonical.mask) == len(layout.active)
    assert all(active for active, bit in zip(layout.active, canonical.mask, strict=True) if bit)


@given(layouts())
def test_the_canonical_form_is_its_own_canonical_form(layout: Layout) -> None:
    canonical = layout.canonical()
    again = Layout(canonical.mask, len(canonical.layers), canonical.rank or 8).canonical()
    assert again == canonical
    assert hash(again) == hash(canonical)


@given(st.integers(1, 60), st.data())
def test_chosen_positions_differ_in_their_gaps_by_at_most_one(n_items: int, data: st.DataObject) -> None:
    n_chosen = data.draw(st.integers(1, n_items))
    positions = spread(n_items, n_chosen)
    assert len(set(positions)) == n_chosen
    assert set(positions) <= set(range(n_items))
    gaps = [later - earlier for earlier, later in itertools.pairwise(positions)]
    assert not gaps or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)
    # No end of the list is left bare: the first and the last bin each hold one choice.
    assert positions[0] <= n_items // n_chosen
    assert n_items - 1 - positions[-1] <= n_items // n_chosen


def test_two_loras_over_the_four_active_of_six_layers() -> None:
    layout = Layout(active=(True, False, True, True, False, True), n_loras=2, rank=8)
    assert layout.canonical().layers == (2, 5)
    assert layout.canonical().key == "001001-r8"


def test_more_loras_than_active_layers_are_one_on_each() -> None:
    assert Layout((False, True, True), 3, 8).canonical() == CanonicalLayout((False, True, True), 8)


@given(layouts(), layouts())
def test_keys_are_equal_exactly_where_layouts_are(one: Layout, other: Layout) -> None:
    a, b = one.canonical(), other.canonical()
    if len(a.mask) == len(b.mask):
        assert (a.key == b.key) == (a == b)


def test_keys_do_not_change_between_versions() -> None:
    mask = (False, True, False, True, True, False, True, False)
    assert CanonicalLayout(mask, 16).key == "01011010-r16"
    assert CanonicalLayout((False,) * 8, 16).key == "empty"


@given(st.integers(1, 12), st.integers(0, 12), st.sampled_from((8, 96)))
def test_every_empty_mask_is_the_same_layout_whatever_its_rank(n: int, n_loras: int, rank: int) -> None:
    nothing_active = Layout((False,) * n, min(n_loras, n), rank).canonical()
    no_loras = Layout((True,) * n, 0, 8).canonical()
    assert nothing_active == no_loras
    assert nothing_active.is_empty
    assert nothing_active.layers == ()


@given(layouts())
def test_a_layout_survives_json(layout: Layout) -> None:
    canonical = layout.canonical()
    assert CanonicalLayout.from_dict(json.loads(json.dumps(canonical.to_dict()))) == canonical


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_layers": 4, "layers": [4], "rank": 8}, "use 0 to 3"),
        ({"n_layers": 4, "layers": [1]}, "needs n_layers, layers"),
        ({"n_layers": 4, "layers": [1.5], "rank": 8}, "whole numbers"),
        ({"n_layers": 4, "layers": [1], "rank": 0}, "at least 1"),
    ],
)
def test_a_layout_that_cannot_be_is_not_read(values: dict[str, object], message: str) -> None:
    with pytest.raises(MilpError, match=message):
        CanonicalLayout.from_dict(values)


@pytest.mark.parametrize(("n_loras", "rank"), [(-1, 8), (4, 8), (1, 0)])
def test_a_raw_point_outside_its_ranges_is_refused(n_loras: int, rank: int) -> None:
    with pytest.raises(MilpError):
        Layout((True, True, True), n_loras, rank)
