"""A run folder with something of every user wherever something of a user can be, made without Ray."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milp_ray.config import Config
from milp_ray.evaluation.scores import COLUMNS, write_scores
from milp_ray.personalize.governance.audit import audit_user
from milp_ray.personalize.governance.forget import Forgotten, forget_user
from milp_ray.personalize.store import AdapterStore, hash_id, run_store
from milp_ray.rundir import RunFolder
from milp_ray.training.adapters import Adapter

# The second is the beginning of the fourth; the third holds what paths, JSON and HTML escape.
IDS = ("ann-0001", "u-1", 'ü/<"3"> & co', "u-17", "bob.smith@example.org")
SECRET = "My grandmother's maiden name is Peccadillo"


@dataclass
class Governed:
    """The run, its configuration and store, and the users' file."""

    run: RunFolder
    config: Config
    store: AdapterStore
    users: Path


def user_line(user_id: str, **fields: Any) -> dict[str, Any]:
    history = [f"{SECRET} of {user_id}, I said.", "yes", {"text": f"I like blue, says {user_id}."}]
    examples = [{"query": f"What, {i}, says {user_id}?", "response": f"That, {i}."} for i in range(6)]
    return {"user_id": user_id, "history": history, "examples": examples, **fields}


def write_users(path: Path, *lines: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def score_row(user_id: str, example: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        name: {"string": "none", "bool": True}.get(kind, 1) for name, kind in COLUMNS.items()
    }
    return {**row, "user_id": user_id, "method": "milp", "example": example, "loss": 0.1 + example / 3}


def make_governed(
    folder: Path, adapter: Adapter, events: list[dict[str, Any]], **personalize: Any
) -> Governed:
    users = folder / "users.jsonl"
    write_users(users, *(user_line(user_id) for user_id in IDS))
    config = Config.model_validate(
        {
            "name": "governed",
            "output_dir": str(folder / "runs"),
            "users": {"format": "jsonl", "paths": [str(users)]},
            "search": {"n_trials": 10, "n_initial": 4, "n_probe_users": 3},
            "personalize": personalize,
        }
    )
    run = RunFolder.create(config)
    store = run_store(run.adapters, config.personalize)
    for user_id in IDS:
        for version in range(2):
            store.publish(user_id, adapter, {"n_turns": 3}, fingerprint=f"{version}")
    (run.path / ".lock").touch()
    run.study.mkdir()
    run.journal.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    trial = run.study / "tune" / "attempt-1" / "trial-0000"
    trial.mkdir(parents=True)
    (trial / "result.json").write_text(json.dumps({"per_user": [1, 2, 3]}))
    run.record_facts(probe_users=list(IDS[:3]), dataset_hash="d" * 64, n_users=len(IDS))
    rows = [score_row(user_id, example) for user_id in IDS for example in range(3)]
    write_scores(run.scores_file, rows, dict.fromkeys(IDS, "made from"))
    write_scores(run.path / "scores" / "part-000000.parquet", rows, dict.fromkeys(IDS, "f"))
    failures = [{"user_id": u, "error": "E", "reason": f"user {json.dumps(u)}: no"} for u in IDS]
    for path in (run.failed_file, run.path / "failed_evaluation.jsonl"):
        path.write_text("".join(json.dumps(line) + "\n" for line in failures), encoding="utf-8")
    run.write_summary({"name": "governed", "slowest": list(IDS)})
    run.report.mkdir()
    (run.report / "index.html").write_text("<p>probe users: " + ", ".join(IDS) + "</p>", encoding="utf-8")
    checkpoints = run.path / "checkpoints"
    checkpoints.mkdir()
    for user_id in IDS:
        (checkpoints / f"{hash_id(user_id)}.safetensors").write_bytes(b"weights")
    (run.path / f".scores.parquet.{2**22 + 1}.tmp").write_bytes(b"half of " + IDS[0].encode())
    return Governed(run, config, store, users)


Events = Callable[..., list[dict[str, Any]]]


def forget(it: Governed, user_id: str, **options: Any) -> Forgotten:
    with it.run.lock():
        return forget_user(it.run, it.config, it.store, user_id, by="the officer", **options)


def audit(it: Governed, user_id: str) -> Any:
    return audit_user(it.run, it.store, it.config.users, user_id)


def files_of(folder: Path, *without: str) -> dict[str, bytes]:
    """Every file with its bytes, less those that are anew after any change."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if not name.startswith(without)}
