"""The front, its hypervolume, the reference point and the knee, against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from milp_ray.search.front import (
    fronts,
    hypervolume,
    hypervolume_history,
    knee,
    nadir,
    pareto_front,
    reference_point,
)

# A coarse grid makes ties and repeats common, which is where dominance goes wrong.
COORDINATE = st.integers(0, 6).map(float)


def points(n_objectives: int, max_size: int = 8) -> st.SearchStrategy[list[list[float]]]:
    row = st.lists(COORDINATE, min_size=n_objectives, max_size=n_objectives)
    return st.lists(row, min_size=1, max_size=max_size)


def signs_of(n_objectives: int) -> st.SearchStrategy[list[float]]:
    return st.lists(st.sampled_from([1.0, -1.0]), min_size=n_objectives, max_size=n_objectives)


SIZED = st.sampled_from([2, 3]).flatmap(lambda m: st.tuples(points(m), signs_of(m)))


def dominates(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a <= b).all() and (a < b).any())


@given(SIZED)
def test_a_point_is_on_the_front_exactly_when_none_dominates_it(case: tuple) -> None:
    values, signs = case
    minimised = np.array(values) * signs
    wanted = [i for i, p in enumerate(minimised) if not any(dominates(q, p) for q in minimised)]
    assert pareto_front(values, signs) == wanted


@given(SIZED)
def test_each_front_is_that_of_what_the_fronts_before_it_leave(case: tuple) -> None:
    values, signs = case
    left = list(range(len(values)))
    for front in fronts(values, signs):
        assert front == [left[i] for i in pareto_front([values[i] for i in left], signs)]
        left = [i for i in left if i not in front]
    assert not left


def test_directions_decide_what_is_better() -> None:
    values = [[1.0, 10.0], [2.0, 20.0]]
    assert pareto_front(values, [1.0, 1.0]) == [0]
    assert pareto_front(values, [1.0, -1.0]) == [0, 1]
    assert pareto_front(values, [-1.0, -1.0]) == [1]


def test_equal_points_are_all_on_the_front() -> None:
    assert pareto_front([[1.0, 1.0], [1.0, 1.0]], [1.0, 1.0]) == [0, 1]


def test_a_value_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        pareto_front([[float("nan"), 1.0]], [1.0, 1.0])


@settings(deadline=None)
@given(SIZED)
def test_the_hypervolume_is_the_number_of_dominated_unit_cells(case: tuple) -> None:
    """Coordinates are whole numbers, so that the dominated volume is a count of unit cubes."""
    values, signs = case
    minimised = np.array(values) * signs
    limit = np.full(len(signs), 8.0)  # in minimised units; −6 to 6 are the values
    cells = itertools.product(range(-6, 8), repeat=len(signs))
    covered = sum(any((p <= np.array(cell)).all() for p in minimised) for cell in cells)
    assert hypervolume(values, signs, limit * signs) == pytest.approx(covered)


def test_points_beyond_the_reference_add_nothing() -> None:
    assert hypervolume([[5.0, 0.0], [0.0, 5.0]], [1.0, 1.0], [4.0, 4.0]) == 0.0
    assert hypervolume([[5.0, 0.0], [1.0, 1.0]], [1.0, 1.0], [4.0, 4.0]) == 9.0


def test_no_points_have_no_hypervolume() -> None:
    assert hypervolume([], [1.0, -1.0], [1.0, 1.0]) == 0.0


@given(points(3))
def test_the_hypervolume_never_falls_over_trials(values: list[list[float]]) -> None:
    signs = [1.0, -1.0, 1.0]
    reference = reference_point(values, signs)
    history = hypervolume_history([*values, None], signs, reference)
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(history))
    assert history[-1] == pytest.approx(hypervolume(values, signs, reference))
    assert len(history) == len(values) + 1


def test_the_reference_is_a_tenth_of_the_range_beyond_the_worst() -> None:
    assert reference_point([[1.0, 10.0], [3.0, 30.0]], [1.0, -1.0]) == pytest.approx([3.2, 8.0])


def test_the_nadir_is_the_fronts_range_beyond_its_worst() -> None:
    points = [[0.0, 5.0], [2.0, 9.0], [3.0, 1.0], [1e6, -1e6]]  # minimise the first, maximise the second
    assert nadir(points, [1.0, -1.0]) == pytest.approx([4.0, 1.0])


def test_a_front_of_one_point_takes_its_range_from_all_points() -> None:
    assert nadir([[0.0, 9.0], [2.0, 5.0]], [1.0, -1.0]) == pytest.approx([4.0, 1.0])
    assert nadir([[3.0, 4.0]], [1.0, -1.0]) == pytest.approx([6.0, 0.0])
    with pytest.raises(ValueError, match="at least one point"):
        nadir(np.empty((0, 2)), [1.0, -1.0])


def test_diverged_values_do_not_move_the_reference() -> None:
    values = [[1.0], [1.5], [2.0], [2.5], [1e9]]
    assert reference_point(values, [1.0]) == pytest.approx([2.65])


def test_a_worst_value_known_beforehand_is_taken() -> None:
    values = [[1.0, 100.0], [2.0, 200.0]]
    assert reference_point(values, [1.0, 1.0], [None, 1100.0]) == pytest.approx([2.1, 1200.0])


@given(SIZED)
def test_every_ordinary_point_beats_the_reference(case: tuple) -> None:
    values, signs = case
    values = values[:3]  # fewer points than it takes to call one an outlier
    reference = reference_point(values, signs)
    minimised, limit = np.array(values) * signs, reference * np.array(signs)
    quartiles = np.quantile(minimised, [0.25, 0.75], axis=0)
    ordinary = (minimised <= quartiles[1] + 3 * (quartiles[1] - quartiles[0])).all(axis=1)
    assert (minimised[ordinary] < limit).all()


def test_one_point_is_its_own_knee() -> None:
    assert knee([[3.0, 4.0]], [1.0, -1.0]) == 0


def test_the_knee_of_two_points_is_the_better_first_objective() -> None:
    assert knee([[2.0, 1.0], [1.0, 2.0]], [1.0, 1.0]) == 1
    assert knee([[1.0, 1.0], [2.0, 2.0]], [1.0, -1.0]) == 0


def test_the_knee_is_furthest_from_the_line_of_the_extremes() -> None:
    values = [[0.0, 10.0], [1.0, 2.0], [5.0, 1.0], [10.0, 0.0]]
    assert knee(values, [1.0, 1.0]) == 1


def test_the_knee_in_three_objectives() -> None:
    values = [[0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0], [0.3, 0.3, 0.3]]
    assert knee(values, [1.0, 1.0, 1.0]) == 3


def test_an_objective_that_is_the_same_everywhere_does_not_count() -> None:
    values = [[0.0, 10.0, 7.0], [1.0, 2.0, 7.0], [10.0, 0.0, 7.0]]
    assert knee(values, [1.0, 1.0, 1.0]) == 1


@given(SIZED, st.floats(0.1, 10.0), st.floats(-5.0, 5.0))
@example(([[0.0, 0.0, 1.0], [1.0, 5.0, 1.0], [3.0, 1.0, 0.0], [5.0, 3.0, 0.0]], [1.0, -1.0, 1.0]), 0.1, 0.0)
def test_the_knee_does_not_depend_on_units(case: tuple, scale: float, shift: float) -> None:
    values, signs = case
    front = [values[i] for i in pareto_front(values, signs)]
    changed = [[scale * v + shift for v in row] for row in front]
    assert front[knee(front, signs)] == front[knee(changed, signs)]
