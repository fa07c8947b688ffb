"""``milp-ray update`` on a run whose users have nothing new: no Ray, no base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from milp_ray.cli import app
from milp_ray.config_loader import load_config
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.personalize.recipe import Recipe, fingerprint
from milp_ray.personalize.store import AdapterStore
from milp_ray.rundir import RunFolder
from milp_ray.training.adapters import Adapter
from milp_ray.users.readers import read_users
from milp_ray.users.splits import split_user

LAYOUT = CanonicalLayout((False, True, False, True), rank=4)


@pytest.fixture
def run(tmp_path: Path, tiny_llama_dir: Path) -> RunFolder:
    """A run of one user, whose stored adapter is up to date."""
    users = tmp_path / "users.jsonl"
    examples = [{"query": f"Question {i}?", "response": f"Answer {i}."} for i in range(10)]
    users.write_text(json.dumps({"user_id": "u-1", "history": ["I sing."], "examples": examples}))
    settings = {
        "name": "tiny",
        "output_dir": str(tmp_path),
        "base": {"model": str(tiny_llama_dir), "device": "cpu"},
        "users": {"format": "jsonl", "paths": [str(users)]},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    config = load_config(tmp_path / "config.yaml")
    found = RunFolder.create(config)
    found.chosen_file.write_text(yaml.safe_dump({"layout": LAYOUT.to_dict()}))
    recipe = Recipe(LAYOUT, config.base, config.training, config.prompt, config.seed)
    [user] = read_users(config.users, config.seed).users
    split = split_user(user, config.users.split)
    adapter = Adapter({"r": 4, "lora_alpha": 8}, {"weights": torch.zeros(1)}, LAYOUT)
    store = AdapterStore(found.adapters)
    store.publish("u-1", adapter, {"steps": 1}, fingerprint=fingerprint(recipe.digest(), split))
    return found


@pytest.fixture
def call(run: RunFolder) -> Callable[..., Result]:
    return lambda *arguments: CliRunner().invoke(app, ["update", str(run.path), *arguments])


def test_the_outcomes_are_a_table_or_json_and_stay_in_the_run(
    run: RunFolder, call: Callable[..., Result]
) -> None:
    shown = call()
    assert shown.exit_code == 0, shown.output
    assert "unchanged" in shown.stdout
    counts = json.loads(call("--json", "update.data=new", "--user", "u-1").stdout)
    assert (counts["n_users"], counts["unchanged"], counts["updated"]) == (1, 1, 0)
    assert json.loads(run.versions_file.read_text())["update"] == counts
    assert "update" in run.seconds()
    assert run.updates_file.read_text() == ""


def test_a_user_that_the_run_does_not_have_is_a_mistake(call: Callable[..., Result]) -> None:
    result = call("--user", "u-9")
    assert result.exit_code == 2
    assert "the run has no user 'u-9'; `milp-ray users check" in result.stderr


@pytest.mark.parametrize("function", ["updating.update", "stages.evaluate"])
@pytest.mark.parametrize(("n_failed", "code"), [(0, 0), (2, 3)])
def test_the_exit_code_says_whether_users_failed(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, function: str, n_failed: int, code: int
) -> None:
    monkeypatch.setattr(f"milp_ray.pipeline.{function}", lambda *_, **__: n_failed)
    assert CliRunner().invoke(app, [function.partition(".")[2], str(run.path)]).exit_code == code
