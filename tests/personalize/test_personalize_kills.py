"""Ten kills in one batch of 500 users: of a worker, of all, of the driver, of Ray itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(5400)
def test_after_ten_kills_every_user_has_exactly_one_sound_adapter(repository: Path) -> None:
    script = repository / "experiments" / "benchmarks" / "batch_kills.py"
    answer = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=5400)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    found = json.loads(answer.stdout.splitlines()[-1])
    assert (found["n_users"], found["n_kills"]) == (500, 10)
    assert found["n_processes_killed"] >= 10
    assert found["n_starts"] >= 5, "the driver and the raylet were killed at least twice each"
    assert found["n_lost"] == found["n_twice"] == found["n_changed"] == found["n_failed"] == 0
