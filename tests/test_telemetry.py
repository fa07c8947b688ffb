from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from milp_ray import telemetry
from milp_ray.config.cluster import RaySection
from milp_ray.errors import MilpError
from milp_ray.telemetry import configure_logging, log_event, prepare_worker, worker_environment

# ---------------------------------------------------------------------------------------------- sessions

PROGRAM = """
import json, os, signal, sys
import psutil
from milp_ray.config.cluster import RaySection
from milp_ray.telemetry import ray_session

before = dict(os.environ)
section = RaySection(num_cpus=2, threads_per_worker=3)
facts = {"torch": [], "terminated": 0}

def terminate(number, frame):
    facts["terminated"] += 1

signal.signal(signal.SIGTERM, terminate)
with ray_session(section) as outer:
    import ray

    with ray_session(section) as inner:
        facts["nested"] = [outer.started_here, inner.started_here]
    facts["open_after_nested"] = ray.is_initialized()
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TOKENIZERS_PARALLELISM", "PATH")
    worker = ray.remote(lambda: ({name: os.environ.get(name) for name in names}, "torch" in sys.modules))
    facts["worker"], torch_in_worker = ray.get(worker.remote())
    facts["torch"] = [torch_in_worker, "torch" in sys.modules]
    facts["cpus"] = outer.n_cpus
    processes = psutil.Process().children(recursive=True)
    facts["processes"] = len(processes)
    os.kill(os.getpid(), signal.SIGTERM)
facts["open_after"] = ray.is_initialized()
facts["left"] = [p.name() for p in psutil.wait_procs(processes, timeout=10)[1]]
facts["changed"] = sorted({name for name, _ in before.items() ^ os.environ.items()})
facts["home"] = os.listdir(os.environ["HOME"])
print(json.dumps(facts))
"""


@pytest.mark.ray
def test_a_session_is_started_shared_and_taken_down(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and "THREADS" not in k}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=250,
        check=True,
    )
    facts = json.loads(result.stdout.splitlines()[-1])
    assert facts["nested"] == [True, False]
    assert facts["open_after_nested"]
    assert facts["cpus"] == 2
    assert facts["terminated"] == 1, "Ray's own handler ends the process before anything is saved"
    assert not facts["open_after"]
    assert facts["processes"] > 0
    assert facts["left"] == []
    of_ray_itself = {"PYTHONBREAKPOINT", "RAY_CLIENT_MODE"}
    assert set(facts["changed"]) <= of_ray_itself, "the caller's environment is changed for good"
    assert facts["home"] == [], "Ray wrote a token or usage file into the home directory"
    assert facts["torch"] == [False, False], "Ray's processes import torch for nothing"
    worker = facts["worker"]
    assert Path(sys.executable).parent.as_posix() in worker.pop("PATH").split(os.pathsep)
    assert set(worker.values()) == {"3", "false"}


@pytest.mark.ray
def test_a_session_that_others_opened_is_used_and_left_open(ray_local: None) -> None:
    import ray

    with telemetry.ray_session(RaySection(num_cpus=1)) as session:
        assert not session.started_here
        assert session.n_cpus == 2
    assert ray.is_initialized()


def test_an_address_without_a_cluster_is_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    given: dict[str, object] = {}

    def refuse(**options: object) -> None:
        given.update(options)
        raise ConnectionError("no one there")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with (
        pytest.raises(MilpError, match="'ray://head:10001': no Ray cluster answers"),
        telemetry.ray_session(RaySection(address="ray://head:10001", num_cpus=2)),
    ):
        pass
    # A cluster that is joined has its own resources; Ray refuses to be told any.
    assert set(given) == {"address", "logging_level", "log_to_driver", "runtime_env"}


def test_a_start_that_times_out_is_tried_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    starts: list[str] = []

    def time_out(**options: object) -> None:
        starts.append("start")
        if len(starts) in failing:
            raise Exception("The current node timed out during startup. This could happen because …")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", time_out)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    failing = {1}
    with telemetry.ray_session(RaySection()) as session:
        assert session.started_here
    assert len(starts) == 2
    failing = {3, 4}
    with pytest.raises(MilpError, match="the machine is too busy"), telemetry.ray_session(RaySection()):
        pass


def test_a_submitted_job_joins_the_cluster_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    addresses: list[str] = []
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: addresses.append(options["address"]))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0})
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with telemetry.ray_session(RaySection()) as session:
        assert not session.started_here
    assert addresses == ["10.0.0.1:6379"]


def test_workers_get_capped_threads_and_the_offline_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    environment = worker_environment(RaySection(threads_per_worker=5))
    assert {environment[f"{name}_NUM_THREADS"] for name in ("OMP", "MKL", "OPENBLAS")} == {"5"}
    assert environment["HF_HUB_OFFLINE"] == "1"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert "HF_HUB_OFFLINE" not in worker_environment(RaySection())


def test_preparing_a_worker_caps_torch_and_finds_build_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "set")
    monkeypatch.setenv("PATH", "/usr/bin")
    before = torch.get_num_threads()
    try:
        prepare_worker(2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert os.environ["OMP_NUM_THREADS"] == "2"
    assert os.environ["PATH"] == f"{Path(sys.executable).parent}:/usr/bin"
    assert os.environ["DS_ACCELERATOR"] == "set", "what the user has set stays"


# --------------------------------------------------------------------------------------------------- log


@pytest.fixture
def logged(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """What was written to standard error; the package's logger is put back afterwards."""
    logger = logging.getLogger("milp_ray")
    state = (list(logger.handlers), logger.level, logger.propagate)
    yield lambda: capsys.readouterr().err
    logger.handlers[:], logger.propagate = state[0], state[2]
    logger.setLevel(state[1])


def test_json_lines_where_asked_for(logged: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILP_LOG", "json")
    configure_logging()
    configure_logging()
    log_event("adapter_made", user='a "quoted"\nid', seconds=1.5, retried=False)
    [line] = logged().splitlines()
    fields = json.loads(line)
    assert fields.pop("time")
    assert fields == {
        "level": "info",
        "event": "adapter_made",
        "user": 'a "quoted"\nid',
        "seconds": 1.5,
        "retried": False,
    }


def test_events_are_silent_and_warnings_plain_otherwise(
    logged: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MILP_LOG", raising=False)
    configure_logging()
    log_event("adapter_made", user="u-1")
    logging.getLogger("milp_ray").warning("no worker has started")
    assert logged() == "warning: no worker has started\n"


def test_what_is_too_long_for_an_id_is_cut(
    logged: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILP_LOG", "json")
    configure_logging()
    log_event("user_failed", user="x" * 100_000)
    assert len(logged()) < 500
