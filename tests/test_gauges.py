"""Gauges of a run: their names, and that a real Ray session exports them with the run's name alone."""

from __future__ import annotations

import json
import logging
import re
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import milp_ray.gauges as gauges_module
from milp_ray.errors import MilpError
from milp_ray.gauges import DESCRIPTIONS, Gauges, read_gauges
from milp_ray.rundir import RunFolder


def test_names_have_the_packages_prefix_and_descriptions_are_sentences() -> None:
    for name, description in DESCRIPTIONS.items():
        assert re.fullmatch(r"milp_[a-z_]+", name)
        assert description.endswith(".")
        assert description.isascii(), "Ray takes nothing else"


def test_the_readme_names_them_all() -> None:
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text("utf-8")
    [table] = re.findall(r"\| \| `milp_…` \|\n(.*?)\n\n", readme, re.DOTALL)
    assert {f"milp_{name}" for name in re.findall(r"`(\w+)`", table)} == set(DESCRIPTIONS)


def test_without_a_session_the_folder_alone_is_told_and_a_wrong_name_is_an_error(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert read_gauges(run) == {}
    with Gauges(run) as gauges:
        gauges.set(0, trials_running=1, users_finished=2, hypervolume=None)
        assert read_gauges(run) == {"trials_running": 1.0, "users_finished": 2.0}
        with pytest.raises(ValueError, match="no gauge milp_trails"):
            gauges.set(1, trails=1)


def test_a_later_command_keeps_what_still_holds(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with Gauges(run) as gauges:
        gauges.set(0, trials_running=2, trials_finished=5)
    with Gauges(run) as gauges:
        gauges.set(0, users_finished=1)
    assert read_gauges(run) == {"trials_finished": 5.0, "users_finished": 1.0}


@pytest.mark.parametrize("content", ["", "[]", '{"values": {"a": "b"}}', '{"values": 3}'])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    run = RunFolder(tmp_path)
    run.gauges_file.write_text(content)
    with pytest.raises(MilpError, match=r"gauges.json cannot be read"):
        read_gauges(run)


@pytest.mark.parametrize("content", ["", '{"values": 3}'])
def test_a_damaged_file_costs_its_numbers_and_not_the_run(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder(tmp_path)
    run.gauges_file.write_text(content)  # as a machine may leave it that lost its power
    with caplog.at_level(logging.WARNING, logger="milp_ray"), Gauges(run) as gauges:
        gauges.set(1, users_finished=1)
    assert [record.getMessage() for record in caplog.records] == [
        f"{run.gauges_file} was damaged: the numbers of earlier commands are lost"
    ]
    assert read_gauges(run) == {"users_finished": 1.0}


def test_the_last_values_are_forced_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(gauges_module, "sync_file", lambda path: synced.append(path.read_text()))
    with Gauges(RunFolder(tmp_path)):
        pass
    assert synced == []
    with Gauges(RunFolder(tmp_path)) as gauges:
        gauges.set(1, users_finished=1)
        gauges.set(2, users_finished=2)
    assert [json.loads(text)["values"] for text in synced] == [{"users_finished": 2.0}]


class Kept:
    """A tracker that keeps what it gets."""

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, float], int]] = []

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.logged.append((dict(values), step))

    def close(self) -> None:
        pass


def test_trackers_get_each_value_once_at_its_own_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    with Gauges(run) as gauges:
        gauges.set(9, hypervolume=0.5)
    tracker = Kept()
    with Gauges(run, [tracker]) as gauges:
        gauges.set(10, trials_finished=10, hypervolume=0.75)
        monkeypatch.setattr(gauges_module, "_SECONDS_BETWEEN_WRITES", 1e6)
        gauges.set(11, trials_finished=11)
        gauges.set(3, users_finished=3)
        gauges.set(12, trials_finished=12)
    assert tracker.logged == [
        ({"trials_finished": 10.0, "hypervolume": 0.75}, 10),
        ({"users_finished": 3.0}, 3),
        ({"trials_finished": 12.0}, 12),
    ]
    assert read_gauges(run)["hypervolume"] == 0.75


def exported(wanted: str) -> str:
    """The metrics page of this node, once it has what is wanted."""
    import ray

    [node] = [node for node in ray.nodes() if node["Alive"]]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 90
    page = ""
    while wanted not in page and time.monotonic() < deadline:
        with urllib.request.urlopen(url, timeout=10) as answer:
            page = answer.read().decode("utf-8")
        time.sleep(0.5)
    return page


@pytest.mark.ray
def test_ray_exports_them_with_the_runs_name(ray_local: Any, tmp_path: Path) -> None:
    gauges = Gauges(RunFolder(tmp_path / "my-run"))
    gauges.set(0, trials_running=3, hypervolume=0.25)
    gauges.set(1, trials_running=2)
    page = exported('run="my-run"')
    own = [line for line in page.splitlines() if 'run="my-run"' in line]
    [line] = [line for line in own if line.startswith("ray_milp_trials_running{")]
    assert float(line.rpartition(" ")[2]) == 2.0
    [other] = [line for line in own if line.startswith("ray_milp_hypervolume{")]
    assert float(other.rpartition(" ")[2]) == 0.25
