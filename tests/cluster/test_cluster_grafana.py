"""The Grafana dashboard: every query names a metric that milp_ray exports, and every such metric is shown."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from milp_ray.gauges import DESCRIPTIONS

DASHBOARD = Path(__file__).resolve().parents[2] / "cluster" / "grafana" / "milp_ray.json"


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text("utf-8"))


def queries(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


def test_every_query_is_of_one_metric_of_the_chosen_runs(dashboard: dict[str, Any]) -> None:
    found = queries(dashboard)
    assert found
    for query in found:
        match = re.fullmatch(r'max by \(run\) \(ray_(\w+)\{run=~"\$run"\}\)', query)
        assert match, query
        assert match[1] in DESCRIPTIONS


def test_every_metric_is_shown(dashboard: dict[str, Any]) -> None:
    shown = {name for query in queries(dashboard) for name in re.findall(r"ray_(milp_\w+)", query)}
    assert shown == set(DESCRIPTIONS)


def test_panels_have_an_id_of_their_own_and_say_what_they_show(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(set(ids)) == len(ids)
    for panel in panels:
        assert panel["title"]
        if panel["type"] != "row":
            assert panel["description"].endswith(".")
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            letters = [target["refId"] for target in panel["targets"]]
            assert len(set(letters)) == len(letters)


def test_panels_lie_on_the_grid_and_do_not_overlap(dashboard: dict[str, Any]) -> None:
    boxes = [(panel["title"], panel["gridPos"]) for panel in dashboard["panels"]]
    for title, box in boxes:
        assert 0 <= box["x"] < box["x"] + box["w"] <= 24, title
        assert box["h"] > 0, title
    for (one, a), (other, b) in combinations(boxes, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        below = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or below, f"{one} and {other}"


def test_the_variables_are_the_data_source_and_the_run(dashboard: dict[str, Any]) -> None:
    variables = {each["name"]: each for each in dashboard["templating"]["list"]}
    assert set(variables) == {"datasource", "run"}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    asked = re.fullmatch(r'label_values\(\{__name__=~"(.+)"\}, run\)', variables["run"]["query"]["query"])
    assert asked
    assert all(re.fullmatch(asked[1], f"ray_{name}") for name in DESCRIPTIONS)
    names = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard)))
    assert names - {"__all"} == set(variables)
