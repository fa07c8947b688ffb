"""The hypervolume that is kept while trials end, against the one of all trials together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from milp_ray.memory.layout import CanonicalLayout
from milp_ray.search.front import hypervolume
from milp_ray.search.journal import StudyState, TrialRecord
from milp_ray.search.results import RunningHypervolume, reference_corner, study_result

OBJECTIVES = ("validation_loss", "rouge_l", "adapter_parameters")
SIGNS = (1.0, -1.0, 1.0)


def state(n_trials: int) -> StudyState:
    header: dict[str, Any] = {"objectives": list(OBJECTIVES), "n_initial": 3, "seed": 0}
    layout = CanonicalLayout((True, False), 8)
    return StudyState(header, [TrialRecord(i, 0, {}, layout, "sobol", "started") for i in range(n_trials)])


def end(study: StudyState, index: int, values: tuple[float, ...] | None) -> None:
    """A trial that has completed with these values, or failed."""
    if values is None:
        study.apply({"event": "trial_failed", "index": index, "reason": "OutOfMemoryError"})
    else:
        metrics = dict(zip(OBJECTIVES, values, strict=True))
        study.apply({"event": "trial_completed", "index": index, "metrics": metrics})


points = st.lists(
    st.none() | st.tuples(*[st.integers(0, 6).map(float)] * 3), min_size=1, max_size=12
)  # few values, so that points are equal and dominate each other


@given(points, st.randoms(use_true_random=False))
def test_it_is_that_of_all_trials_whatever_the_order_in_which_they_end(values: list, rng: Any) -> None:
    study, running = state(len(values)), RunningHypervolume()
    order = list(range(len(values)))
    rng.shuffle(order)
    for index in order:
        end(study, index, values[index])
        known = [[t.metrics[name] for name in OBJECTIVES] for t in study.completed]
        if not known:
            assert running.of(study) is None
            continue
        corner = reference_corner(study.header or {}, study.completed)
        assert corner is not None
        assert running.of(study) == pytest.approx(hypervolume(known, SIGNS, corner))
        columns = zip(OBJECTIVES, SIGNS, zip(*known, strict=True), strict=True)
        assert running.best(study) == {n: min(v) if sign > 0 else max(v) for n, sign, v in columns}
    assert running.of(study) == RunningHypervolume().of(study)  # a study that is resumed


def test_a_dominated_trial_is_not_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    study, running = state(6), RunningHypervolume()
    for index in range(4):
        end(study, index, (1.0 + index, 9.0 + index, 5.0))
    volume = running.of(study)
    monkeypatch.setattr("milp_ray.search.results.hypervolume", None)  # is not called
    end(study, 4, (8.0, 1.0, 9.0))
    assert running.of(study) == volume
    monkeypatch.undo()
    end(study, 5, (0.5, 20.0, 4.0))
    assert running.of(study) > (volume or np.inf)


def test_a_value_that_is_no_number_and_no_objective_is_left_out() -> None:
    """As a trial may have journalled it whose training diverged."""
    study = state(2)
    study.header = {"objectives": ["rouge_l", "adapter_parameters"], "n_initial": 3, "seed": 0}
    for index, loss in enumerate((None, 2.0)):
        metrics = {"rouge_l": 1.0 + index, "adapter_parameters": 5 + index, "validation_loss": loss}
        study.apply({"event": "trial_completed", "index": index, "metrics": metrics})
    first, second = study_result(study).front
    assert first.values == {"rouge_l": 1.0, "adapter_parameters": 5.0}
    assert second.values["validation_loss"] == 2.0
