"""Forgetting: nothing of the user is left, nothing of the others changes, and a kill costs nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from governed_run import (
    IDS,
    Governed,
    audit,
    files_of,
    forget,
    write_users,
)

from milp_ray.errors import MilpError
from milp_ray.evaluation.scores import read_scores, read_users_scored, write_scores
from milp_ray.personalize.batch import StreamedSplits
from milp_ray.personalize.governance.audit import audit_forgotten
from milp_ray.personalize.governance.consent import Gate, NoSuchUserError
from milp_ray.personalize.governance.items import find_user
from milp_ray.personalize.governance.record import Record
from milp_ray.personalize.store import hash_id
from milp_ray.pipeline.answering import generate
from milp_ray.rundir import RunFolder
from milp_ray.search.journal import read_study
from milp_ray.search.observations import observations, standard_errors
from milp_ray.users.problems import Problem
from milp_ray.users.sources import named_files
from milp_ray.users.stream import UserStream

STEPS = [
    "record",
    "adapters",
    "temporary files",
    "own files",
    "leakage audit",
    "report",
    "tables",
    "lines",
    "search",
    "facts",
    "dataset hash",
    "report again",
    "audit",
    "sign off",
]


@pytest.mark.parametrize("user_id", IDS)
def test_after_forgetting_the_audit_finds_nothing_where_it_found_something_everywhere_before(
    governed: Governed, user_id: str
) -> None:
    before = audit(governed, user_id)
    names = {Path(where).relative_to(governed.run.path).parts[0] for where, _ in before.found}
    assert {"adapters", "scores.parquet", "scores", "failed.jsonl", "failed_evaluation.jsonl"} <= names
    assert {"report", "summary.json", "checkpoints"} <= names
    assert not before.is_clean

    result = forget(governed, user_id)
    after = audit(governed, user_id)
    assert after.is_clean, after.found
    assert after.sources == [governed.users]
    assert after.n_needles == 9
    assert result.audit is not None
    assert result.audit.is_clean
    assert audit_forgotten(governed.run, governed.store).is_clean


def test_the_others_keep_every_byte_row_and_value(governed: Governed) -> None:
    run, gone = governed.run, IDS[0]
    changing = (
        "scores",
        "failed",
        "study",
        "versions",
        "summary",
        "report",
        "governance",
        ".lock",
        ".scores",
    )
    mine = hash_id(gone)
    before = files_of(run.path, *changing)
    lines = run.failed_file.read_bytes().splitlines()
    scores, layout = read_scores(run.scores_file), pq.ParquetFile(run.scores_file).schema_arrow
    forget(governed, gone)
    assert files_of(run.path, *changing) == {name: b for name, b in before.items() if mine not in name}
    assert run.failed_file.read_bytes().splitlines() == [line for line in lines if gone.encode() not in line]
    kept = read_scores(run.scores_file)
    expected = scores.filter([u != gone for u in scores["user_id"].to_pylist()])
    assert kept.equals(expected)
    assert pq.ParquetFile(run.scores_file).schema_arrow.equals(layout)
    assert list(read_users_scored(run.scores_file)) == [u for u in IDS if u != gone]
    for other in IDS[1:]:
        assert governed.store.verify(other).version == 2


def test_tables_with_row_groups_of_one_user_and_empty_ones_can_be_forgotten_from(governed: Governed) -> None:
    whole = read_scores(governed.run.scores_file)
    groups = [whole.slice(3 * place, 3) for place in range(len(IDS))]
    write_scores(governed.run.scores_file, [whole.slice(0, 0), *groups], dict.fromkeys(IDS, "f"))
    for place, user_id in enumerate(IDS, start=1):
        forget(governed, user_id)
        assert read_scores(governed.run.scores_file).equals(whole.slice(3 * place))
        assert list(read_users_scored(governed.run.scores_file)) == list(IDS[place:])


def test_a_longer_id_that_begins_with_the_forgotten_one_is_another_user(governed: Governed) -> None:
    forget(governed, "u-1")
    assert governed.store.versions("u-17") == [1, 2]
    assert "u-17" in read_users_scored(governed.run.scores_file)
    assert "u-17" in governed.run.failed_file.read_text()


def test_a_forgotten_user_is_told_as_one_who_never_was(governed: Governed) -> None:
    forget(governed, IDS[0])
    for options in ({}, {"personal": False}):
        with pytest.raises(NoSuchUserError, match='there is no user "ann-0001" in') as gone:
            generate(governed.run, governed.config, IDS[0], "Who am I?", **options)
    with pytest.raises(NoSuchUserError) as unknown:
        generate(governed.run, governed.config, "nobody-1", "Who am I?")
    assert str(unknown.value).replace("nobody-1", "ann-0001") == str(gone.value)


def test_a_forgotten_user_who_is_still_in_the_file_is_not_trained_again(governed: Governed) -> None:
    forget(governed, IDS[0])
    gate = Gate(Record(governed.run.path), "assumed")
    users = [find_user(governed.config.users, 0, user_id) for user_id in IDS]
    assert [user.user_id for user in gate.admit(u for u in users if u is not None)] == list(IDS[1:])
    assert gate.refused == {"forgotten": 1}


def test_a_broken_record_of_a_forgotten_user_does_not_bring_the_id_back(governed: Governed) -> None:
    forget(governed, IDS[0])
    write_users(governed.users, {"user_id": IDS[0], "history": 3}, {"user_id": IDS[1], "history": 3})
    gate = Gate(Record(governed.run.path), "assumed")
    stream = UserStream(named_files(governed.config.users))
    batch = StreamedSplits(stream, governed.config.users.split, gate, governed.store)
    assert [problem.user_id for problem in batch if isinstance(problem, Problem)] == [IDS[1]]
    assert gate.refused == {"forgotten": 1}


def test_starting_a_run_over_does_not_bring_back_who_was_forgotten(governed: Governed) -> None:
    forget(governed, IDS[0])
    run = RunFolder.create(governed.config, fresh=True)
    assert not run.scores_file.exists()
    assert Record(run.path).is_forgotten(IDS[0])
    assert not Record(run.path).is_forgotten(IDS[1])


def test_the_record_is_signed_off_and_says_nothing_about_the_user(governed: Governed) -> None:
    result = forget(governed, IDS[0])
    record = Record(governed.run.path)
    text = record.path.read_text()
    [begun, signed] = [json.loads(line) for line in text.splitlines()]
    assert (begun["event"], signed["event"], signed["by"]) == ("forget_begun", "forgotten", "the officer")
    assert result.line == signed["n"] == 2
    assert signed["removed"]["versions of the adapter"] == 2
    assert signed["audit"]["found"] == 0
    assert not any(trace in text for trace in (IDS[0], hash_id(IDS[0]), "Peccadillo"))
    assert (record.path.parent / "key").stat().st_mode & 0o777 == 0o600


def test_a_probe_users_values_go_and_the_means_of_the_search_stay(governed: Governed) -> None:
    before = read_study(governed.run.journal)
    forget(governed, IDS[1])
    after = read_study(governed.run.journal)
    assert not (governed.run.study / "tune").exists()
    for old, new in zip(before.completed, after.completed, strict=True):
        assert new.metrics["validation_loss"] == old.metrics["validation_loss"]
        assert new.metrics["per_user"]["rouge_l"][1] is None
        assert new.metrics["per_user"]["rouge_l"][0::2] == old.metrics["per_user"]["rouge_l"][0::2]
    errors = standard_errors(observations(after.completed, ("rouge_l",)), ("rouge_l",))
    assert errors is not None
    assert errors["rouge_l"] >= 0
    probes = governed.run.facts()["probe_users"]
    assert (probes[0], probes[2]) == (IDS[0], IDS[2])
    assert probes[1].startswith("forgotten-")
    assert governed.run.facts()["dataset_hash"] is None


def test_a_dry_run_changes_nothing_and_counts_what_would_go(governed: Governed) -> None:
    before = files_of(governed.run.path)
    result = forget(governed, IDS[0], dry_run=True)
    assert files_of(governed.run.path) == before
    counts = {removed.what: removed.count for removed in result.removed}
    assert counts["versions of the adapter"] == 2
    assert counts["rows"] == 3 + 1 + 3 + 1
    assert counts["lines"] == 2
    assert result.line is None


def test_it_can_be_repeated_and_works_for_someone_who_is_not_there(governed: Governed) -> None:
    forget(governed, IDS[0])
    before = files_of(governed.run.path, "governance")
    again = forget(governed, IDS[0])
    assert again.was_forgotten
    assert again.audit is not None
    assert again.audit.is_clean
    assert files_of(governed.run.path, "governance") == before
    assert forget(governed, "never seen").line is not None
    assert Record(governed.run.path).is_forgotten("never seen")


KILLED = """
import os, signal, sys
from pathlib import Path
from milp_ray.personalize.governance.forget import forget_user
from milp_ray.personalize.store import run_store
from milp_ray.rundir import RunFolder
run, steps = RunFolder.open(sys.argv[1]), sys.argv[3:]
config = run.config()
def tell(step):
    if step == steps[0]:
        steps.pop(0)
        os.kill(os.getpid(), signal.SIGSTOP)
