"""``milp-ray winrate``: what it refuses, what it prints, and where its numbers go."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from support.inline import use_inline_pool, write_chosen
from support.judgements import DRAWS, PAIR, human, judgement, table
from typer.testing import CliRunner

from milp_ray import cli
from milp_ray.config import Config
from milp_ray.config.evaluation import EvaluationSection
from milp_ray.errors import MilpError
from milp_ray.evaluation.judgements import read_judgements
from milp_ray.evaluation.judges.embedded import ReferenceJudge
from milp_ray.evaluation.judging import WinRateOptions
from milp_ray.evaluation.win_rate import agreement, win_rates
from milp_ray.personalize.recipe import Recipe
from milp_ray.personalize.store import AdapterStore
from milp_ray.pipeline import quality
from milp_ray.pipeline.work import Work
from milp_ray.rundir import RunFolder
from milp_ray.users.records import UserSplit


def test_a_sheet_does_not_go_into_the_run_folder(tmp_path: Path) -> None:
    options = WinRateOptions(ReferenceJudge, sheet=tmp_path / "run" / "sub" / "sheet.csv")
    with pytest.raises(MilpError, match="run folder"):
        options.check_sheet(tmp_path / "run")
    WinRateOptions(ReferenceJudge, sheet=tmp_path / "sheet.csv").check_sheet(tmp_path / "run")


def test_a_sheet_in_a_folder_that_is_not_there_is_refused_before_anything_is_judged(tmp_path: Path) -> None:
    options = WinRateOptions(ReferenceJudge, sheet=tmp_path / "none" / "sheet.csv")
    with pytest.raises(MilpError, match="no folder"):
        options.check_sheet(tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--judge", "reward_model"], "--model"),
        (["--judge", "openai", "--model", "m"], "--base-url"),
        (["--model", "m"], "none of"),
        (
            ["--judge", "openai", "--model", "m", "--base-url", "http://localhost/v1", "--margin", "1"],
            "margin",
        ),
        (["--against", "milp"], "two different"),
        (["--method", "magic"], "use one of"),
    ],
)
def test_options_that_do_not_fit_are_told_before_anything_is_done(
    tmp_path: Path, arguments: list[str], words: str
) -> None:
    done = CliRunner().invoke(cli.app, ["winrate", str(tmp_path), *arguments])
    assert done.exit_code == 2
    assert words in done.output


def test_the_command_prints_a_table_or_one_json_object(
    tmp_path: Path, make_study_run: Any, study_events: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_study_run(tmp_path, study_events())
    [rate] = win_rates(table([judgement("a", 0, 1), judgement("b", 0, 0)]), DRAWS)
    matched = agreement(table([judgement("a", 0, 1)]), [human("a", 0, 1)], DRAWS)[0]
    asked: list[WinRateOptions] = []

    def answer(run: Any, config: Any, options: WinRateOptions, quiet: bool) -> dict[str, Any]:
        asked.append(options)
        extras = {"confidence": 0.95, "n_unclear": 2, "n_failed": 1, "n_inapplicable": 0}
        return {**rate, **extras, "failed_reasons": {"no adapter": 1}, "agreement": matched}

    monkeypatch.setattr(quality, "win_rate", answer)
    done = CliRunner().invoke(cli.app, ["winrate", str(run.path), "--users", "5", "--margin", "2"])
    assert done.exit_code == 3  # a user failed
    for words in ("MiLP against text prompt", "50 [0, 100]", "does not tell", "accuracy 1.00", "2 replies"):
        assert words in done.output
    assert (asked[0].n_users, asked[0].judge().margin) == (5, 2.0)
    done = CliRunner().invoke(cli.app, ["winrate", str(run.path), "--json"])
    assert json.loads(done.output)["wins"]["mean"] == 0.5


def test_the_command_judges_a_run_compares_it_with_people_and_the_report_has_it(
    tmp_path: Path,
    recipe: Recipe,
    base: Any,
    store: AdapterStore,
    splits: list[UserSplit],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from milp_ray.report.content import read_content, summary_of

    section = EvaluationSection(max_new_tokens=4, n_bootstrap=50)
    run = RunFolder.create(Config(name="judged", output_dir=tmp_path, base=recipe.base, evaluation=section))
    write_chosen(run)
    use_inline_pool(monkeypatch, base)
    monkeypatch.setattr(Work, "splits", splits)
    monkeypatch.setattr("milp_ray.personalize.store.run_store", lambda *_: store)
    sheet = tmp_path / "sheet.csv"
    arguments = ["winrate", str(run.path), "--judge", "embedded_free"]
    done = CliRunner().invoke(cli.app, [*arguments, "--sheet", str(sheet)])
    assert done.exit_code == 0, done.output
    assert "remove it afterwards" in done.output
    choices = {
        (row["user_id"], row["example"]): ("tie", "first", "second")[row["choice"]]
        for row in read_judgements(run.judgements_file).to_pylist()
    }
    filled = tmp_path / "filled.csv"
    with sheet.open(newline="") as file, filled.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["user_id", "example", "first", "second", "choice"])
        for row in csv.DictReader(file):
            choice = choices[row["user_id"], int(row["example"])]
            writer.writerow([row["user_id"], row["example"], *PAIR, choice])
    done = CliRunner().invoke(cli.app, [*arguments, "--human", str(filled), "--json"])
    found = json.loads(done.stdout)
    assert (found["n_users"], found["judge"], found["n_failed"]) == (3, "embedded_free", 0)
    assert (found["agreement"]["n_matched"], found["agreement"]["accuracy"]["mean"]) == (6, 1.0)
    [reported] = summary_of(read_content(run))["win_rates"]
    assert reported["net"] == found["net"]
    done = CliRunner().invoke(cli.app, [*arguments, "--users", "1", "--json"])
    assert json.loads(done.stdout)["n_users"] == 1, "what an earlier call judged is not this one's result"
