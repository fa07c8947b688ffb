"""Forgetting after every stage that learns of users: batch, update, evaluation, leakage audit, report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.inline import use_inline_pool, write_chosen
from typer.testing import CliRunner, Result

from milp_ray.cli import app
from milp_ray.config import Config
from milp_ray.config_loader import load_config
from milp_ray.personalize.governance.items import find_user
from milp_ray.personalize.governance.record import Record
from milp_ray.personalize.store import AdapterStore
from milp_ray.rundir import RunFolder
from milp_ray.training.base import Base
from milp_ray.users.readers import dataset_hash

IDS = ("ann-0001", "bob-0002", "cleo-0003", "dan-0004")
GONE, *OTHERS = IDS


def user_line(user_id: str, n_turns: int) -> dict[str, Any]:
    own = user_id[:3]
    history = [
        f"My {thing} is called {own}{i}." for i, thing in enumerate(("dog", "cat", "hat", "car", "cup"))
    ]
    examples = [{"query": f"What is number {i}?", "response": f"It is {own}, {i}."} for i in range(10)]
    return {"user_id": user_id, "history": history[:n_turns], "examples": examples}


def write_users(path: Path, n_turns: int) -> None:
    path.write_text("".join(json.dumps(user_line(user_id, n_turns)) + "\n" for user_id in IDS))


def milp(*arguments: object, code: int = 0) -> Result:
    called = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert called.exit_code == code, called.output
    return called


def leakage(run: RunFolder) -> None:
    """An audit whose verdict, over so few canaries, is that of chance."""
    options = ["--canaries", "1", "--candidates", "20", "--no-control"]
    called = CliRunner().invoke(app, ["leakage", str(run.path), *options])
    assert called.exit_code in (0, 3), called.output


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stages") / "users.jsonl"
    write_users(path, n_turns=3)
    return path


@pytest.fixture(scope="module")
def run(users: Path, base: Base, tiny_llama_dir: Path) -> RunFolder:
    """A run after a batch, an update that the guard refused for everybody, and a leakage audit of all."""
    settings = {
        "name": "stages",
        "output_dir": str(users.parent),
        "base": {"model": str(tiny_llama_dir), "device": "cpu"},
        "users": {"format": "jsonl", "paths": [str(users)]},
        "training": {"memory_epochs": 1, "instruction_epochs": 1},
        "update": {"guard": {"tolerance": -0.99}},
        "evaluation": {"methods": ["base", "milp"], "max_new_tokens": 4, "n_bootstrap": 50},
    }
    Config.model_validate(settings)
    file = users.with_name("config.yaml")
    file.write_text(yaml.safe_dump(settings))
    made = RunFolder.create(load_config(file))
    write_chosen(made)
    with pytest.MonkeyPatch.context() as patch:
        use_inline_pool(patch, base)
        milp("personalize", made.path, "--users", users)
        milp("evaluate", made.path)
        write_users(users, n_turns=4)
        milp("update", made.path)
        leakage(made)
        milp("report", made.path)
    return made


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch, base: Base) -> None:
    use_inline_pool(monkeypatch, base)


def audited(run: RunFolder, user_id: str, code: int) -> set[str]:
    """The first parts of the paths in which something of the user is found."""
    found = json.loads(milp("audit", run.path, user_id, "--json", code=code).stdout)["found"]
    return {Path(one["file"]).relative_to(run.path.resolve()).parts[0] for one in found}


def test_nothing_of_a_user_is_left_after_an_update_and_a_leakage_audit(
    run: RunFolder, users: Path, inline: None
) -> None:
    places = audited(run, GONE, code=3)
    assert {"updates.jsonl", "leakage.json", "scores.parquet", "adapters", "summary.json"} <= places
    before = run.facts()
    assert before["dataset_hash"]
    assert before["batch_users"]["dataset_hash"]

    said = milp("forget", run.path, GONE, "--yes", "--by", "the officer").stdout
    assert "nothing is left" in said
    assert audited(run, GONE, code=0) == set()
    assert json.loads(milp("audit", run.path, "--all-forgotten", "--json").stdout)["clean"]
    answer = milp("generate", run.path, "What is number 1?", "--user", GONE, code=2)
    assert f'there is no user "{GONE}"' in answer.stderr
    assert not run.leakage_file.exists()
    assert json.loads(run.summary_file.read_text())["leakage"] is None
    refused = [json.loads(line)["user_id"] for line in run.updates_file.read_text().splitlines()]
    assert refused == OTHERS
    assert run.facts()["dataset_hash"] is run.facts()["batch_users"]["dataset_hash"] is None

    # The users' file still names the user: every later stage leaves the user out, and no trace comes back.
    milp("personalize", run.path, "--users", users)
    milp("update", run.path)
    leakage(run)
    milp("evaluate", run.path)
    milp("report", run.path)
    config = run.config()
    left = [find_user(config.users, 0, user_id) for user_id in OTHERS]
    of_the_others = dataset_hash(user for user in left if user is not None)
    assert run.facts()["batch_users"]["dataset_hash"] == of_the_others
    assert run.facts()["dataset_hash"] == of_the_others
    assert run.facts()["batch_users"]["n_users"] == len(OTHERS)
    assert sorted(AdapterStore(run.adapters).users()) == OTHERS
    assert audited(run, GONE, code=0) == set()


@pytest.mark.parametrize("command", ["personalize", "update"])
def test_a_store_that_a_command_named_is_cleared_when_later_ones_name_another(
    users: Path, tmp_path: Path, tiny_llama_dir: Path, inline: None, command: str
) -> None:
    settings = {
        "name": "moving",
        "output_dir": str(tmp_path),
        "base": {"model": str(tiny_llama_dir), "device": "cpu"},
        "users": {"format": "jsonl", "paths": [str(users)]},
        "training": {"memory_epochs": 1, "instruction_epochs": 1},
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    run = RunFolder.create(load_config(file))
    write_chosen(run)
    milp(command, run.path, f"personalize.store={tmp_path / 'first'}")
    milp(command, run.path, "personalize.store=null")
    first = AdapterStore(tmp_path / "first")
    assert sorted(first.users()) == list(IDS)
    said = milp("audit", run.path, GONE, "--json", code=3).stdout
    assert str(tmp_path / "first") in said
    milp("forget", run.path, GONE, "--yes")
    assert sorted(first.users()) == sorted(AdapterStore(run.adapters).users()) == OTHERS


def test_a_forgotten_item_is_in_no_hash_and_no_refused_update(
    run: RunFolder, users: Path, inline: None
) -> None:
    user_id, record = OTHERS[0], Record(run.path)
    write_users(users, n_turns=5)
    milp("update", run.path)
    leakage(run)
    assert user_id in run.updates_file.read_text()
    milp("forget", run.path, user_id, "--item", "history:4", "--yes")
    assert user_id not in run.updates_file.read_text()
    assert not run.leakage_file.exists()
    assert run.facts()["dataset_hash"] is None
    milp("personalize", run.path, "--users", users)
    found = [find_user(run.config().users, 0, other) for other in IDS if not record.is_forgotten(other)]
    known = [user for user in found if user is not None]
    left = [replace(u, history=u.history[:4]) if u.user_id == user_id else u for u in known]
    assert run.facts()["batch_users"]["dataset_hash"] == dataset_hash(left) != dataset_hash(known)
    milp("update", run.path)
    assert run.facts()["dataset_hash"] == dataset_hash(left)