with run.lock():
    store = run_store(run.adapters, config.personalize)
    forget_user(run, config, store, sys.argv[2], by="x", tell=tell, rebuild=lambda run: None)
"""


def test_killed_between_any_two_steps_the_same_call_ends_the_work(governed: Governed) -> None:
    """One process, stopped before each step in turn and looked at there, and at last killed."""
    user_id, run = IDS[0], governed.run
    for kill_before in ("adapters", "tables", "search", "facts", "sign off"):
        arguments = [sys.executable, "-c", KILLED, str(run.path), user_id, kill_before]
        process = subprocess.Popen(arguments, cwd=Path.cwd())
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), kill_before
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert Record(run.path).is_forgotten(user_id)
        with pytest.raises(NoSuchUserError):
            generate(run, governed.config, user_id, "Who am I?")
        found = audit(governed, user_id)
        assert found.unfinished
        assert not found.is_clean
    remade: list[RunFolder] = []
    forget(governed, user_id, rebuild=remade.append)
    assert remade == [run]  # it was there when the first call began
    assert audit(governed, user_id).is_clean
    events = [json.loads(line)["event"] for line in Record(run.path).path.read_text().splitlines()]
    assert events == ["forget_begun", "forgotten"]


@pytest.mark.parametrize("step", STEPS)
def test_an_error_at_any_step_leaves_a_run_that_can_be_gone_on_with(governed: Governed, step: str) -> None:
    def tell(name: str) -> None:
        if name == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        forget(governed, IDS[1], tell=tell, rebuild=lambda run: None)
    assert not audit(governed, IDS[1]).is_clean
    forget(governed, IDS[1])
    assert audit(governed, IDS[1]).is_clean
    per_user = [trial.metrics["per_user"]["rouge_l"] for trial in read_study(governed.run.journal).completed]
    assert all([value is None for value in values] == [False, True, False] for values in per_user)
    for other in (IDS[0], *IDS[2:]):
        assert governed.store.verify(other).version == 2


def test_what_cannot_be_taken_out_is_named_and_nothing_is_signed_off(governed: Governed) -> None:
    odd = governed.run.path / "notes.txt"
    odd.write_text(f"ask {IDS[0]} about it")
    with pytest.raises(MilpError, match=r"notes\.txt: the id") as told:
        forget(governed, IDS[0])
    assert "about it" not in str(told.value)
    assert Record(governed.run.path).is_forgotten(IDS[0])
    assert not Record(governed.run.path).state.forgotten
    odd.unlink()
    assert forget(governed, IDS[0]).line == 2


def test_a_run_that_is_at_work_is_not_touched(governed: Governed) -> None:
    before = files_of(governed.run.path)
    with governed.run.lock(), pytest.raises(MilpError, match="another milp-ray process works on"):
        forget(governed, IDS[0])
    assert files_of(governed.run.path) == before
