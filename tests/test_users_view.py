"""`milp-ray users`: what it shows, and that one's own users' texts are never shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from milp_ray.cli import app


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_sample_is_the_same_for_the_same_seed_and_other_for_another() -> None:
    first = call("users", "sample", "-n", "2", "--seed", "3")
    assert first.exit_code == 0
    assert first.output == call("users", "sample", "-n", "2", "--seed", "3").output
    assert first.output != call("users", "sample", "-n", "2", "--seed", "4").output
    assert first.output.count("queries") >= 2


def test_a_long_sample_says_how_many_turns_are_left_out() -> None:
    assert "more" in call("users", "sample", "--long").output


@pytest.fixture
def configuration(tmp_path: Path) -> Path:
    users = tmp_path / "users.jsonl"
    examples = [{"query": f"Which {i}?", "response": f"The SECRET{i} one."} for i in range(10)]
    good = {"user_id": "u-1", "history": ["I like :100: SECRET things."], "examples": examples, "mood": "x"}
    users.write_text(json.dumps(good) + "\n{broken SECRET\n", encoding="utf-8")
    path = tmp_path / "c.yaml"
    path.write_text(f"name: a\nusers: {{format: jsonl, paths: [{users}]}}", encoding="utf-8")
    return path


def test_a_check_counts_splits_and_names_the_place_of_every_record_kept_out(configuration: Path) -> None:
    result = call("users", "check", configuration)
    assert result.exit_code == 0
    assert "1 users, 1 turns" in result.output
    assert "7 train, 1 validation, 2 test" in result.output
    assert "users.jsonl:2:" in result.output
    assert "mood (1×)" in result.output


def test_a_check_shows_no_text_of_a_user(configuration: Path) -> None:
    assert "SECRET" not in call("users", "check", configuration).output


def test_a_check_of_missing_files_says_which(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("name: a\nusers: {format: jsonl, paths: [nowhere.jsonl]}", encoding="utf-8")
    result = call("users", "check", path)
    assert result.exit_code == 2
    assert "nowhere.jsonl" in result.stderr


def test_a_check_reads_the_real_dialogues(shared_dir: Path, repository: Path) -> None:
    folder = shared_dir / "data" / "malp"
    paths = f"[{folder / 'dialogues_3_cleaned.json'}, {folder / 'dialogues2_cleaned.json'}]"
    config = repository / "experiments" / "meddia_tinystories.yaml"
    result = call("users", "check", config, f"users.paths={paths}", "users.limit=null")
    assert result.exit_code == 0
    n_users = int(result.output.split(" users")[0])
    assert n_users > 600
    assert "records are kept out" in result.output


def test_statistics_are_a_table_without_texts(configuration: Path) -> None:
    result = call("users", "stats", configuration)
    assert result.exit_code == 0
    lines = {line.split("  ")[0].strip(): line.split()[-1] for line in result.output.splitlines()}
    assert "Dataset: jsonl" in result.output
    assert (lines["training examples"], lines["validation examples"], lines["test examples"]) == tuple("712")
    assert "1 records are kept out" in result.output
    assert "SECRET" not in result.output


def test_statistics_for_programs_are_the_last_line(configuration: Path) -> None:
    result = call("users", "stats", configuration, "--json", "--tokens")
    facts = json.loads(result.output.splitlines()[-1])
    assert (facts["format"], facts["n_users"], facts["n_problems"]) == ("jsonl", 1, 1)
    assert (facts["n_train"], facts["n_validation"], facts["n_test"]) == (7, 1, 2)
    assert facts["kinds"] == {"example": 10}
    assert facts["lengths"]["words"]["query"] == {"mean": 2.0, "median": 2.0, "smallest": 2, "largest": 2}
    assert facts["lengths"]["tokens"]["query"]["mean"] > 2


def test_a_check_says_that_there_are_too_few_users_to_search_on(configuration: Path) -> None:
    assert "a search cannot begin" not in call("users", "check", configuration).output
    result = call("users", "check", configuration, "search.n_probe_users=99")
    assert "a search cannot begin: search.n_probe_users is 99, but 1 of 1 users" in result.output
