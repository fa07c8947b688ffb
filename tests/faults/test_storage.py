"""A disk that is full in the middle of a search: what the command says, what is kept, and how it goes on.

What becomes of a batch is in tests/personalize/test_personalize_faults.py.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.clusters import trial_ends
from support.mounts import in_own_mounts

from milp_ray.config import Config
from milp_ray.rundir import RunFolder
from milp_ray.search.journal import read_events, read_study

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(500)]

N_TRIALS = 24
# $1: the run's folder, which gets a disk of its own; $2: where the journal is copied to after each command;
# then the command. The disk is filled when three trials have ended; the command is given again with room.
SCRIPT = """
folder=$1 kept=$2; shift 2
cp -r "$folder" "$kept/folder"
mount -t tmpfs -o size=8m none "$folder"
cp -r "$kept/folder/." "$folder"
(
  until [ "$(grep -c trial_completed "$folder/study/journal.jsonl")" -ge 3 ]; do sleep 0.05; done
  cat /dev/zero > "$folder/ballast"
) 2> "$kept/filling" &
for n in 1 2; do
  rc=0; "$@" > "$kept/out$n" 2> "$kept/err$n" || rc=$?
  echo "$rc" > "$kept/rc$n"; date +%s.%N > "$kept/time$n"
  cp "$folder/study/journal.jsonl" "$kept/journal$n"
  wait
  rm -f "$folder/ballast"
done
"""


def prepared_run(folder: Path, model: Path) -> RunFolder:
    users = folder / "users.jsonl"
    examples = [{"query": f"What is {i}?", "response": f"It is {i}."} for i in range(6)]
    turns = ["I like tea.", "My dog is red.", "My cat is blue."]
    users.write_text(json.dumps({"user_id": "u", "history": turns, "examples": examples}), encoding="utf-8")
    settings: dict[str, Any] = {
        "name": "full",
        "output_dir": folder / "runs",
        "base": {"model": str(model), "device": "cpu"},
        "users": {"format": "jsonl", "paths": [users]},
        "space": {"ranks": [2, 4]},
        "training": {"memory_epochs": 1, "instruction_epochs": 1},
        "evaluation": {"max_new_tokens": 4},
        "search": {"n_trials": N_TRIALS, "n_initial": N_TRIALS},
        "ray": {"num_cpus": 1, "num_gpus": 0, "object_store_mib": 100},
    }
    return RunFolder.create(Config.model_validate(settings))


def test_a_full_disk_ends_the_search_and_with_room_it_goes_on(
    tmp_path: Path, tiny_llama_dir: Path, measured: Callable[..., None]
) -> None:
    run = prepared_run(tmp_path, tiny_llama_dir)
    kept = tmp_path / "kept"
    kept.mkdir()
    command = (sys.executable, "-m", "milp_ray", "search", run.path)
    answer = in_own_mounts(SCRIPT, run.path, kept, *command)
    assert answer.returncode == 0, answer.stderr
    told = (kept / "err1").read_text()
    assert (kept / "rc1").read_text().strip() == "2", told
    assert "cannot be written: No space left on device" in told
    assert str(run.study) in told
    assert "Make room" in told
    assert "the same command goes on from there" in told
    assert "Traceback" not in told
    before = trial_ends(kept / "journal1")
    assert 3 <= len(before) < N_TRIALS, "it is in the middle"

    assert (kept / "rc2").read_text().strip() == "0", (kept / "err2").read_text()
    after = trial_ends(kept / "journal2")
    assert sorted(after) == list(range(N_TRIALS))
    assert before.items() <= after.items()
    events = read_events(kept / "journal2")
    begun_again = [e["index"] for e in events if e["event"] == "trial_started"]
    assert all(begun_again.count(index) == 1 for index in before), "nothing finished is run again"
    assert len(read_study(kept / "journal2").keys) == N_TRIALS
    first = min(end for index, end in after.items() if index not in before)
    seconds = first - float((kept / "time1").read_text())
    lost = "trials in work, run again"
    measured("storage full, study", lost, seconds, "the second command's first trial has ended")
    assert os.path.getsize(kept / "journal2") > os.path.getsize(kept / "journal1")
