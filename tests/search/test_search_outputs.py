"""Objective values to the surrogate's units and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.special import ndtri

from milp_ray.search.outputs import Kind, Outputs

VALUES = np.array([[1.0, 30.0], [2.0, 50.0], [4.0, 20.0], [3.0, 50.0]])
SIGNS = (1.0, -1.0)


def test_standardised_values_have_mean_0_and_variance_1_and_are_maximised() -> None:
    found = Outputs.of(VALUES, SIGNS, "standardize").forward(VALUES)
    np.testing.assert_allclose(found.mean(axis=1), 0.0, atol=1e-12)
    np.testing.assert_allclose(found.std(axis=1), 1.0)
    assert found[0].argmax() == 0  # the smallest loss
    assert found[1].argmin() == 2  # the smallest score


def test_the_copula_is_the_normal_quantile_of_the_rank() -> None:
    found = Outputs.of(VALUES, SIGNS, "copula").forward(VALUES)
    np.testing.assert_allclose(found[0], ndtri(np.array([7, 5, 1, 3]) / 8))
    np.testing.assert_allclose(found[1], ndtri(np.array([3, 6, 1, 6]) / 8))  # equal values stay equal


@pytest.mark.parametrize("kind", ["standardize", "copula"])
def test_a_diverged_trial_does_not_flatten_the_others(kind: Kind) -> None:
    values = np.append(np.linspace(1.0, 2.0, 9), 1e6)[:, None]
    found = Outputs.of(values, (1.0,), kind).observed(values)[0]
    assert np.ptp(found[:9]) > 0.8
    assert found[9] < found[:9].min() - 0.2
    assert np.abs(found).max() < 4.0


def test_a_value_behind_a_diverged_trial_stays_there() -> None:
    values = np.append(np.linspace(1.0, 2.0, 9), 1e6)[:, None]
    outputs = Outputs.of(values, (1.0,), "standardize")
    assert outputs.forward([[1e3]])[0, 0] < outputs.observed([[1e3]])[0, 0]


@given(
    st.sampled_from(["standardize", "copula"]),
    st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9),
    st.floats(-2e3, 2e3),
    st.floats(-2e3, 2e3),
)
@example("copula", [0.0, 5e-324], 1.0, -1.0)  # equal up to rounding: ranks of them mean nothing
def test_better_values_are_higher_beyond_the_observed_ones_too(
    kind: Kind, column: list[float], a: float, b: float
) -> None:
    outputs = Outputs.of(np.array(column)[:, None], (1.0,), kind)
    low, high = outputs.forward([[max(a, b)], [min(a, b)]])[0]
    assert low <= high + 1e-9 * max(1.0, abs(high))  # rounding
    assert np.isfinite([low, high]).all()


@pytest.mark.parametrize("kind", ["standardize", "copula"])
def test_a_sure_value_comes_back_as_it_was(kind: Kind) -> None:
    outputs = Outputs.of(VALUES, SIGNS, kind)
    units = outputs.forward(VALUES)
    for objective in range(2):
        mean, spread = outputs.backward(objective, units[objective], np.zeros(4))
        np.testing.assert_allclose(mean, VALUES[:, objective])
        np.testing.assert_allclose(spread, 0.0, atol=1e-9)


def test_a_standardised_posterior_comes_back_scaled() -> None:
    outputs = Outputs.of(VALUES, SIGNS, "standardize")
    mean, spread = outputs.backward(0, np.array([0.5]), np.array([4.0]))
    assert mean == pytest.approx(VALUES[:, 0].mean() - 0.5 * VALUES[:, 0].std())
    assert spread == pytest.approx(2.0 * VALUES[:, 0].std())


def test_errors_become_variances_where_there_is_a_scale() -> None:
    errors = (0.1, 2.0)
    found = Outputs.of(VALUES, SIGNS, "standardize").noise(errors)
    np.testing.assert_allclose(found, (np.array(errors) / VALUES.std(axis=0)) ** 2)
    assert Outputs.of(VALUES, SIGNS, "copula").noise(errors) is None
    assert Outputs.of(VALUES, SIGNS, "standardize").noise(None) is None


@pytest.mark.parametrize("kind", ["standardize", "copula"])
def test_an_objective_that_never_changes_is_0(kind: Kind) -> None:
    found = Outputs.of([[5.0], [5.0], [5.0]], (1.0,), kind).forward([[5.0], [4.0]])
    np.testing.assert_allclose(found, [[0.0, 1.0]])
