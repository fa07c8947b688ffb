"""A run that is as small as a whole one can be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml


def write_small_run(folder: Path, model: Path, **changes: Any) -> Path:
    """Two users and two trials, some half a minute of work, in a file whose path has a space in it."""
    pairs = [{"query": f"Which pet, {i}?", "response": "A dog."} for i in range(10)]
    users = [
        {"user_id": f"u-{i}", "history": ["I have a dog."] * 4, "examples": pairs[i:] + pairs[:i]}
        for i in range(2)
    ]
    (folder / "users.jsonl").write_text("".join(json.dumps(user) + "\n" for user in users), encoding="utf-8")
    settings: dict[str, Any] = {
        "name": "small",
        "output_dir": str(folder / "runs"),
        "base": {"model": str(model), "device": "cpu"},
        "users": {"format": "jsonl", "paths": [str(folder / "users.jsonl")]},
        "space": {"ranks": [2, 4]},
        "training": {"memory_epochs": 1, "instruction_epochs": 1},
        "search": {
            "n_trials": 2,
            "n_initial": 2,
            "objectives": ["validation_loss", "adapter_parameters"],
            "surrogate": {"inference": "map"},
        },
        "choice": {"rule": "best_loss"},
        "evaluation": {"methods": ["base", "milp"], "max_new_tokens": 4, "n_bootstrap": 50},
        **changes,
    }
    path = folder / "a run.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path
