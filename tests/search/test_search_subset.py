"""Which observations stand for all of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from milp_ray.search.front import pareto_front
from milp_ray.search.subset import representative

SIGNS = np.array([1.0, -1.0])


def observed(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, values and all measured."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 2, (n, 6)).astype(float), rng.random((n, 2)), np.ones(n, dtype=bool)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 5))
def test_it_is_as_many_as_are_allowed_in_order_and_none_twice(n: int, limit: int, seed: int) -> None:
    chosen = representative(*observed(n, seed), SIGNS, limit)
    assert len(chosen) == min(n, limit)
    assert (np.diff(chosen) > 0).all()


def test_up_to_the_limit_it_is_all_of_them() -> None:
    assert representative(*observed(12), SIGNS, 12).tolist() == list(range(12))


def test_the_front_and_the_newest_are_always_there() -> None:
    features, values, measured = observed(300)
    chosen = set(representative(features, values, measured, SIGNS, 60).tolist())
    front = pareto_front(values, SIGNS)
    assert 2 < len(front) < 20
    assert set(front) <= chosen
    assert set(range(285, 300)) <= chosen


def test_of_a_front_that_is_too_large_the_ends_are_kept_and_no_part_is_left_empty() -> None:
    n = 200
    features, _, measured = observed(n)
    along = np.linspace(0.0, 1.0, n)[::-1]
    chosen = representative(features, np.column_stack([along, along]), measured, SIGNS, 30)
    best = [int(i) for i in chosen if i < n - 60]  # the newest are at the other end
    assert 0 in chosen
    assert n - 1 in chosen
    assert max(np.diff(best)) <= 40


def test_the_rest_covers_the_space() -> None:
    """One odd layout among many that are alike, neither good nor new: it is the farthest."""
    features, values, measured = observed(100)
    features[:] = 0.0
    features[40], values[40] = 1.0, [9.0, -9.0]
    assert 40 in representative(features, values, measured, SIGNS, 16)


def test_what_was_extrapolated_is_not_among_the_best() -> None:
    features, values, measured = observed(100)
    features[:] = 0.0
    values[0], measured[0] = [-9.0, 9.0], False
    values[1], measured[1] = [np.nan, np.nan], False
    values[2] = [-9.0, 9.0]
    # Two of the best, two of the newest, two of a spread: of equals the first ones, whatever they are.
    chosen = representative(features, values, measured, SIGNS, 6).tolist()
    best = sorted(np.flatnonzero(measured), key=lambda i: values[i, 0] - values[i, 1])
    assert best[0] == 2
    assert {0, 1, 2, 98, 99} <= set(chosen)
    assert len(representative(features[:3], values[:3], measured[:3], SIGNS, 1)) == 1
    assert representative(features[:3], values[:3], measured[:3], SIGNS, 1).tolist() == [2]


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_without_measured_ones_the_newest_and_a_spread_are_left(limit: int) -> None:
    features, values, measured = observed(20)
    assert len(representative(features, values, ~measured, SIGNS, limit)) == limit
