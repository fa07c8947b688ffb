"""A whole run by the command line: nothing of a text is written anywhere, and people are forgotten in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from milp_ray.config import Config
from milp_ray.config.users import UsersSection
from milp_ray.personalize.governance.items import find_user, items_of
from milp_ray.personalize.governance.needles import Finders, IdFinder, ItemFinder
from milp_ray.personalize.governance.scan import Scan, scan_folder
from milp_ray.personalize.store import AdapterStore, hash_id
from milp_ray.rundir import RunFolder

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

USERS = [f"user-{i:03d}" for i in range(5)]


def write_users(path: Path) -> None:
    lines = []
    for user_id in USERS:
        history = [
            f"My {thing} is of colour {user_id[-1]}, that is a secret." for thing in ("dog", "cat", "hat")
        ]
        examples = [
            {"query": f"Of which colour is my thing number {i}?", "response": f"It is of {user_id[-1]}."}
            for i in range(10)
        ]
        lines.append({"user_id": user_id, "history": history * 2, "examples": examples})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def milp(*arguments: object, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    answer = subprocess.run(
        [sys.executable, "-m", "milp_ray", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "MILP_LOG": "json", **environment},
    )
    assert answer.returncode == code, answer.stdout + answer.stderr
    return answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("governance")


@pytest.fixture(scope="module")
def ray_folder() -> Iterator[Path]:
    """Ray's own temporary folder, of a short name: its sockets stand in it."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def printed(folder: Path, ray_folder: Path, tiny_llama_dir: Path) -> str:
    """Everything that a whole run printed, its log lines included."""
    write_users(folder / "users.jsonl")
    settings = {
        "name": "tiny",
        "output_dir": str(folder / "runs"),
        "base": {"model": str(tiny_llama_dir), "device": "cpu"},
        "users": {"format": "jsonl", "paths": [str(folder / "users.jsonl")]},
        "space": {"ranks": [4, 8]},
        "training": {"memory_epochs": 1, "instruction_epochs": 1, "learning_rate": 0.03},
        "search": {
            "n_trials": 3,
            "n_initial": 3,
            "n_probe_users": 2,
            "objectives": ["validation_loss", "adapter_parameters"],
            "surrogate": {"inference": "map"},
        },
        "choice": {"rule": "best_loss"},
        "personalize": {"purpose": "tests", "retention_days": 30},
        "evaluation": {"methods": ["base", "milp"], "max_new_tokens": 4, "n_bootstrap": 50},
        "ray": {"num_cpus": 1, "num_gpus": 0, "object_store_mib": 128},
    }
    Config.model_validate(settings)
    (folder / "c.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    answer = milp("run", folder / "c.yaml", RAY_TMPDIR=str(ray_folder))
    return answer.stdout + answer.stderr


@pytest.fixture
def run(folder: Path, printed: str) -> RunFolder:
    return RunFolder.open(folder / "runs" / "tiny")


def texts(folder: Path) -> ItemFinder:
    section = UsersSection(format="jsonl", paths=(folder / "users.jsonl",))
    users = [find_user(section, 0, user_id) for user_id in USERS]
    return ItemFinder([item for user in users if user is not None for item in items_of(user)])


def test_no_text_of_a_user_is_in_what_a_run_prints_logs_measures_or_writes(
    run: RunFolder, folder: Path, ray_folder: Path, printed: str
) -> None:
    assert '"event": "personalized"' in printed
    logged = [line for line in printed.splitlines() if line.startswith('{"time"')]
    assert any(hash_id(USERS[0]) in line for line in logged)
    assert not [line for line in logged if any(user_id in line for user_id in USERS)]
    assert not texts(folder).look(printed.encode())
    scan = Scan()
    scan_folder(run.path, texts(folder), scan)
    assert scan.n_files > 20
    assert (scan.found, scan.unread) == ([], [])
    logs = Scan()
    for session in ray_folder.rglob("logs"):
        scan_folder(session, texts(folder), logs)
    assert logs.n_files > 5
    assert logs.found == []


def test_ids_are_in_the_run_and_not_in_what_ray_writes(run: RunFolder, ray_folder: Path) -> None:
    ids = Finders(*(IdFinder(user_id) for user_id in USERS))
    scan, logs = Scan(), Scan()
    scan_folder(run.path, ids, scan)
    assert {"scores.parquet", "manifest.json"} <= {one.path.name for one in scan.found}
    for session in ray_folder.rglob("logs"):
        scan_folder(session, ids, logs)
    assert logs.found == []


def test_forget_then_audit_finds_nothing_and_generate_answers_that_there_is_no_such_user(
    run: RunFolder, folder: Path
) -> None:
    gone = str(run.facts()["probe_users"][0])
    before = milp("audit", run.path, gone, code=3)
    assert "scores.parquet" in before.stdout
    assert "secret" not in before.stdout
    dry = json.loads(milp("forget", run.path, gone, "--dry-run", "--json").stdout)
    assert dry["removed"]["versions of the adapter"]["count"] == 1
    assert milp("forget", run.path, gone, code=1).stdout.count("Forget user") == 1  # nobody answers
    assert AdapterStore(run.adapters).versions(gone)

    said = milp("forget", run.path, gone, "--yes", "--by", "the officer").stdout
    assert "nothing is left" in said
    assert "signed off: line 2" in said
    assert "still holds the user" in said
    assert "summary and report are made again" in said
    assert json.loads(run.summary_file.read_text())["n_users"] == len(USERS) - 1
    milp("audit", run.path, gone)
    facts = json.loads(milp("audit", run.path, "--all-forgotten", "--json").stdout)
    assert facts["clean"]
    answer = milp("generate", run.path, "Which colour?", "--user", gone, code=2)
    assert f'there is no user "{gone}"' in answer.stderr
    assert "Traceback" not in answer.stderr

    again = milp("run", folder / "c.yaml")
    assert "1 users are left out: 1 forgotten" in again.stdout
    assert "the search stays as it is, with 3 trials: 1 of the 2 users" in again.stdout
    assert gone not in (again.stdout + again.stderr).replace(str(folder), "")
    assert sorted(AdapterStore(run.adapters).users()) == sorted(set(USERS) - {gone})
    milp("audit", run.path, gone)


@pytest.mark.slow
def test_a_user_who_withdraws_is_told_of_and_not_served_and_an_item_is_forgotten_and_trained_without(
    run: RunFolder,
) -> None:
    store = AdapterStore(run.adapters)
    probes = run.facts()["probe_users"]
    withdrawn, item_user = [user for user in sorted(store.users()) if user not in probes][:2]
    milp("consent", run.path, withdrawn, "--withdraw")
    answer = milp("generate", run.path, "Which colour?", "--user", withdrawn, code=2)
    assert "has withdrawn consent" in answer.stderr
    assert "consent withdrawn since" in milp("consent", run.path, withdrawn).stdout

    items = json.loads(milp("items", run.path, item_user, "--json").stdout)["items"]
    assert "secret" not in json.dumps(items)
    before = store.manifest(item_user)
    said = milp("forget", run.path, item_user, "--item", items[0]["sha256"], "--yes", "--retrain").stdout
    assert "1 users without consent have an adapter from before" in said
    after = store.manifest(item_user)
    assert after.fingerprint != before.fingerprint
    assert after.meta["n_turns"] == before.meta["n_turns"] - 2  # it was said twice
    assert after.retention is not None
    assert after.retention["purpose"] == "tests"
    listed = json.loads(milp("items", run.path, item_user, "--json").stdout)["items"]
    assert [item["item"] for item in listed if item["forgotten"]] == ["history:0", "history:3"]
    milp("audit", run.path, item_user, "--item", items[0]["sha256"])
