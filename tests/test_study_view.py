"""``milp-ray study``: what it prints, for people and for programs, and how it fails."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from milp_ray.cli import app
from milp_ray.rundir import RunFolder
from milp_ray.search.insight import NoAnalysis, Study
from milp_ray.study_view import bar, print_front, print_importance, print_status, sparkline

MakeEvents = Callable[..., list[dict[str, Any]]]
Analyse = Callable[[Study], Any]


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def run(tmp_path: Path, study_events: MakeEvents, make_study_run: Callable[..., RunFolder]) -> RunFolder:
    return make_study_run(tmp_path, study_events())


def refuse(_: Study) -> Any:
    raise NoAnalysis("2 trials have values")


def lines_of(text: str) -> dict[str, str]:
    """First words of two columns: name → value."""
    return dict(re.findall(r"^ (\S.*?)  +(\S.*?) *$", text, flags=re.MULTILINE))


# ----------------------------------------------------------------------------------------------- status


def test_the_status_says_how_far_it_is_what_it_cost_and_when_it_last_moved(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    print_status(run, now=datetime(2024, 5, 1, 0, 2, 56, tzinfo=UTC))
    text = capsys.readouterr().out
    assert text.startswith("Search of study-run: 12 of 20 trials have ended")
    lines = lines_of(text)
    assert lines["trials"] == "10 completed, 1 stopped, 1 failed, 1 running, 1 waiting, 6 to be proposed"
    assert lines["time"] == "56 s"
    assert lines["cost"] == "1 min 24 s of trials: 84 CPU-seconds"
    assert lines["slots"] == "2: 0.0% idle while trials were to come, 75% of their time in trials"
    assert lines["left"].endswith("for 8 trials")
    assert lines["last event"].startswith("2 min 00 s ago")
    assert "validation loss" in text


def test_the_status_of_a_finished_study_says_why_it_finished(
    tmp_path: Path, study_events: MakeEvents, make_study_run: Callable[..., RunFolder]
) -> None:
    run = make_study_run(tmp_path, study_events(10, is_finished=True))
    text = call("study", "status", run.path).output
    assert text.startswith("Search of study-run: finished")
    assert lines_of(text)["finished"] == "all trials have ended"
    assert lines_of(text)["longest block"] == "0.050 s of Tune's controller"
    assert "left" not in lines_of(text)


def test_the_status_for_programs(run: RunFolder) -> None:
    found = json.loads(call("study", "status", run.path, "--json").output)
    assert found["run"] == "study-run"
    assert found["trials"] == {"completed": 10, "stopped": 1, "failed": 1, "running": 1, "waiting": 1}
    assert (found["n_ended"], found["n_to_come"], found["idle_share"]) == (12, 8, 0.0)
    assert found["best"]["validation_loss"]["trial"] == 6


# ------------------------------------------------------------------------------------ front and importance


def test_the_front_shows_the_model_below_what_was_measured(
    run: RunFolder, build_analysis: Analyse, capsys: pytest.CaptureFixture[str]
) -> None:
    print_front(run, analyse=build_analysis)
    text = capsys.readouterr().out
    assert re.search(r"^ +6 +###· +8 +1\.56 +25\.00 ± 0\.35 +300 *$", text, flags=re.MULTILINE), text
    assert "0.00 ± 0.50" in text
    assert "1.0 ± 1.5" in text
    assert "mean ± standard deviation" in text


def test_the_front_without_a_model_says_why(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    print_front(run, analyse=refuse)
    text = capsys.readouterr().out
    assert "without the model: 2 trials have values" in text
    assert "standard deviation" not in text


def test_the_front_for_programs(
    run: RunFolder, build_analysis: Analyse, capsys: pytest.CaptureFixture[str]
) -> None:
    print_front(run, as_json=True, analyse=build_analysis)
    found = json.loads(capsys.readouterr().out)
    assert found["no_model"] is None
    best = found["front"][0]
    assert (best["trial"], best["key"], best["layout"]["layers"]) == (6, "1110-r8", [0, 1, 2])
    assert set(best["objectives"]) == {"validation_loss", "rouge_l", "adapter_parameters"}
    assert set(best["objectives"]["rouge_l"]) == {"value", "standard_error", "model_mean", "model_sd"}
    print_front(run, as_json=True, analyse=refuse)
    assert json.loads(capsys.readouterr().out)["no_model"] == "2 trials have values"


def test_the_importance_is_a_row_a_factor_and_a_line_for_the_layers(
    run: RunFolder, build_analysis: Analyse, capsys: pytest.CaptureFixture[str]
) -> None:
    print_importance(run, analyse=build_analysis)
    text = capsys.readouterr().out
    rows = {line.split("  ")[0].strip(): line for line in text.splitlines() if "[" in line}
    names = ["layer 0", "layer 1", "layer 2", "layer 3", "number of LoRAs", "rank", "none of them"]
    assert list(rows) == names
    assert rows["none of them"].count("0.35 [0.25, 0.45]") == 2
    assert rows["layer 2"].count("0.80 [0.40, 0.90]") == 2
    assert rows["layer 2"].count("█") > 4 * rows["layer 0"].count("█")
    assert "  ▂▁█▅  validation loss" in text


def test_the_importance_for_programs(
    run: RunFolder, build_analysis: Analyse, capsys: pytest.CaptureFixture[str]
) -> None:
    print_importance(run, as_json=True, analyse=build_analysis)
    found = json.loads(capsys.readouterr().out)
    assert found["importance"]["rouge_l"]["layer 2"] == {"mean": 0.8, "low": 0.4, "high": 0.9}
    assert found["unexplained"]["rouge_l"] == {"mean": 0.35, "low": 0.25, "high": 0.45}
    assert found["layers"]["validation_loss"] == [0.1, 0.0, 0.8, 0.4]
    assert found["n_trials"] == 10


def test_the_importance_of_too_few_trials_is_a_mistake_that_is_told(
    tmp_path: Path, study_events: MakeEvents, make_study_run: Callable[..., RunFolder]
) -> None:
    result = call("study", "importance", make_study_run(tmp_path, study_events(2)).path)
    assert result.exit_code == 2
    assert result.stderr.startswith("2 trials have values")
    assert result.stdout == ""


# ------------------------------------------------------------------------------------ export and mistakes


def test_the_export_is_where_it_was_asked_for(run: RunFolder, tmp_path: Path) -> None:
    to = tmp_path / "trials.csv"
    assert call("study", "export", run.path, "--to", to).output == f"14 trials: {to}\n"
    assert len(to.read_text("utf-8").splitlines()) == 15


def test_a_configuration_means_its_run_and_nothing_is_made(run: RunFolder, tmp_path: Path) -> None:
    assert call("study", "status", run.config_file).output == call("study", "status", run.path).output
    other = tmp_path / "other.yaml"
    other.write_text(f"name: other\noutput_dir: {tmp_path / 'runs'}", encoding="utf-8")
    result = call("study", "status", other)
    assert (result.exit_code, "there is no such run folder" in result.stderr) == (2, True)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["status", "front", "importance", "export"])
def test_a_run_without_a_study_is_a_mistake_that_is_told(
    command: str, tmp_path: Path, make_study_run: Callable[..., RunFolder]
) -> None:
    run = make_study_run(tmp_path, [])
    more = ["--to", str(tmp_path / "x.csv")] if command == "export" else []
    result = call("study", command, run.path, *more)
    assert result.exit_code == 2
    assert "holds no study: run `milp-ray search` first" in result.stderr
    assert not (tmp_path / "x.csv").exists()


def test_looking_at_a_study_needs_neither_ray_nor_torch(run: RunFolder) -> None:
    code = (
        "import sys\nfrom milp_ray.cli import app\n"
        f"app(['study', 'status', {str(run.path)!r}], standalone_mode=False)\n"
        "print([m for m in ('ray', 'torch', 'ax', 'matplotlib', 'pyarrow') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines()[-1] == "[]"


# ---------------------------------------------------------------------------------------- bars and blocks


@given(st.floats(0, 1e6), st.floats(1e-3, 1e6))
def test_a_bar_has_one_width_and_shows_the_share_to_an_eighth_of_a_block(value: float, top: float) -> None:
    drawn = bar(value, top)
    assert len(drawn) == 12
    eighths = sum(" ▏▎▍▌▋▊▉█".index(block) for block in drawn)
    assert abs(eighths / 96 - min(value / top, 1.0)) <= 0.5 / 96 + 1e-9


def test_bars_and_blocks_show_shares_of_the_largest() -> None:
    assert bar(1.0, 2.0) == "██████      "
    assert bar(0.0, 2.0).strip() == ""
    assert sparkline([0.0, 0.5, 1.0, -0.1]) == "▁▅█▁"
    assert sparkline([0.0, 0.0]) == "▁▁"
    assert sparkline([]) == ""
