"""Intervals over users: seeded, paired, honest about few users."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milp_ray.errors import MilpError
from milp_ray.evaluation import bootstrap
from milp_ray.evaluation.bootstrap import Interval, difference_interval, interval


def bounds(found: Interval | None) -> tuple[float, float, float]:
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    return found.low, found.mean, found.high


VALUES = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20)


@settings(deadline=None, max_examples=50)
@given(VALUES)
def test_the_interval_lies_inside_the_range_of_the_values(values: list[float]) -> None:
    low, mean, high = bounds(interval(values, n_bootstrap=200))
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert mean == pytest.approx(np.mean(values))


@settings(deadline=None, max_examples=50)
@given(VALUES, st.floats(-50, 50))
def test_a_constant_moves_the_interval_with_it(values: list[float], shift: float) -> None:
    plain = bounds(interval(values, n_bootstrap=200))
    moved = bounds(interval([v + shift for v in values], n_bootstrap=200))
    assert moved == pytest.approx([v + shift for v in plain], abs=1e-6)


def test_the_same_seed_gives_the_same_bounds_and_another_seed_others() -> None:
    values = list(np.random.default_rng(1).normal(size=15))
    assert interval(values, seed=3) == interval(values, seed=3)
    assert interval(values, seed=3) != interval(values, seed=4)


def test_a_higher_confidence_is_a_wider_interval() -> None:
    values = list(np.random.default_rng(1).normal(size=15))
    wide = bounds(interval(values, confidence=0.99))
    narrow = bounds(interval(values, confidence=0.8))
    assert wide[0] < narrow[0] < narrow[2] < wide[2]


def test_one_user_has_a_mean_and_no_interval_and_no_user_has_nothing() -> None:
    one = interval([4.0])
    assert one is not None
    assert (one.mean, one.low, one.high, one.n_users) == (4.0, None, None, 1)
    assert interval([]) is None


def test_users_without_a_value_are_left_out_and_an_infinity_is_refused() -> None:
    nan = float("nan")
    assert interval([1.0, nan, 3.0]) == interval([1.0, 3.0])
    assert interval([nan]) is None
    with pytest.raises(MilpError, match="infinite"):
        interval([1.0, float("inf")])


def test_pairing_removes_what_makes_users_differ() -> None:
    # Users differ by hundreds, the methods by one: only the paired difference sees it.
    rng = np.random.default_rng(0)
    base = rng.normal(scale=300.0, size=12)
    better = base + 1.0 + 0.1 * rng.normal(size=12)
    low, mean, high = bounds(difference_interval(better, base))
    assert 0.8 < low < mean < high < 1.2


def test_a_difference_takes_only_users_that_both_methods_have() -> None:
    nan = float("nan")
    found = difference_interval([3.0, 5.0, 9.0, nan], [1.0, 1.0, nan, 0.0])
    assert found is not None
    assert (found.n_users, found.mean) == (2, 3.0)
    assert difference_interval([1.0, nan], [nan, 1.0]) is None


def test_the_coverage_of_the_mean_is_near_the_nominal_one() -> None:
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(200):
        low, _, high = bounds(interval(rng.normal(loc=2.0, size=30), n_bootstrap=400))
        hits += low <= 2.0 <= high
    assert 0.87 <= hits / 200 <= 0.99


def test_many_users_are_drawn_in_parts_that_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "_ELEMENTS_AT_ONCE", 1000)
    values = np.random.default_rng(0).normal(size=300)
    low, mean, high = bounds(interval(values, n_bootstrap=100))
    assert low < mean < high
