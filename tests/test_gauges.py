"""Gauges of a run: their names, and that a real Ray session exports them with the run's name alone."""

from __future__ import annotations

import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

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
