"""PLUM's experiment: what is kept is not done again, and what its table says is what was measured."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import plum_100_conversations
import plum_units
import pytest
from plum_100_conversations import TEST_SEED, do_all
from plum_questions import AGES, age_name, probes, users
from plum_results import COLUMNS, LABELS, table, write
from plum_units import PLUM, QUICK, RECIPE, Unit, do
from pretrain_yes_no import FIRST_DOCUMENT

from milp_ray.users.persona_world import PRETRAINING_FIRST
from milp_ray.users.persona_world.generator import POPULATION_FIRST

UNIT = Unit("bm25", 0, QUICK, TEST_SEED, "embedded")


def found(of_way: dict[str, list[list[float]]]) -> dict[str, list[list[dict[str, float]]]]:
    """Seeds × users of one value, which all measures have."""
    names = [*COLUMNS, *(age_name(*age) for age in AGES)]
    return {
        way: [[dict.fromkeys(names, value) for value in users] for users in runs]
        for way, runs in of_way.items()
    }


def changed_weights(folder: Path, content: bytes) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    return str(folder)


def test_another_setting_is_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {UNIT.path}
    for other in (
        replace(UNIT, size=replace(QUICK, n_users=2)),
        replace(UNIT, user_seed=TEST_SEED + 1),
    ):
        paths.add(other.path)
    for weights in (b"some", b"others"):
        paths.add(replace(UNIT, base=changed_weights(tmp_path / "base", weights)).path)
    code = tmp_path / "code.py"
    code.write_text("1")
    for name, value in (
        ("RECIPE", RECIPE.model_copy(update={"learning_rate": 0.5})),
        ("PLUM", PLUM.model_copy(update={"epochs": 99})),
        ("K", 7),
        ("CODE", [code]),
    ):
        monkeypatch.setattr(plum_units, name, value)
        paths.add(UNIT.path)
    code.write_text("2")
    paths.add(UNIT.path)
    assert len(paths) == 10
    assert len({path.name[: len("bm25-0-")] for path in paths}) == 1


def test_what_is_kept_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # the processes of units keep theirs below it
    do(UNIT)
    kept = UNIT.path.read_bytes()
    other = replace(UNIT, way="nothing")
    do_all([UNIT, other], n_processes=2)
    said = capsys.readouterr().out
    assert "1 of 2 units are kept" in said
    assert "2/2 units: nothing, seed 0" in said
    assert other.path.is_file()
    UNIT.path.unlink()
    do_all([UNIT, other], n_processes=1)
    assert "2/2 units: bm25, seed 0" in capsys.readouterr().out
    assert UNIT.path.read_bytes() == kept, "a run on CPUs gives the same values again"


def test_a_unit_that_fails_is_named_and_the_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    bad = replace(UNIT, base=str(tmp_path))
    with pytest.raises(SystemExit, match="bm25, seed 0 ended with 2"):
        do_all([bad], n_processes=2)
    said = capfd.readouterr().err
    assert "holds no config.json" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("options", [["--quick"], ["--development"], ["--users", "1"]])
def test_figures_that_are_no_results_are_not_written(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def do_nothing(units: list[Unit], n_processes: int) -> None:
        for unit in units:
            unit.path.parent.mkdir(parents=True, exist_ok=True)
            unit.path.write_text(json.dumps(found({unit.way: [[50.0]]})[unit.way][0]))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plum_100_conversations, "do_all", do_nothing)
    monkeypatch.setattr(plum_100_conversations, "RESULTS", tmp_path / "results")
    changed_weights(tmp_path / "runs", b"")
    changed_weights(tmp_path / "runs" / "yes_no_base", b"some")
    monkeypatch.setattr("sys.argv", ["plum_100_conversations.py", *options])
    plum_100_conversations.main()
    assert not (tmp_path / "results").exists()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bm25"]["both"] == 50.0


def test_without_the_base_it_says_how_to_make_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "yes_no_base").mkdir(parents=True)  # an unfinished one
    monkeypatch.setattr("sys.argv", ["plum_100_conversations.py"])
    with pytest.raises(SystemExit):
        plum_100_conversations.main()
    assert "make it with experiments/pretrain_yes_no.py" in capsys.readouterr().err


def test_no_training_has_read_what_general_ability_is_measured_on() -> None:
    # The lesson's own documents begin at twice this; it reads some thousands.
    assert PRETRAINING_FIRST + 2 * FIRST_DOCUMENT + 10**8 < POPULATION_FIRST


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
