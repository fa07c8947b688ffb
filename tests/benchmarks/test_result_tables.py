"""What experiments write: tables that say what was measured, and failures that say why."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import forgetting
import pytest
import result_files
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


def test_an_interruption_lets_the_command_end_in_good_order(tmp_path: Path) -> None:
    child = """
import pathlib, signal, sys, time
def end(*_):
    time.sleep(1)
    pathlib.Path(sys.argv[1]).touch()
    sys.exit()
signal.signal(signal.SIGINT, end)
pathlib.Path(sys.argv[2]).touch()
time.sleep(60)
"""
    ended, began = tmp_path / "ended", tmp_path / "began"
    command = ["-c", child, str(ended), str(began)]
    parent = f"import sys; from commands import output_of; output_of([sys.executable, *{command!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", parent],
        env={**os.environ, "PYTHONPATH": str(Path(result_files.__file__).parent)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not began.exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=30)
    assert said == "interrupted; the same command goes on\n"
    assert ended.exists()


def test_results_of_other_settings_are_not_written_into_the_repository(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/table1_datasets.py", "--scale", "demo"])
    assert result_files.results_of("table1") == result_files.RESULTS / "table1"
    assert result_files.invocation() == "`experiments/table1_datasets.py`"
    monkeypatch.setattr("sys.argv", ["table1_datasets.py", "seed=3"])
    assert result_files.results_of("table1") == Path("runs/results/table1")


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
    assert (tmp_path / "figure.png").stat().st_size > 5_000
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


def test_table_3_judges_every_seeds_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    asked: list[tuple[str, ...]] = []

    def run_of_seed(scale: str, seed: int, overrides: list[str]) -> SimpleNamespace:
        assert (scale, overrides) == ("demo", ["search.n_trials=3"])
        file = tmp_path / f"{seed}.parquet"
        names = {"method": "milp", "against": "text_prompt", "judge": "embedded"}
        row = {"user_id": f"u{seed}", "example": 0, "score": 1.0, "choice": 1, **names}
        write_judgements(file, [row])
        return SimpleNamespace(place=f"runs/{seed}", judgements_file=file)

    def command(*arguments: str) -> str:
        asked.append(arguments)
        return ""

    monkeypatch.setattr(table3_winrate, "run_of_seed", run_of_seed)
    monkeypatch.setattr(table3_winrate, "milp_ray", command)
    arguments = ["--seeds", "2", "--results", str(tmp_path / "results"), "search.n_trials=3"]
    found = run_script(table3_winrate.main, arguments, monkeypatch, capsys)
    assert isinstance(found, list)
    assert found[0]["n_users"] == 2
    n_kinds = len(table3_winrate.METHODS) * len(table3_winrate.JUDGES)
    assert len(asked) == len(set(asked)) == 2 * (n_kinds - 1), "one of them was judged before"
    assert ("winrate", "runs/1", "--judge", "embedded", "--method", "milp") not in asked
    assert ("winrate", "runs/1", "--judge", "embedded_free", "--method", "milp") in asked
    assert "100" in (tmp_path / "results" / "table.md").read_text(encoding="utf-8")


def test_forgetting_keeps_what_it_has_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    scripts: list[list[str]] = []

    def output_of(command: list[str]) -> str:
        scripts.append(command)
        rows = [
            {"way": way, "by_user": {state: [0.5, 1.0] for state in forgetting.STATES}}
            for way in ("old version", "everything again")
        ]
        return "a table\n" + json.dumps({"ways": rows})

    def command(*arguments: str) -> str:
        assert arguments == ("ability", "runs/0", "--json")
        spread = {"mean": 0.1, "low": 0.05, "high": 0.2}
        found = {"n_users": 3, "base_perplexity": 2.0, "perplexity": spread, "change": spread}
        return json.dumps({**found, "worst_change": 0.3})

    monkeypatch.setattr(forgetting, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(forgetting, "output_of", output_of)
    monkeypatch.setattr(forgetting, "milp_ray", command)
    monkeypatch.setattr(forgetting, "run_of_seed", lambda *_: SimpleNamespace(place="runs/0"))
    arguments = ["--seeds", "1", "--users", "2", "--results", str(tmp_path / "results")]
    for _ in range(2):
        run_script(forgetting.main, arguments, monkeypatch, capsys)
    assert len(scripts) == 1
    assert scripts[0][2:] == ["--users", "2", "--seed", "0"]
    table = (tmp_path / "results" / "table.md").read_text(encoding="utf-8")
    assert "| old version | 75 [50, 100] |" in table
    assert r"| seed 0 | 3 | 2.00 | 0.10 [0.05, 0.20] | +10.0 [+5.0, +20.0] \* | +30.0 |" in table
    with pytest.raises(SystemExit):
        run_script(forgetting.main, ["--scale", "paper"], monkeypatch, capsys)
    assert "--texts" in capsys.readouterr().err


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
