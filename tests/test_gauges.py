"""Gauges of a run: their names, and that a real Ray session exports them with the run's name alone."""

from __future__ import annotations

import re
import time
import urllib.request
from typing import Any

import pytest

from milp_ray.gauges import DESCRIPTIONS, Gauges


def test_names_have_the_packages_prefix_and_descriptions_are_sentences() -> None:
    for name, description in DESCRIPTIONS.items():
        assert re.fullmatch(r"milp_[a-z_]+", name)
        assert description.endswith(".")
        assert description.isascii(), "Ray takes nothing else"


def test_without_a_session_nothing_happens_and_a_wrong_name_is_an_error() -> None:
    gauges = Gauges("r")
    gauges.set(trials_running=1, hypervolume=None)
    with pytest.raises(ValueError, match="no gauge milp_trails"):
        gauges.set(trails=1)


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
def test_ray_exports_them_with_the_runs_name(ray_local: Any) -> None:
    gauges = Gauges("my-run")
    gauges.set(trials_running=3, hypervolume=0.25)
    gauges.set(trials_running=2)
    page = exported('run="my-run"')
    own = [line for line in page.splitlines() if 'run="my-run"' in line]
    [line] = [line for line in own if line.startswith("ray_milp_trials_running{")]
    assert float(line.rpartition(" ")[2]) == 2.0
    [other] = [line for line in own if line.startswith("ray_milp_hypervolume{")]
    assert float(other.rpartition(" ")[2]) == 0.25
