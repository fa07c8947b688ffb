"""What a study's journal tells of it: status, front, the model's part, and the table of its trials."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from milp_ray.errors import MilpError
from milp_ray.rundir import RunFolder
from milp_ray.search.export import EXPORT_COLUMNS, check_format, export_rows, write_export
from milp_ray.search.insight import (
    MIN_TRIALS,
    NoAnalysis,
    Study,
    analysis_of,
    front_rows,
    hypervolume_over_time,
    layer_importance,
    load_study,
    study_status,
)

MakeEvents = Callable[..., list[dict[str, Any]]]
MakeRun = Callable[..., RunFolder]


@pytest.fixture
def going_on(tmp_path: Path, study_events: MakeEvents, make_study_run: MakeRun) -> Study:
    """Ten trials with values; one stopped, one failed, one running, one waiting; six to be proposed."""
    return load_study(make_study_run(tmp_path, study_events(), cpus_per_trial=2.0, gpus_per_trial=0.5))


@pytest.fixture
def finished(tmp_path: Path, study_events: MakeEvents, make_study_run: MakeRun) -> Study:
    return load_study(make_study_run(tmp_path, study_events(10, is_finished=True)))


# ----------------------------------------------------------------------------------------------- status


def test_the_status_of_a_running_study(going_on: Study) -> None:
    status = study_status(going_on)
    assert status.trials == {"completed": 10, "stopped": 1, "failed": 1, "running": 1, "waiting": 1}
    assert (status.n_ended, status.n_trials, status.n_to_come, status.finished) == (12, 20, 8, None)
    assert (status.n_sessions, status.n_slots, status.seconds) == (1, 2, 56.0)
    assert status.trial_seconds == 10 * 8.0 + 4.0, "stopped trials cost too"
    assert (status.cpu_seconds, status.gpu_seconds) == (168.0, 42.0)
    assert status.utilisation == pytest.approx(84 / (2 * 56))
    assert status.idle_share == 0.0, "free slots had trials waiting for them"
    assert (status.n_batches, status.proposal_seconds, status.longest_proposal_seconds) == (1, 1.5, 1.5)
    assert status.max_block_seconds is None
    assert status.last_event == "2024-05-01T00:00:56.000+00:00"
    json.dumps(status.trials)


def test_the_best_values_and_the_hypervolume_are_those_of_the_completed_trials(going_on: Study) -> None:
    status = study_status(going_on)
    # Trial 6 is the first with three of the four layers.
    best = status.best["validation_loss"]
    assert (best.trial, best.key) == (6, "1110-r8")
    assert best.value == pytest.approx(min(t.metrics["validation_loss"] for t in going_on.state.completed))
    assert status.best["rouge_l"].value == max(t.metrics["rouge_l"] for t in going_on.state.completed)
    assert status.hypervolume == going_on.result.hypervolume
    assert status.n_front == len(going_on.result.front)


def test_the_time_left_is_the_mean_time_of_a_trial_for_those_to_come_over_the_slots(going_on: Study) -> None:
    # Ten took 9 s, one 5 s, one 6 s; the running one has had 1 s; 7 more wait or are to be proposed.
    mean = (10 * 9 + 5 + 6) / 12
    assert study_status(going_on).seconds_left == pytest.approx((7 * mean + (mean - 1)) / 2)


def test_a_finished_study_has_nothing_left(finished: Study) -> None:
    status = study_status(finished)
    assert (status.n_to_come, status.seconds_left) == (0, 0.0)
    assert status.finished == "all trials have ended"
    assert status.max_block_seconds == 0.05


def test_a_study_before_its_first_trial_has_no_values_and_no_estimate(
    tmp_path: Path, study_events: MakeEvents, make_study_run: MakeRun
) -> None:
    study = load_study(make_study_run(tmp_path, study_events()[:1]))
    status = study_status(study)
    assert (status.n_ended, status.n_to_come, status.seconds_left, status.hypervolume) == (0, 20, None, None)
    assert (status.idle_share, status.n_slots, status.best) == (None, None, {})
    assert (front_rows(study), hypervolume_over_time(study), export_rows(study)) == ([], [], [])


def test_no_more_trials_are_to_come_than_the_space_has_layouts(
    tmp_path: Path, study_events: MakeEvents, make_study_run: MakeRun
) -> None:
    events = study_events()
    events[0]["space"] = {**events[0]["space"], "n_layers": 4, "ranks": [8]}  # 15 masks and the empty one
    assert load_study(make_study_run(tmp_path, events)).n_trials == 16


# ---------------------------------------------------------------------------------------------- reading


def test_a_line_that_is_being_written_is_not_read_and_nothing_is_changed(
    tmp_path: Path, study_events: MakeEvents, make_study_run: MakeRun
) -> None:
    from milp_ray.search.journal import Journal

    run = make_study_run(tmp_path, [e for e in study_events() if e["event"].startswith("study")])
    with Journal(run.journal):  # a search at work holds the journal's lock
        with run.journal.open("a", encoding="utf-8") as file:
            file.write('{"event":"trial_sugg')
        before = run.journal.read_bytes()
        assert study_status(load_study(run)).n_ended == 0
    assert run.journal.read_bytes() == before


def test_a_run_without_a_study_and_a_damaged_journal_are_told(
    tmp_path: Path, study_events: MakeEvents, make_study_run: MakeRun
) -> None:
    run = make_study_run(tmp_path, [])
    with pytest.raises(MilpError, match="holds no study: run `milp-ray search` first"):
        load_study(run)
    run.journal.write_text("nonsense\n")
    with pytest.raises(MilpError, match="line 1 is damaged"):
        load_study(run)


# ------------------------------------------------------------------------------- front, model, hypervolume


def test_the_front_is_sorted_by_the_first_objective_and_keeps_the_model_with_its_layout(
    going_on: Study, build_analysis: Callable[[Study], Any]
) -> None:
    rows = front_rows(going_on, build_analysis(going_on))
    losses = [row.estimates["validation_loss"].value for row in rows]
    assert losses == sorted(losses)
    assert len(rows) > 1
    places = {point.index: place for place, point in enumerate(going_on.result.front)}
    for row in rows:
        believed = row.estimates["rouge_l"]
        assert (believed.model_mean, believed.model_sd) == (places[row.trial], places[row.trial] + 0.5)
        # No objective of this search: shown, and known exactly.
        size = row.estimates["adapter_parameters"]
        assert (size.standard_error, size.model_mean) == (0.0, None)


def test_an_objective_that_not_every_trial_has_a_number_of_is_left_out_of_the_front(
    tmp_path: Path, study_events: MakeEvents, make_study_run: MakeRun
) -> None:
    events = study_events(10, is_finished=True)
    next(e for e in events if e["event"] == "trial_completed")["metrics"]["adapter_parameters"] = None
    rows = front_rows(load_study(make_study_run(tmp_path, events)))
    assert all(set(row.estimates) == {"validation_loss", "rouge_l"} for row in rows)


def test_standard_errors_are_those_between_layouts_on_the_same_users(going_on: Study) -> None:
    [row, *_] = front_rows(going_on)
    # The users differ by the same 0.1 under every layout: no doubt about which layout is better.
    assert row.estimates["validation_loss"].standard_error == pytest.approx(0.0, abs=1e-9)
    assert (row.estimates["rouge_l"].standard_error or 0.0) > 0.1
    assert row.estimates["rouge_l"].model_mean is None


def test_the_hypervolume_over_time_ends_where_that_over_trials_ends(going_on: Study) -> None:
    found = hypervolume_over_time(going_on)
    assert [seconds for seconds, _ in found] == [10, 10, 20, 20, 30, 30, 40, 40, 50, 50]
    assert found[-1][1] == going_on.result.hypervolume
    values = [value for _, value in found]
    assert values == sorted(values)


def test_too_few_trials_have_no_analysis_and_the_reason_says_how_many_it_takes(
    tmp_path: Path, study_events: MakeEvents, make_study_run: MakeRun
) -> None:
    study = load_study(make_study_run(tmp_path, study_events(MIN_TRIALS - 1)))
    with pytest.raises(
        NoAnalysis, match=f"{MIN_TRIALS - 1} trials have values.* from {MIN_TRIALS} of them on"
    ):
        analysis_of(study)


def test_the_model_is_asked_about_every_factor_and_the_front(
    tmp_path: Path, study_events: MakeEvents, make_study_run: MakeRun
) -> None:
    surrogate = {"inference": "map", "n_ensemble": 2}
    study = load_study(make_study_run(tmp_path, study_events(12), surrogate=surrogate))
    beliefs = analysis_of(study)
    n_front = len(study.result.front)
    assert beliefs.objectives == study.result.objectives
    assert beliefs.factors == ("layer 0", "layer 1", "layer 2", "layer 3", "n", "rank")
    for name in beliefs.objectives:
        for share, low, high in beliefs.importance[name].values():
            assert low <= share <= high
        share, low, high = beliefs.unexplained[name]
        assert 0.0 <= low <= share <= high <= 1.0
        assert len(beliefs.mean[name]) == len(beliefs.sd[name]) == n_front
        measured = [point.values[name] for point in study.result.front]
        spread = 6 * max(beliefs.sd[name]) + 1e-6
        assert beliefs.mean[name] == pytest.approx(measured, abs=spread)


def test_a_model_that_cannot_be_fitted_is_no_analysis(
    going_on: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def analyse(*_: Any) -> Any:
        torch.linalg.cholesky(-torch.eye(2))

    monkeypatch.setitem(sys.modules, "milp_ray.search.analysis", SimpleNamespace(analyse=analyse))
    with pytest.raises(NoAnalysis, match=r"could not be fitted \(_LinAlgError\)"):
        analysis_of(going_on)


def test_the_importance_of_layers_is_in_their_order(
    going_on: Study, build_analysis: Callable[[Study], Any]
) -> None:
    assert layer_importance(build_analysis(going_on), "rouge_l") == [0.1, 0.0, 0.8, 0.4]


# ----------------------------------------------------------------------------------------------- export


def test_the_table_has_a_row_a_trial_with_factors_values_and_times(going_on: Study) -> None:
    rows = export_rows(going_on)
    assert all(list(row) == list(EXPORT_COLUMNS) for row in rows)
    assert [row["status"] for row in rows[9:]] == ["completed", "stopped", "failed", "running", "waiting"]
    first, stopped, failed, running, waiting = rows[0], *rows[10:]
    assert (first["mask"], first["raw_layers"], first["raw_n_loras"], first["rank"]) == ("1000", "1000", 4, 8)
    assert (first["suggested"], first["ended"]) == (
        "2024-05-01T00:00:00.000+00:00",
        "2024-05-01T00:00:10.000+00:00",
    )
    assert (first["validation_loss"], first["seconds"], first["rung"]) == (pytest.approx(1.9), 8.0, None)
    assert (stopped["rung"], stopped["epoch"], stopped["seconds"]) == (0, 2, 4.0)
    assert stopped["validation_loss"] is None, "a value of partial training is no value"
    assert (failed["reason"], running["ended"], waiting["started"]) == ("training diverged", None, None)


def test_the_three_formats_hold_the_same_rows(tmp_path: Path, going_on: Study) -> None:
    import pyarrow.parquet as pq

    rows = export_rows(going_on)
    for suffix in ("csv", "json", "parquet"):
        write_export(rows, tmp_path / "made" / f"trials.{suffix}")
    assert json.loads((tmp_path / "made" / "trials.json").read_text("utf-8")) == rows
    assert pq.read_table(tmp_path / "made" / "trials.parquet").to_pylist() == rows
    with (tmp_path / "made" / "trials.csv").open(encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [row["index"] for row in read] == [str(index) for index in range(14)]
    assert float(read[3]["validation_loss"]) == rows[3]["validation_loss"]
    assert read[10]["validation_loss"] == ""
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
        "trials.csv",
        "trials.json",
        "trials.parquet",
    ]


@pytest.mark.parametrize("name", ["trials.xlsx", "trials"])
def test_a_name_of_no_known_format_is_refused(name: str) -> None:
    with pytest.raises(MilpError, match=r"ends in \.csv, \.parquet or \.json"):
        check_format(Path(name))


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path, finished: Study) -> None:
    (tmp_path / "file").write_text("")
    for suffix in ("csv", "parquet"):
        with pytest.raises(MilpError, match="cannot be written"):
            write_export(export_rows(finished), tmp_path / "file" / f"trials.{suffix}")
