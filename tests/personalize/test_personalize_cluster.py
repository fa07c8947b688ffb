"""A cluster that grows and shrinks under a batch: newcomers help, and who leaves harms no user."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
DRIVER = Path(__file__).with_name("cluster_driver.py")


def play(what: str) -> dict[str, Any]:
    """What the driver found. Its Ray has a folder of its own: no other process takes it for theirs."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        environment = {
            **os.environ,
            "RAY_TMPDIR": folder,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        answer = subprocess.run(
            [sys.executable, str(DRIVER), what], capture_output=True, text=True, env=environment, timeout=390
        )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    # Ray prints what it has to say of a killed node among the lines.
    return json.loads(next(line for line in answer.stdout.splitlines() if line.startswith("{")))


@pytest.mark.slow
def test_nodes_that_join_in_the_middle_get_workers_and_speed_the_batch_up() -> None:
    found = play("joins")
    assert found["n_outcomes"] == 200
    assert (found["n_workers"], found["max_workers"]) == (3, 3)
    assert found["rate_at_the_end"] > 1.5 * found["rate_before"]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["removed", "killed"])
def test_a_worker_that_goes_with_its_node_does_not_count_against_the_user(what: str) -> None:
    found = play(what)
    assert (found["n_outcomes"], found["n_failed"]) == (8, 0)
    assert found["n_lost"] == 1
    assert found["attempts"] == 2
