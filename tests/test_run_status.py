"""What a run says of itself: while it works, however it ends, and after it was killed."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from milp_ray import exit_codes
from milp_ray.cli import _of_the_disk, app
from milp_ray.config import Config
from milp_ray.errors import MilpError
from milp_ray.run_mirror import LOCK
from milp_ray.run_status import interrupt, read_status, recorded
from milp_ray.rundir import RunFolder

SECRET = "my pin is 4711"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(Config(name="r", output_dir=tmp_path))


def test_a_run_that_nobody_worked_on_has_no_status(run: RunFolder) -> None:
    assert read_status(run) is None


def test_a_command_that_ends_well_says_so(run: RunFolder) -> None:
    with run.lock(), recorded(run, "run") as status:
        status.stage("search")
    found = read_status(run)
    assert found is not None
    assert (found.state, found.stage, found.exit_code, found.reason) == ("succeeded", "search", 0, None)
    assert found.pid == os.getpid()


def test_an_end_at_which_some_users_failed_says_how_many(run: RunFolder) -> None:
    with run.lock(), recorded(run, "update") as status:
        status.failed = {"search": 0, "personalize": 3}
    found = read_status(run)
    assert found is not None
    assert (found.state, found.command, found.exit_code) == ("succeeded", "update", 3)
    assert found.reason == "users failed: 3 in personalize"


@pytest.mark.parametrize(
    ("error", "state", "code", "reason"),
    [
        (MilpError("no such base"), "failed", 2, "no such base"),
        (OSError(errno.ENOSPC, "x"), "failed", 2, os.strerror(errno.ENOSPC)),
        (FileNotFoundError(errno.ENOENT, SECRET), "failed", 1, f"{os.strerror(errno.ENOENT)} (see the log)"),
        (TimeoutError(SECRET), "failed", 1, "TimeoutError (see the log)"),
        (ValueError(SECRET), "failed", 1, "ValueError (see the log)"),
        (KeyboardInterrupt(), "stopped", 130, "interrupted"),
        (SystemExit(SECRET), "failed", 1, "SystemExit (see the log)"),
    ],
)
def test_a_command_that_ends_badly_says_why_and_quotes_nobody(
    run: RunFolder, error: BaseException, state: str, code: int, reason: str
) -> None:
    def work() -> None:
        with run.lock(), recorded(run, "run") as status:
            status.stage("evaluate")
            raise error

    with pytest.raises(type(error)):
        work()
    if isinstance(error, OSError):  # as the command line tells it
        assert (_of_the_disk(error) is not None) == (code == exit_codes.MISTAKE)
    found = read_status(run)
    assert found is not None
    assert (found.state, found.stage, found.exit_code, found.reason) == (state, "evaluate", code, reason)
    assert SECRET not in run.status_file.read_text(encoding="utf-8")


WORKER = """
import sys, time
from pathlib import Path
from milp_ray.run_status import recorded
from milp_ray.rundir import RunFolder
run = RunFolder.open(Path(sys.argv[1]))
with run.lock(), recorded(run, "run") as status:
    status.stage("search")
    print("working", flush=True)
    time.sleep(120)
"""


def working(run: RunFolder, what: str = WORKER) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", what, run.path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    return process


def test_a_running_command_is_told_from_one_that_was_killed(run: RunFolder) -> None:
    process = working(run)
    status = read_status(run)
    assert status is not None
    assert (status.state, status.stage, status.pid) == ("running", "search", process.pid)
    process.kill()
    process.wait()
    died = read_status(run)
    assert died is not None
    assert died.state == "died"
    assert "the same command goes on" in (died.reason or "")


HOLDER = """
import sys, time
from pathlib import Path
from milp_ray.rundir import RunFolder
with RunFolder.open(Path(sys.argv[1])).lock():
    print("working", flush=True)
    time.sleep(120)
"""


def test_what_a_killed_command_left_stops_nobody_else(run: RunFolder) -> None:
    process = working(run)
    process.kill()
    process.wait()
    with subprocess.Popen(["sleep", "120"]) as bystander, working(run, HOLDER) as other:
        # A number is given again sooner or later; what forgets or cleans up holds the run and has no status.
        left = json.loads(run.status_file.read_text(encoding="utf-8"))
        run.status_file.write_text(json.dumps({**left, "pid": bystander.pid}), encoding="utf-8")
        status = read_status(run)
        assert status is not None
        assert status.state == "died"
        with pytest.raises(MilpError, match="its last command has died"):
            interrupt(run)
        assert (bystander.poll(), other.poll()) == (None, None)
        bystander.kill()
        other.kill()


def test_a_command_is_stopped_by_the_process_that_holds_its_run(run: RunFolder) -> None:
    with working(run) as process:
        holder = run.holder()
        assert holder is not None
        assert (holder["pid"], holder["host"]) == (process.pid, socket.gethostname())
        interrupt(run)
        assert process.wait(timeout=60) != 0
    with pytest.raises(MilpError, match="its last command has stopped"):
        interrupt(run)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"began": 1.0}, "is another one by now: nothing was stopped"),
        ({"pid": 2**31 - 2}, "does not exist on this machine"),
    ],
)
def test_a_process_that_is_not_the_one_meant_is_told_without_a_traceback(
    run: RunFolder, change: dict[str, Any], said: str
) -> None:
    with subprocess.Popen(["sleep", "120"]) as bystander, working(run) as process:
        holder = {**(run.holder() or {}), "pid": bystander.pid, **change}
        (run.path / LOCK).write_text(json.dumps(holder), encoding="utf-8")
        stopped = CliRunner().invoke(app, ["stop", str(run.path)])
        assert stopped.exit_code == 2
        assert said in stopped.output
        assert (bystander.poll(), process.poll()) == (None, None)
        bystander.kill()
        process.kill()


def test_a_request_to_terminate_is_an_interruption(run: RunFolder) -> None:
    process = working(run)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) != 0
    deadline = time.monotonic() + 10
    while (status := read_status(run)) is None or status.state == "running":
        assert time.monotonic() < deadline
    assert status.state == "stopped"
    assert "the same command continues" in (status.reason or "")


def test_the_signals_handler_is_put_back(run: RunFolder) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with run.lock(), recorded(run, "run"):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_damaged_file_is_told(run: RunFolder) -> None:
    run.status_file.write_text("{", encoding="utf-8")
    with pytest.raises(MilpError, match=r"status\.json cannot be read"):
        read_status(run)
