"""The commands that make a run: what they take, and their exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from milp_ray.cli import app


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(("n_failed", "code"), [(0, 0), (2, 3)])
def test_a_batch_in_which_some_failed_has_an_exit_code_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, n_failed: int, code: int
) -> None:
    from milp_ray.personalize.tally import BatchSummary
    from milp_ray.pipeline import stages

    seen: list[list[str]] = []

    def batch(run: object, config: object, users: list[str]) -> BatchSummary:
        seen.append(users)
        return BatchSummary(failed=n_failed)

    monkeypatch.setattr(stages, "personalize", batch)
    config = tmp_path / "c.yaml"
    config.write_text(f"name: a\noutput_dir: {tmp_path / 'runs'}", encoding="utf-8")
    assert call("personalize", config, "--users", "s3://b/u", "--users", "more.jsonl").exit_code == code
    assert seen == [["s3://b/u", "more.jsonl"]]


def test_a_stage_takes_a_run_folder_or_the_configuration_that_it_is_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from milp_ray.pipeline import stages

    seen: list[tuple[Path, str]] = []
    monkeypatch.setattr(stages, "choose", lambda run, config: seen.append((run.path, config.choice.rule)))
    config = tmp_path / "c.yaml"
    config.write_text(f"name: a\noutput_dir: {tmp_path / 'runs'}", encoding="utf-8")
    folder = tmp_path / "runs" / "a"
    assert call("choose", config).exit_code == 0
    assert call("choose", folder, "choice.rule=best_loss").exit_code == 0
    assert call("choose", folder).exit_code == 0, "the override is recorded in the run"
    assert seen == [(folder, "knee"), (folder, "best_loss"), (folder, "best_loss")]
    moved = folder.rename(tmp_path / "elsewhere")
    assert call("choose", moved).exit_code == 0
    assert seen[-1][0] == moved
    assert not folder.exists()
