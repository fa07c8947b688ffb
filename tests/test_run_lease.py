"""The lease on a run in a bucket: who has it, how it is kept, and what becomes of who has lost it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.bucket_runs import config_of, move_to

import milp_ray.run_lease as run_lease
import milp_ray.this_process as this_process_module
from milp_ray.buckets import Bucket
from milp_ray.errors import MilpError
from milp_ray.run_lease import LEASE, LeaseLostError
from milp_ray.run_mirror import Mirror
from milp_ray.run_status import recorded
from milp_ray.rundir import RunFolder
from milp_ray.this_process import this_process


@pytest.fixture
def uri(s3: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    move_to(tmp_path / "here", monkeypatch)
    return f"s3://bucket/{request.node.name}/r?{s3}"


def write_lease(uri: str, **values: object) -> None:
    bucket = Bucket(uri)
    lease = {"host": socket.gethostname(), "pid": 1, "process": "another", "time": time.time(), **values}
    # Of one length with all others, as a reader may meet two versions.
    bucket.write(f"{bucket.root}/{LEASE}", json.dumps(lease).ljust(run_lease._LENGTH).encode())


def read_lease(uri: str) -> dict[str, object]:
    bucket = Bucket(uri)
    return dict(json.loads(bucket.read(f"{bucket.root}/{LEASE}")))


def is_there(uri: str, name: str) -> bool:
    return any(info.base_name == name for info in Bucket(uri).list(Bucket(uri).root))


def test_two_machines_do_not_work_on_one_run(uri: str) -> None:
    run = RunFolder.create(config_of(uri))
    write_lease(uri, host="elsewhere")
    assert run.is_held()
    with (
        pytest.raises(MilpError, match=r"another milp-ray process works on s3://bucket/.*\(on elsewhere\)"),
        run.lock(),
    ):
        pass
    write_lease(uri, host="elsewhere", time=time.time() - 61)
    assert not run.is_held()
    with run.lock():
        assert run.is_held()
    assert not run.is_held()
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    write_lease(uri, pid=child.pid, machine=this_process()["machine"])  # of this machine, and was killed
    with run.lock():
        pass


@pytest.mark.parametrize("machine", [None, "", "another boot-4026531836"])
def test_a_container_with_the_same_hosts_name_is_another_machine(
    uri: str, monkeypatch: pytest.MonkeyPatch, machine: str | None
) -> None:
    run = RunFolder.create(config_of(uri))
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    write_lease(uri, pid=child.pid, machine=machine)  # that number is some living process's there
    assert run.is_held()
    if machine == "":  # as on a system that does not say which machine it is
        monkeypatch.setattr(this_process_module, "_machine", lambda: "")
        assert run.is_held()


def test_who_lost_the_run_takes_nothing_there_and_leaves_the_other_its_lease(uri: str) -> None:
    run = RunFolder.create(config_of(uri))

    def overtaken() -> None:
        with run.lock():
            write_lease(uri, host="elsewhere")
            run.chosen_file.write_text("late")

    with pytest.raises(LeaseLostError, match=r"no longer held by this process: another .* \(on elsewhere\)"):
        overtaken()
    assert read_lease(uri)["host"] == "elsewhere"
    assert not is_there(uri, "chosen.yaml")
    write_lease(uri, host="elsewhere", time=0)
    with run.lock():  # taken anew
        pass
    assert is_there(uri, "chosen.yaml")


def test_a_run_that_another_machine_took_and_gave_back_is_lost_too(uri: str) -> None:
    run = RunFolder.create(config_of(uri))

    def overtaken() -> None:
        with run.lock():
            Bucket(uri).delete_file(f"{Bucket(uri).root}/{LEASE}")
            run.chosen_file.write_text("late")

    with pytest.raises(LeaseLostError, match="another process has worked on it"):
        overtaken()
    assert not is_there(uri, "chosen.yaml")


def test_a_process_that_only_looks_like_this_one_has_another_lease(uri: str) -> None:
    run = RunFolder.create(config_of(uri))
    with pytest.raises(LeaseLostError), run.lock():
        write_lease(uri, pid=read_lease(uri)["pid"])  # of a container with the same host's name


def test_a_command_that_lost_its_run_is_interrupted(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lease, "RENEW_SECONDS", 0.05)
    run = RunFolder.create(config_of(uri))
    deadline = time.monotonic() + 60

    def overtaken() -> None:
        with run.lock(), recorded(run, "search"):
            while time.monotonic() < deadline:  # again, should a renewal come upon the other's lease
                write_lease(uri, host="elsewhere")
                time.sleep(1)

    with pytest.raises(LeaseLostError, match="elsewhere"):
        overtaken()
    assert time.monotonic() < deadline
    assert read_lease(uri)["host"] == "elsewhere"


def test_a_lease_is_renewed_from_before_anything_is_brought(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder.create(config_of(uri))
    monkeypatch.setattr(run_lease, "RENEW_SECONDS", 0.05)
    bring = Mirror._bring

    def slowly(self: Mirror) -> None:
        taken, deadline = read_lease(uri)["time"], time.monotonic() + 60
        while read_lease(uri)["time"] == taken:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        bring(self)

    monkeypatch.setattr(Mirror, "_bring", slowly)
    with run.lock():
        pass
    assert not run.is_held()


def test_a_lease_outlasts_a_bucket_that_was_away_for_a_while(
    uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_lease, "RENEW_SECONDS", 0.05)
    run = RunFolder.create(config_of(uri))
    with run.lock():
        with monkeypatch.context() as away, caplog.at_level("WARNING", "milp_ray"):
            away.setattr(Bucket, "read", cannot_be_read)
            deadline = time.monotonic() + 60
            while "cannot be read" not in caplog.text:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        run.chosen_file.write_text("x")
    assert is_there(uri, "chosen.yaml")


def cannot_be_read(self: Bucket, path: str) -> bytes:
    raise MilpError("the run cannot be read")
