"""Runs as jobs of a real cluster with token authentication, by the commands that a person would type."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.processes import kill_family
from support.runs import write_small_run

from milp_ray.run_status import read_status
from milp_ray.rundir import RunFolder

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

TOKEN = "0123456789abcdef0123456789abcdef"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Cluster:
    """A head node in a process of its own; ``environment`` is what a client needs."""

    url: str
    environment: dict[str, str]

    def milp(self, *arguments: object, token: bool = True) -> subprocess.CompletedProcess[str]:
        environment = self.environment if token else {**self.environment, "RAY_AUTH_MODE": "disabled"}
        command = [sys.executable, "-m", "milp_ray", *map(str, arguments), "--address", self.url]
        return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
        start += [f"--port={free_port()}", f"--dashboard-port={port}", "--dashboard-host=127.0.0.1"]
        # Agents of other sessions on the machine may hold the usual port, and without an agent no job starts.
        start += [f"--dashboard-agent-listen-port={free_port()}"]
        start += ["--num-gpus=0", "--object-store-memory=134217728", f"--temp-dir={folder}"]
        process = subprocess.Popen(
            start,
            env=environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        found = Cluster(f"http://127.0.0.1:{port}", environment)
        try:
            deadline = time.monotonic() + 240
            while status_of(found.url, TOKEN) != 200:
                assert process.poll() is None, "the head node ended"
                assert time.monotonic() < deadline
                time.sleep(0.5)
            yield found
        finally:
            kill_family(process)


def status_of(url: str, token: str | None) -> int | None:
    """The answer of the Jobs API; ``None``: nobody answers."""
    request = urllib.request.Request(f"{url}/api/jobs/")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def test_a_run_that_cannot_work_there_is_refused_before_it_begins(
    cluster: Cluster, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    assert status_of(cluster.url, None) == 401
    search = {"n_trials": 2, "n_initial": 2, "gpus_per_trial": 1}
    config = write_small_run(tmp_path, tiny_llama_dir, name="greedy", search=search)
    submitted = cluster.milp("submit", config)
    assert submitted.returncode == 2, submitted.stdout + submitted.stderr
    assert "search.gpus_per_trial is 1, but the cluster has 0 GPUs" in submitted.stdout
    status = read_status(RunFolder.open(tmp_path / "runs" / "greedy"))
    assert status is not None
    assert (status.state, status.stage, status.exit_code) == ("failed", None, 2)
    told = cluster.milp("status", "greedy", "--json")
    assert told.returncode == 1
    assert json.loads(told.stdout)["state"] == "failed"
    assert "the cluster has 0 GPUs" in cluster.milp("logs", "greedy").stdout
    nobody = cluster.milp("status", "nobody")
    assert nobody.returncode == 2
    assert "there is no job 'nobody'" in nobody.stderr
    stranger = cluster.milp("status", "greedy", token=False)
    assert stranger.returncode == 2
    assert "RAY_AUTH_MODE=token" in stranger.stderr
    assert "Traceback" not in stranger.stderr


@pytest.mark.slow
def test_a_run_is_submitted_stopped_and_goes_on(
    cluster: Cluster, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    long = {"memory_epochs": 400, "instruction_epochs": 1}
    config = write_small_run(tmp_path, tiny_llama_dir, training=long)
    assert cluster.milp("submit", config, "--no-wait").returncode == 0
    run = RunFolder(tmp_path / "runs" / "small")
    deadline = time.monotonic() + 300
    while not run.journal.exists():
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert "RUNNING on" in cluster.milp("submit", config).stderr
    assert cluster.milp("stop", "small").returncode == 0
    while (status := read_status(run)) is None or status.state == "running":
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert status.state == "stopped"
    while cluster.milp("status", "small").returncode == 0:  # it leaves the cluster, which takes a moment
        assert time.monotonic() < deadline
    go_on = cluster.milp("submit", write_small_run(tmp_path, tiny_llama_dir, training=long))
    assert go_on.returncode == 0, go_on.stdout + go_on.stderr
    assert "preflight: 1 nodes, 0 GPUs" in go_on.stdout
    assert (run.report / "index.html").is_file()
    ended = read_status(run)
    assert ended is not None
    assert (ended.state, ended.exit_code) == ("succeeded", 0)
    assert "succeeded" in cluster.milp("status", "small").stdout
    watched = cluster.milp("watch", "small", "--json")
    assert watched.returncode == 0, watched.stdout + watched.stderr
    seen = json.loads(watched.stdout.splitlines()[-1])
    assert (seen["run"], seen["status"]["state"]) == ("small", "succeeded")
    assert (seen["gauges"]["trials_finished"], seen["gauges"]["users_finished"]) == (2, 2)
    assert "watch-" not in urllib.request.urlopen(  # the job that watched is gone
        urllib.request.Request(f"{cluster.url}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})
    ).read().decode("utf-8")
    short = write_small_run(tmp_path, tiny_llama_dir, training={"memory_epochs": 1, "instruction_epochs": 1})
    refused = cluster.milp("submit", short)
    assert refused.returncode == 2
    assert "different configuration" in refused.stdout
    afresh = cluster.milp("submit", short, "--fresh")
    assert afresh.returncode == 0, afresh.stdout + afresh.stderr
    assert run.config().training.memory_epochs == 1
