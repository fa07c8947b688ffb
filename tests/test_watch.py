"""Watching a run: what its folder tells, how it looks, and how it comes from far away."""

from __future__ import annotations

import json
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from milp_ray.cli import app
from milp_ray.config import Config
from milp_ray.errors import MilpError
from milp_ray.gauges import Gauges
from milp_ray.run_status import RunStatus, State, recorded
from milp_ray.rundir import RunFolder
from milp_ray.watch import Lines, Snapshot, snapshot, snapshots
from milp_ray.watch_view import trend, view

STARTED, LATER = "2026-01-01T10:00:00Z", "2026-01-01T10:03:05Z"
SEARCHING = {
    "trials_planned": 24,
    "trials_finished": 14,
    "trials_running": 2,
    "trials_stopped_early": 3,
    "idle_slots": 1,
    "suggestion_seconds": 1.25,
    "hypervolume": 0.3175,
    "best_validation_loss": 0.512,
    "best_rouge_l": 61.25,
}
IN_BATCH = {
    "users_expected": 1200,
    "users_finished": 31,
    "users_failed": 2,
    "users_per_minute": 77.4,
    "tokens_per_second": 5120,
    "worker_memory_mib": 812,
}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(Config(name="r", output_dir=tmp_path))


def status(state: State = "running", stage: str | None = "search", reason: str | None = None) -> RunStatus:
    return RunStatus(state, "run", stage, reason, None, "node-1", 7, STARTED, LATER)


def shown(now: Snapshot, hypervolumes: list[float] | None = None) -> str:
    console = Console(width=120, emoji=False, highlight=False)
    with console.capture() as capture:
        console.print(view(now, hypervolumes or [], datetime.fromisoformat(LATER)))
    return " ".join(capture.get().split())


def test_a_search_shows_its_trials_its_front_and_what_waits() -> None:
    text = shown(Snapshot("mine", status(), SEARCHING), [0.1, 0.2, 0.3175])
    assert "mine running in search, 3 min 05 s, run on node-1" in text
    assert "14/24" in text
    assert "2 running, 3 stopped early, 1 slots idle, layouts proposed in 1.2 s" in text
    assert "hypervolume 0.3175 ▁▄█" in text
    assert "best validation loss 0.512, best ROUGE-L 61.25" in text
    assert "users" not in text


def test_a_batch_shows_its_users_pace_and_memory() -> None:
    text = shown(Snapshot("mine", status(stage="personalize"), {**IN_BATCH, "gpu_memory_mib": 30000}))
    assert "31/1,200" in text
    assert "2 failed, 77.4 a minute, 5,120 tokens/s, 812 MiB a worker, 30,000 MiB a GPU" in text
    assert "trials" not in text


def test_a_run_that_failed_says_why() -> None:
    assert "no such base" in shown(Snapshot("mine", status("failed", None, "no such base"), {}))


def test_a_trend_runs_from_the_lowest_to_the_highest() -> None:
    assert trend([1.0]) == ""
    assert trend([2.0, 2.0]) == "▁▁"
    assert trend([0.0, 1.0]) == "▁█"


def test_snapshots_come_until_the_command_has_ended(run: RunFolder) -> None:
    found = []

    def look() -> None:
        for now in snapshots(run, 0.02):
            found.append(now)

    with run.lock(), recorded(run, "run") as recorder, Gauges(run) as gauges:
        recorder.stage("search")
        gauges.set(1, trials_finished=1)
        watcher = threading.Thread(target=look)
        watcher.start()
        deadline = time.monotonic() + 30
        while not found and time.monotonic() < deadline:
            time.sleep(0.01)
        gauges.set(2, trials_finished=2)
    watcher.join(30)
    assert not watcher.is_alive()
    assert (found[0].status.state, found[0].gauges) == ("running", {"trials_finished": 1.0})
    assert (found[-1].status.state, found[-1].gauges) == ("succeeded", {"trials_finished": 2.0})


def test_a_snapshot_survives_json_and_a_stream_in_pieces(run: RunFolder) -> None:
    with run.lock(), recorded(run, "run"), Gauges(run) as gauges:
        gauges.set(1, hypervolume=0.5)
    now = snapshot(run)
    line = json.dumps(now.to_dict())
    found: list[Snapshot] = []
    lines = Lines(found.append)
    output = f"(pid=7) a remark\n{line}\n\n{line}\n"
    for start in range(0, len(output), 7):
        lines.write(output[start : start + 7])
    assert found == [now, now]
    assert lines.last_remark == "(pid=7) a remark"


def test_a_folder_that_no_command_worked_on_is_an_error(run: RunFolder) -> None:
    with pytest.raises(MilpError, match="no command was recorded"):
        snapshot(run)


@pytest.mark.parametrize(("error", "code"), [(None, 0), (MilpError("no such base"), 1)])
def test_the_command_prints_what_is_new_and_tells_how_the_run_ended(
    run: RunFolder, error: MilpError | None, code: int
) -> None:
    try:
        with run.lock(), recorded(run, "run"), Gauges(run) as gauges:
            gauges.set(1, users_finished=3, users_expected=4)
            if error is not None:
                raise error
    except MilpError:
        pass
    called = CliRunner().invoke(app, ["watch", str(run.path), "--every", "0.1"])
    assert called.exit_code == code, called.output
    assert "3/4" in called.output
    told = CliRunner().invoke(app, ["watch", str(run.path), "--json"])
    assert told.exit_code == code
    [line] = told.stdout.splitlines()
    assert json.loads(line)["gauges"] == {"users_expected": 4.0, "users_finished": 3.0}
