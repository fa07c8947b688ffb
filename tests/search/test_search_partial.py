"""What stopped trials say: lines from rungs to final values, and their place in the surrogate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from milp_ray.config.search import SurrogateSection
from milp_ray.memory.space import SearchSpace
from milp_ray.search import surrogate
from milp_ray.search.candidates import initial_points
from milp_ray.search.observations import Observation
from milp_ray.search.partial import MIN_PAIRS, final_values

SPACE = SearchSpace(6, (2, 4))
OBJECTIVES = ("validation_loss", "rouge_l")


def trials(
    at_rung: list[float], final: list[float | None], epoch: int = 1, rouge: float = 30.0
) -> list[Observation]:
    """One trial a value at the rung; a final value of ``None`` is a trial that was stopped there."""
    found = []
    points = initial_points(SPACE, len(at_rung), 0)
    for index, (point, rung, end) in enumerate(zip(points, at_rung, final, strict=True)):
        values = None if end is None else {"validation_loss": end, "rouge_l": rouge + index}
        rungs = {epoch: {"validation_loss": rung}}
        layout = SPACE.layout(point).canonical()
        found.append(Observation(index, point, layout, values, rungs=rungs))
    return found


@given(slope=st.floats(0.1, 3.0), start=st.floats(-2.0, 2.0), ahead=st.floats(0.0, 5.0))
def test_what_lies_on_a_line_is_continued(slope: float, start: float, ahead: float) -> None:
    at_rung = [1.0, 2.0, 3.5, 4.0, ahead]
    final = [*(start + slope * x for x in at_rung[:4]), None]
    found = final_values(trials(at_rung, final), OBJECTIVES)
    assert found.values[4, 0] == pytest.approx(start + slope * ahead, abs=1e-9)
    assert found.variances[4, 0] == pytest.approx(0.0, abs=1e-9)
    assert found.is_measured.tolist() == [True] * 4 + [False]


def test_the_variance_is_least_squares_prediction_of_a_new_value() -> None:
    """Against simulation: the error of the line's value at a new point, over many draws of the noise."""
    rng = np.random.default_rng(0)
    x, new = np.array([1.0, 2.0, 2.5, 3.0, 4.5, 5.0]), 6.0
    squares, claimed = [], []
    for _ in range(1500):
        final = 0.5 * x + 0.2 * rng.standard_normal(6)
        found = final_values(trials([*x, new], [*final, None]), OBJECTIVES)
        squares.append((found.values[6, 0] - (0.5 * new + 0.2 * rng.standard_normal())) ** 2)
        claimed.append(found.variances[6, 0])
    assert np.mean(claimed) == pytest.approx(np.mean(squares), rel=0.15)


def test_measured_values_are_as_they_are_and_what_no_rung_sees_is_missing() -> None:
    observed = trials([1.0, 2.0, 3.0, 4.0, 5.0], [0.9, 2.2, 2.9, 4.1, None])
    found = final_values(observed, OBJECTIVES)
    assert found.values[:4, 0].tolist() == [0.9, 2.2, 2.9, 4.1]
    assert not found.variances[:4].any()
    assert np.isnan(found.values[4, 1])
    assert [o.index for o in found.measured] == [0, 1, 2, 3]


@pytest.mark.parametrize("n_whole", [0, MIN_PAIRS - 1])
def test_too_few_whole_trials_make_no_line(n_whole: int) -> None:
    final = [1.0] * n_whole + [None, None]
    observed = trials([float(i) for i in range(n_whole + 2)], final)
    assert len(final_values(observed, OBJECTIVES).observations) == n_whole


def test_only_trials_that_passed_the_same_rung_make_the_line() -> None:
    whole = trials([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], epoch=2)
    stopped = trials([0.0] * 4 + [5.0], [None] * 5, epoch=1)[4:]
    assert len(final_values([*whole, *stopped], OBJECTIVES).observations) == 4


def test_a_failed_trial_says_nothing() -> None:
    point = initial_points(SPACE, 1, 0)[0]
    failed = Observation(9, point, SPACE.layout(point).canonical(), None)
    assert final_values([failed], OBJECTIVES).observations == ()


# ----------------------------------------------------------------------------------------- in the surrogate


def world(n: int, n_stopped: int) -> list[Observation]:
    """A loss that three layers decide; ROUGE-L another one; the last trials were stopped at a rung."""
    found = []
    for index, point in enumerate(initial_points(SPACE, n, 0)):
        layout = SPACE.layout(point).canonical()
        mask = np.array(layout.mask, dtype=float)
        loss = 3.0 - mask[0] - 0.5 * mask[2] * mask[4]
        values = {"validation_loss": loss, "rouge_l": 20.0 + 5.0 * mask[5]}
        rungs = {1: {"validation_loss": 1.0 + 1.5 * loss}}
        is_stopped = index >= n - n_stopped
        found.append(Observation(index, point, layout, None if is_stopped else values, rungs=rungs))
    return found


@pytest.mark.parametrize("outputs", ["standardize", "copula"])
def test_the_loss_is_predicted_as_if_stopped_trials_had_run_on(outputs: str) -> None:
    """A line without residuals: the loss of all trials is known, and ROUGE-L of the whole ones only."""
    section = SurrogateSection.model_validate({"inference": "map", "outputs": outputs})
    observed = world(30, n_stopped=18)
    fitted = surrogate.fit(SPACE, OBJECTIVES, section, observed, 0)
    whole = surrogate.fit(SPACE, OBJECTIVES, section, observed[:12], 0)
    rows = fitted.rows.all()
    truth = 3.0 - rows[:, 0] - 0.5 * rows[:, 2] * rows[:, 4]

    def errors(model: surrogate.Surrogate) -> tuple[float, float]:
        mean, variance = (part.numpy() for part in model.posterior.mean_and_variance(model.features(rows)))
        centre, _ = model.outputs.backward(0, mean[0], variance[0])
        return float(np.abs(centre.mean(axis=0) - truth).mean()), float(variance[1].mean())

    (error, spread), (error_whole, spread_whole) = errors(fitted), errors(whole)
    assert error < 0.6 * error_whole
    assert spread == pytest.approx(spread_whole, rel=0.1)


def test_a_stopped_trial_is_neither_on_the_front_nor_proposed_again() -> None:
    observed = world(20, n_stopped=12)
    chosen = surrogate.propose(
        SPACE,
        OBJECTIVES,
        SurrogateSection(inference="map"),
        observed,
        (),
        n_proposals=8,
        seed=0,
    )
    assert not {layout.key for layout in chosen} & {o.key for o in observed}
    fitted = surrogate.fit(SPACE, OBJECTIVES, SurrogateSection(inference="map"), observed, 0)
    likely = surrogate._likely_front(fitted, torch.full((2,), -5.0).double(), 0)
    assert {fitted.final.observations[i].index for i in likely} <= set(range(8))
