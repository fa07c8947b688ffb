"""A run in a bucket: copies on two machines, what a kill leaves, who may work on it, what goes with it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.bucket_runs import config_of, move_to
from support.runs import write_small_run
from typer.testing import CliRunner

import milp_ray.run_mirror as run_mirror
from milp_ray.buckets import Bucket
from milp_ray.cli import app
from milp_ray.errors import MilpError
from milp_ray.personalize.governance.consent import record_consent
from milp_ray.personalize.governance.record import Record
from milp_ray.personalize.store import run_store
from milp_ray.run_mirror import GOVERNANCE, INDEX, Mirror
from milp_ray.run_status import read_status, recorded
from milp_ray.rundir import RunFolder


@pytest.fixture
def uri(s3: str, request: pytest.FixtureRequest) -> str:
    return f"s3://bucket/{request.node.name}/r?{s3}"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    move_to(tmp_path / "here", monkeypatch)


def withdraw(run: RunFolder, user_id: str) -> None:
    record_consent(Record(run.path), user_id, "withdrawn", "the officer")


def test_what_one_machine_leaves_another_finds(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder.create(config_of(uri))
    assert run.place == uri
    with run.lock(), recorded(run, "search"):
        run.study.mkdir()
        run.journal.write_text("one\n")
        (run.study / "tune").mkdir()
        (run.study / "tune" / "state").write_text("of this machine")
        (run.path / ".lock.7.tmp").write_text("half")
    move_to(tmp_path / "there", monkeypatch)
    found = RunFolder.open(uri)
    assert found.path != run.path
    assert found.journal.read_text() == "one\n"
    assert not (found.study / "tune").exists()
    assert not (found.path / ".lock.7.tmp").exists()
    assert found.config() == config_of(uri)
    status = read_status(found)
    assert status is not None
    assert status.state == "succeeded"
    with found.lock():
        found.journal.write_text("one\ntwo\n")
        found.chosen_file.write_text("x")
        found.versions_file.write_bytes(run.versions_file.read_bytes())
    move_to(tmp_path / "here", monkeypatch)
    assert RunFolder.open(uri).journal.read_text() == "one\ntwo\n"
    with RunFolder.open(uri).lock():
        run.chosen_file.unlink()
    move_to(tmp_path / "there", monkeypatch)
    assert not RunFolder.open(uri).chosen_file.exists()


def test_what_a_killed_command_had_not_taken_there_yet_stays_on_its_machine(uri: str) -> None:
    run = RunFolder.create(config_of(uri))
    with run.lock():
        run.study.mkdir()
        run.journal.write_text("one\n")
    run.journal.write_text("one\ntwo\n")  # and then the process was killed
    assert RunFolder.open(uri).journal.read_text() == "one\ntwo\n"
    with run.lock():
        pass
    run.journal.unlink()
    (run.path / ".mirror.json").unlink()
    assert RunFolder.open(uri).journal.read_text() == "one\ntwo\n"


def test_what_changes_goes_there_while_a_command_works(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_mirror, "PUSH_SECONDS", 0.05)
    run = RunFolder.create(config_of(uri))
    with run.lock(), recorded(run, "search"):
        run.chosen_file.write_text("x")
        move_to(tmp_path / "there", monkeypatch)
        deadline = time.monotonic() + 60
        while not RunFolder.at(uri).chosen_file.is_file():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        status = read_status(RunFolder.at(uri))
        assert status is not None
        assert status.state == "running"


def test_who_looks_on_the_same_machine_does_not_take_files_from_under_the_run(uri: str) -> None:
    run = RunFolder.create(config_of(uri))
    with run.lock():
        run.study.mkdir()
        with run.journal.open("ab", buffering=0) as journal:
            journal.write(b"one\n")
            Mirror(uri).push()
            (run.path / INDEX).write_text("{}")  # as of somebody who looked before the push
            journal.write(b"two\n")
            RunFolder.at(uri).refresh()
            journal.write(b"three\n")
        assert run.journal.read_text() == "one\ntwo\nthree\n"


def test_what_changes_between_the_opening_and_the_work_is_brought(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = RunFolder.create(config_of(uri))
    with first.lock():
        first.chosen_file.write_text("old")
    late = RunFolder.open(uri)
    move_to(tmp_path / "there", monkeypatch)
    with RunFolder.open(uri).lock():
        RunFolder.at(uri).chosen_file.write_text("newer")
    move_to(tmp_path / "here", monkeypatch)
    with late.lock():
        assert late.chosen_file.read_text() == "newer"


def test_what_is_brought_of_the_record_is_for_its_owner_alone(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder.create(config_of(uri))
    with run.lock():
        withdraw(run, "ann-0001")
    move_to(tmp_path / "there", monkeypatch)
    found = RunFolder.open(uri).path / GOVERNANCE
    assert found.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in found.iterdir()} == {
        "key": 0o600,
        "head": 0o600,
        "records.jsonl": 0o600,
    }
    with RunFolder.at(uri).lock():
        withdraw(RunFolder.at(uri), "bob-0002")
    move_to(tmp_path / "here", monkeypatch)
    assert (RunFolder.open(uri).path / GOVERNANCE).stat().st_mode & 0o777 == 0o700
    assert Record(run.path).n_lines == 2


def leave_unpushed(run: RunFolder) -> None:
    """What a command had done that was killed before it took that to the bucket."""
    run.scores_file.write_text("rows of ann-0001")
    run.chosen_file.write_text("newer")
    run.journal.unlink()
    (run.study / "tune").mkdir()
    (run.study / "tune" / "state").write_text("values of ann-0001")
    (run.path / ".scores.parquet.7.tmp").write_text("half of the rows")


def test_what_was_not_taken_there_does_not_come_back_after_somebody_was_forgotten(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder.create(config_of(uri))
    with run.lock():
        run.study.mkdir()
        run.journal.write_text("one\n")
        run.chosen_file.write_text("x")
    move_to(tmp_path / "there", monkeypatch)
    killed = RunFolder.open(uri)
    leave_unpushed(killed)
    move_to(tmp_path / "here", monkeypatch)
    with run.lock():
        withdraw(run, "ann-0001")
    move_to(tmp_path / "there", monkeypatch)
    with caplog.at_level("WARNING", "milp_ray"):
        found = RunFolder.open(uri)
    assert "2 files in" in caplog.text
    assert found.path == killed.path
    assert not found.scores_file.exists()
    assert found.chosen_file.read_text() == "x"
    assert found.journal.read_text() == "one\n"
    assert not (found.study / "tune" / "state").exists()
    assert not list(found.path.glob(".*.tmp"))
    assert Record(found.path).n_lines == 1
    with found.lock():
        pass
    move_to(tmp_path / "here", monkeypatch)
    again = RunFolder.open(uri)
    assert not again.scores_file.exists()
    assert again.journal.read_text() == "one\n"


def test_what_was_not_taken_there_stays_where_the_record_is_the_one_that_is_here(uri: str) -> None:
    run = RunFolder.create(config_of(uri))
    with run.lock():
        run.study.mkdir()
        run.journal.write_text("one\n")
        index = shutil.copyfile(run.path / INDEX, run.path.parent / "index")
        withdraw(run, "ann-0001")
    shutil.copyfile(index, run.path / INDEX)  # as of a push that was killed before it noted what it did
    leave_unpushed(run)
    assert RunFolder.open(uri).scores_file.read_text() == "rows of ann-0001"
    with run.lock():
        pass
    assert Bucket(uri).read(f"{Bucket(uri).root}/scores.parquet") == b"rows of ann-0001"


def test_what_is_said_of_a_person_is_there_before_the_work_goes_on(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, bucket = RunFolder.create(config_of(uri)), Bucket(uri)
    written = []
    write = Bucket.write

    def noted(self: Bucket, path: str, content: bytes) -> None:
        written.append(path.removeprefix(f"{bucket.root}/"))
        write(self, path, content)

    monkeypatch.setattr(Bucket, "write", noted)
    monkeypatch.setattr(run_mirror, "PUSH_SECONDS", 1e6)
    with run.lock():
        run.chosen_file.write_text("x")
        written.clear()
        withdraw(run, "ann-0001")
        path = f"{bucket.root}/{GOVERNANCE}/records.jsonl"
        assert bucket.read(path) == Record(run.path).path.read_bytes()
        # Each time what is there is whole for a reader, though the next object may never come.
        files = [name.removeprefix(f"{GOVERNANCE}/") for name in written if name.startswith(GOVERNANCE)]
        assert files == ["head", "key", "records.jsonl", "head"]
        assert written.index("chosen.yaml") < written.index(f"{GOVERNANCE}/head")
        record = Record(run.path)
        record.append("consent", record.user_key("bob-0002"), "a file", state="absent", source="file")
        assert bucket.read(path).count(b"\n") == 1
    assert bucket.read(path).count(b"\n") == 2


def test_nothing_is_signed_off_there_before_it_is_done_there(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, bucket = RunFolder.create(config_of(uri)), Bucket(uri)
    monkeypatch.setattr(run_mirror, "PUSH_SECONDS", 1e6)
    with run.lock():
        run.chosen_file.write_text("x")
        withdraw(run, "ann-0001")
        run.chosen_file.unlink()
        record = Record(run.path)
        with monkeypatch.context() as away:
            away.setattr(Bucket, "delete_file", cannot_be_written)
            with pytest.raises(MilpError, match="cannot be written"):
                record.append("forgotten", record.user_key("ann-0001"), "the officer")
        assert bucket.read(f"{bucket.root}/{GOVERNANCE}/records.jsonl").count(b"\n") == 1
    assert bucket.read(f"{bucket.root}/{GOVERNANCE}/records.jsonl").count(b"\n") == 2


def cannot_be_written(self: Bucket, path: str) -> None:
    raise MilpError("the run cannot be written")


def test_a_fresh_start_empties_the_bucket_but_for_what_must_not_be_forgotten(uri: str) -> None:
    config = config_of(uri)
    run = RunFolder.create(config)
    with run.lock():
        (run.path / GOVERNANCE).mkdir()
        (run.path / GOVERNANCE / "record.jsonl").write_text("kept\n")
        run.chosen_file.write_text("x")
    store = run_store(run.store, config.personalize)
    assert store.uri.split("?")[0].endswith("/r/adapters")
    bucket = Bucket(store.uri)
    bucket.write(f"{bucket.root}/ab/cd/x", b"an adapter")
    again = RunFolder.create(config, fresh=True)
    assert (again.path / GOVERNANCE / "record.jsonl").read_text() == "kept\n"
    assert not again.chosen_file.exists()
    assert bucket.list(bucket.root, recursive=True) == []
    with again.lock():
        Mirror(uri).remove(())
        assert again.is_held()


def test_a_bucket_that_is_away_is_told_without_a_traceback(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = CliRunner().invoke(app, ["status", f"s3://nobody/runs/r?{s3}"])
    assert called.exit_code != 0
    with pytest.raises(MilpError, match=r"no such run folder"):
        RunFolder.open(f"s3://bucket/nothing/r?{s3}")
    with pytest.raises(MilpError, match=r"names no run"):
        RunFolder.at(f"s3://bucket?{s3}")


@pytest.mark.parametrize("place", ["runs", "users"])
def test_what_is_no_run_is_refused_before_anything_of_it_is_here(
    uri: str, tmp_path: Path, place: str
) -> None:
    root, options = uri.split("/r?")
    bucket = Bucket(f"{root}/runs/r?{options}")
    bucket.write(f"{bucket.root}/versions.json", b'{"milp_ray": "1.0"}')
    bucket.write(f"{bucket.root}/adapters/ab/cd/x", b"an adapter")
    users = Bucket(f"{root}/users?{options}")
    bucket.write(f"{users.root}/users.jsonl", b'{"user_id": "ann-0001", "history": ["my pin is 4711"]}')
    bucket.write(f"{users.root}/versions.json", b"[]")  # anybody may have a file of this name
    mistyped = f"{root}/{place}?{options}"
    for command in (["status", mistyped], ["generate", mistyped, "--user", "ann-0001", "hi"]):
        called = CliRunner().invoke(app, command)
        assert called.exit_code == 2
        assert "is not a run folder" in called.output
        assert options not in called.output
    with pytest.raises(MilpError, match="choose another name"):
        RunFolder.create(config_of(mistyped, name=place, output_dir=f"{root}?{options}"))
    assert not list((tmp_path / "here").rglob("*"))


def test_copies_are_for_their_owner_alone(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder.create(config_of(uri))
    move_to(tmp_path / "there" / "runs", monkeypatch)
    for path in (run.path, RunFolder.open(uri).path):
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert path.parent.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_whole_run_goes_on_on_another_machine(
    s3: str, tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_small_run(tmp_path, tiny_llama_dir, name="r", output_dir=f"s3://bucket/whole?{s3}")

    def milp(*arguments: str) -> str:
        command = [sys.executable, "-m", "milp_ray", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    milp("search", str(config))
    move_to(tmp_path / "there", monkeypatch)
    output = milp("run", str(config))
    assert "2 adapters made" in output
    place = f"s3://bucket/whole/r?{s3}"
    move_to(tmp_path / "a third", monkeypatch)
    assert milp("generate", place, "--user", "u-0", "Which pet?").strip()
    assert "2 trials" in milp("study", "status", place) or "2 completed" in milp("study", "status", place)
    assert json.loads(milp("status", place, "--json"))["state"] == "succeeded"
    assert not (RunFolder.at(place).path / "adapters").exists()
    milp("forget", place, "u-0", "--yes")
    move_to(tmp_path / "a fourth", monkeypatch)
    refused = CliRunner().invoke(app, ["generate", place, "--user", "u-0", "Which pet?"])
    assert refused.exit_code != 0
