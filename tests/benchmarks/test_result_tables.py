"""What experiments write: tables that say what was measured, and failures that say why."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import forgetting
import pytest
import table1_datasets
import table3_winrate
import table7_parameters
from commands import milp_ray
from result_files import DRAWS, cell, markdown, write_csv

from milp_ray.evaluation.bootstrap import interval
from milp_ray.evaluation.judgements import read_judgements, write_judgements
from milp_ray.evaluation.win_rate import win_rates

Captured = pytest.CaptureFixture[str]


def test_a_difference_is_marked_where_its_interval_leaves_zero_out() -> None:
    assert cell(interval([0.2, 0.4], **DRAWS), 100.0, 0) == "30 [20, 40]"
    assert cell(interval([0.2, 0.4], **DRAWS), 100.0, 0, signed=True) == r"+30 [+20, +40] \*"
    assert cell(interval([-0.2, 0.4], **DRAWS), 100.0, 0, signed=True) == "+10 [-20, +40]"
    assert cell(interval([0.3], **DRAWS), 1.0, 1) == "0.3"
    assert cell(None, 1.0, 1) == "–"


def test_a_table_has_a_rule_below_its_header() -> None:
    assert markdown(["a", "b"], [["c", "1"]]) == "| a | b |\n|---|---:|\n| c | 1 |\n"


def test_values_are_written_whole(tmp_path: Path) -> None:
    write_csv(tmp_path / "new" / "values.csv", ["a", "b"], [["x, y", 1], ["z", 2]])
    with (tmp_path / "new" / "values.csv").open(encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [{"a": "x, y", "b": "1"}, {"a": "z", "b": "2"}]


def test_a_command_that_fails_says_why() -> None:
    with pytest.raises(SystemExit, match=r"users stats nowhere\.yaml ended with [12]:[\s\S]*nowhere\.yaml"):
        milp_ray("users", "stats", "nowhere.yaml")


def run_script(
    main: object, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> object:
    monkeypatch.setattr("sys.argv", ["script", *arguments])
    assert callable(main)
    main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_table_1_counts_what_the_command_counts(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    few = ["users.persona_world.n_short_users=2", "users.persona_world.n_long_users=1"]
    config = str(repository / "experiments" / "demo.yaml")
    arguments = ["--config", config, "--results", str(tmp_path), *few]
    found = run_script(table1_datasets.main, arguments, monkeypatch, capsys)
    assert isinstance(found, dict)
    assert found["demo"]["n_users"] == 3
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| users | 3 |" in table
    with (tmp_path / "values.csv").open(encoding="utf-8") as file:
        values = {(row["measure"], row["statistic"]): row["value"] for row in csv.DictReader(file)}
    assert float(values["tokens a turn", "mean"]) == found["demo"]["lengths"]["tokens"]["turn"]["mean"]


def test_table_7_is_that_of_the_papers_bases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    run_script(table7_parameters.main, ["--results", str(tmp_path)], monkeypatch, capsys)
    table = (tmp_path / "table7" / "table.md").read_text(encoding="utf-8")
    # 8 × (2 × (4,096 + 11,008) + 11,008 + 4,096) on each of 32 layers
    assert "| Llama-2-7b, all layers | 11.60 |" in table
    assert "| 50.38 |" in table
    assert (tmp_path / "figure3" / "figure.png").stat().st_size > 5_000
    with (tmp_path / "figure3" / "values.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert int(rows[-1]["prompted_bytes"]) > int(rows[0]["prompted_bytes"])
    assert rows[-1]["adapter_r8_bytes"] == rows[0]["adapter_r8_bytes"]


def test_table_3_has_a_row_a_method_and_judge(tmp_path: Path) -> None:
    choices = [("u0", 1), ("u0", 0), ("u1", 1), ("u1", 1)]
    rows = [
        {"user_id": user, "example": i, "method": "milp", "against": "text_prompt", "judge": judge}
        | {"score": float(choice), "choice": choice}
        for judge in table3_winrate.JUDGES
        for i, (user, choice) in enumerate(choices)
    ]
    write_judgements(tmp_path / "judgements.parquet", rows)
    found = win_rates(read_judgements(tmp_path / "judgements.parquet"), DRAWS)
    lines = table3_winrate.table(found).splitlines()
    assert len(lines) == 2 + len(table3_winrate.JUDGES)
    assert lines[2] == r"| MiLP | embedded | 2 | 75 [50, 100] | 25 [0, 50] | 0 | +75 [+50, +100] \* |"
    table3_winrate.draw(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5_000


def test_updates_are_compared_user_by_user(tmp_path: Path) -> None:
    def row(way: str, old: list[float]) -> dict[str, object]:
        return {"way": way, "by_user": {"old": old, "changed": [0.5] * 2, "new": [1.0] * 2}}

    seeds = [
        [row("updated", [0.1, 0.5]), row("everything again", [0.2, 0.6])],
        [row("updated", [0.3, 0.7]), row("everything again", [0.4, 0.8])],
    ]
    found = forgetting.by_way(seeds)
    assert found["updated"]["old"] == [0.1, 0.5, 0.3, 0.7]
    [_, _, updated, again] = forgetting.table(found, {"updated": 0.25, "everything again": None}).splitlines()
    assert updated.startswith("| updated | 40 [")
    # Every user lost a tenth: the interval over them has no width.
    assert r"| -10 \* |" in updated
    assert updated.endswith("| 25 |")
    assert again.endswith("|  |  |  |  |")
    forgetting.draw(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5_000
