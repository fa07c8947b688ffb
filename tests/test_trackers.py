"""TensorBoard and MLflow get a run's numbers; neither holds a run up."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboardX.proto import event_pb2

from milp_ray.config import Config
from milp_ray.config.tracking import TrackingSection
from milp_ray.config_loader import override_config
from milp_ray.errors import MilpError
from milp_ray.gauges import Gauges, read_gauges
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.rundir import RunFolder
from milp_ray.search.journal import TrialRecord
from milp_ray.trackers import MLflow, opened_trackers

TRIAL = TrialRecord(
    index=3,
    batch=1,
    raw={},
    layout=CanonicalLayout((True, False, True), 8),
    generator="sobol",
    status="completed",
    metrics={"validation_loss": 0.5, "peak_gpu_mib": None, "per_user": {"validation_loss": [0.5]}},
)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(Config(name="r", output_dir=tmp_path))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return f"file:{tmp_path / 'mlflow'}"


def events(run: RunFolder) -> Iterator[tuple[str, int, float]]:
    """(name, step, value) of every scalar in a run's event files: length, its check, data, its check."""
    for path in sorted(run.tensorboard.iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                yield value.tag, event.step, value.simple_value


def work(run: RunFolder, section: TrackingSection) -> None:
    with opened_trackers(section, run) as trackers, Gauges(run, trackers) as gauges:
        gauges.set(1, trials_finished=1, hypervolume=0.25)
        gauges.set(2, trials_finished=2)
        gauges.log_trial(TRIAL)


def test_tensorboard_is_the_default_and_has_gauges_and_trials(run: RunFolder) -> None:
    work(run, TrackingSection())
    found = set(events(run))
    assert ("trials_finished", 1, 1.0) in found
    assert ("trials_finished", 2, 2.0) in found  # the last value is written at the end
    assert {(name, value) for name, step, value in found if step == 3} == {
        ("trial/validation_loss", 0.5),
        ("trial/rank", 8.0),
        ("trial/n_loras", 2.0),
    }
    assert read_gauges(run) == {"trials_finished": 2.0, "hypervolume": 0.25}


def test_a_command_without_numbers_leaves_no_event_file(run: RunFolder) -> None:
    with opened_trackers(TrackingSection(), run) as trackers, Gauges(run, trackers):
        pass
    assert not run.tensorboard.exists()
    assert not run.gauges_file.exists()


def test_mlflow_has_one_run_for_all_commands_on_a_run_folder(run: RunFolder, store: str) -> None:
    from mlflow import MlflowClient

    section = TrackingSection(tensorboard=False, mlflow=store, mlflow_experiment="people")
    work(run, section)
    work(run, section)
    client = MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name("people")
    assert experiment is not None
    [found] = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("r", "FINISHED")
    assert found.info.run_id == json.loads(run.mlflow_file.read_text())["run_id"]
    assert found.data.metrics["trials_finished"] == 2.0
    assert found.data.metrics["trial/validation_loss"] == 0.5
    assert not run.tensorboard.exists()


def test_a_server_that_does_not_answer_is_an_error_before_any_work(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with (
        pytest.raises(MilpError, match=r"MLflow at tracking.mlflow=http://127.0.0.1:9 cannot be used"),
        opened_trackers(TrackingSection(mlflow="http://127.0.0.1:9"), run),
    ):
        pass


def test_a_password_is_neither_taken_in_the_uri_nor_told(
    run: RunFolder, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for uri in ("http://ann:hunter2@127.0.0.1:9", "http://hunter2@127.0.0.1:9"):
        with pytest.raises(MilpError, match="MLFLOW_TRACKING_PASSWORD") as refused:
            override_config(Config(name="r"), [f"tracking.mlflow={uri}"])
        assert "hunter2" not in str(refused.value)

    def away(*args: object) -> None:
        raise ConnectionError("GET with Authorization: Basic hunter2")

    monkeypatch.setattr(MLflow, "_opened", away)
    with pytest.raises(MilpError, match=r"cannot be used \(ConnectionError\)") as lost:
        MLflow(run, store, "people")
    assert "hunter2" not in str(lost.value)


def test_an_mlflow_that_is_lost_costs_a_warning_and_not_the_run(
    run: RunFolder, store: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def away(*args: object, **more: object) -> None:
        asked.append(args)
        raise ConnectionError("away")

    with caplog.at_level(logging.WARNING, logger="milp_ray"):
        tracker = MLflow(run, store, "people")
        monkeypatch.setattr(tracker._client, "log_batch", away)
        tracker.log({"a": 1.0}, 0)
        tracker.log({"a": 2.0}, 1)
        tracker.close()
    assert len(asked) == 1
    assert [r.getMessage() for r in caplog.records] == [
        "MLflow is lost (ConnectionError): the run goes on without it"
    ]


def test_event_files_that_cannot_be_written_cost_a_warning_and_hold_nothing_up(
    run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    run.tensorboard.write_text("in the way", encoding="utf-8")
    with (
        caplog.at_level(logging.WARNING, logger="milp_ray"),
        opened_trackers(TrackingSection(), run) as [tracker],
    ):
        for step in range(100):
            tracker.log({"a": 1.0}, step)
    assert [r.getMessage() for r in caplog.records] == [
        "TensorBoard is lost (FileExistsError): the run goes on without it"
    ]
