"""PLUM's experiment: what is kept is not done again, and what its table says is what was measured."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import plum_100_conversations as plum
import pytest
from plum_100_conversations import QUICK, TEST_SEED, Unit
from plum_questions import probes, users
from plum_results import AGES, COLUMNS, LABELS, age_name, table, write

UNIT = Unit("bm25", 0, QUICK, TEST_SEED, "embedded")


def found(of_way: dict[str, list[list[float]]]) -> dict[str, list[list[dict[str, float]]]]:
    """Seeds × users of one value, which all measures have."""
    names = [*COLUMNS, *(age_name(*age) for age in AGES)]
    return {
        way: [[dict.fromkeys(names, value) for value in users] for users in runs]
        for way, runs in of_way.items()
    }


def test_another_setting_is_kept_apart() -> None:
    other = [
        replace(UNIT, seed=1),
        replace(UNIT, way="plum"),
        replace(UNIT, size=replace(QUICK, n_users=2)),
        replace(UNIT, base="runs/nowhere"),
    ]
    assert len({one.path for one in [UNIT, *other]}) == 5
    assert replace(UNIT).path == UNIT.path


def test_what_is_kept_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plum, "KEPT", tmp_path)
    plum.do(UNIT)
    written = UNIT.path.read_bytes()
    plum.do_all([UNIT], n_processes=2)
    assert "1 of 1 units are kept" in capsys.readouterr().out
    UNIT.path.unlink()
    plum.do(UNIT)
    assert UNIT.path.read_bytes() == written, "a run on CPUs gives the same values again"


def test_every_thing_said_is_asked_beside_one_that_was_not() -> None:
    [split] = users(TEST_SEED, 1, 60)
    asked = probes(split, seed=3)
    assert asked == probes(split, seed=3) != probes(split, seed=4)
    assert sum(one.is_said for one in asked) * 2 == len(asked) > 20
    assert len({one.question for one in asked if not one.is_said}) == len(asked) / 2
    assert all(1 <= one.age <= 30 for one in asked)


def test_table_and_values(tmp_path: Path) -> None:
    scores = {way: [[50.0, 60.0], [50.0, 60.0]] for way in LABELS}
    scores["plum_earlier"] = [[60.0, 68.0], [56.0, 68.0]]  # means over seeds: 58 and 68, eight points ahead
    scores["plum"] = [[math.nan, math.nan]] * 2
    text = table(found(scores))
    rows = {line.split("|")[1].strip(): line for line in text.splitlines()}
    assert rows[LABELS["plum_earlier"]].count("63.0 [58.0, 68.0]") == 4
    assert rows[LABELS["plum_earlier"]].endswith(r"| +63.0 [+58.0, +68.0] \* | +8.0 \* |")
    assert rows[LABELS["plum"]].count("–") == len(COLUMNS) + 1
    write(tmp_path / "results", text, found(scores))
    assert text in (tmp_path / "results" / "table.md").read_text(encoding="utf-8")
    with (tmp_path / "results" / "values.csv").open(encoding="utf-8") as file:
        values = list(csv.DictReader(file))
    assert len(values) == len(LABELS) * 2 * 2 * (len(COLUMNS) + len(AGES))
    assert {one["value"] for one in values if one["way"] == "plum"} == {""}
    assert (tmp_path / "results" / "figure.png").stat().st_size > 5_000
