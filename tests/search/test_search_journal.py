"""The journal: the truth of a study, whatever happens to the process that writes it."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.search.journal import Journal, read_study


def suggested(index: int, mask: tuple[bool, ...] = (True, False), batch: int = 0) -> dict[str, Any]:
    layout = CanonicalLayout(mask, 4)
    return {
        "event": "trial_suggested",
        "index": index,
        "batch": batch,
        "raw": {"layer_0": mask[0], "layer_1": mask[1], "n_loras": 2, "rank": 4},
        "layout": layout.to_dict(),
        "key": layout.key,
        "generator": "sobol",
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal with one completed, one failed and one started trial."""
    path = tmp_path / "study" / "journal.jsonl"
    with Journal(path) as journal:
        journal.append("study_started", digest="d", objectives=["validation_loss", "rouge_l"], n_initial=3)
        journal.append_all([suggested(0), suggested(1, (False, True)), suggested(2, (True, True))])
        for index in range(3):
            journal.append("trial_started", index=index)
        journal.append("trial_completed", index=0, metrics={"validation_loss": 0.1 + 0.2, "rouge_l": 7.5})
        journal.append("trial_failed", index=1, reason="OutOfMemoryError")
    return path


def test_what_is_written_is_read(path: Path) -> None:
    state = read_study(path)
    assert [trial.status for trial in state.trials] == ["completed", "failed", "started"]
    assert state.trials[0].metrics["validation_loss"] == 0.1 + 0.2
    assert state.trials[1].reason == "OutOfMemoryError"
    assert state.trials[2].layout == CanonicalLayout((True, True), 4)
    assert state.keys == {"10-r4", "01-r4", "11-r4"}
    assert state.header is not None
    assert state.finished is None


def test_who_has_ended_is_known_without_looking_at_all_trials(path: Path) -> None:
    with Journal(path) as journal:
        assert journal.state.unfinished == {2}
        journal.append("trial_completed", index=2, metrics={"validation_loss": 1.0, "rouge_l": 2.0})
        journal.append("trial_failed", index=2, reason="a second end")
        journal.append_all([suggested(3, (False, False))])
        assert journal.state.unfinished == {3}
        assert journal.state.ended == [0, 1, 2]
        counts = [journal.state.count(status) for status in ("suggested", "started", "completed", "failed")]
        assert counts == [1, 0, 2, 1]
        assert read_study(path) == journal.state


def test_what_probe_users_are_known_by_is_kept_and_may_be_blank(path: Path) -> None:
    assert read_study(path).probe_traits == {}, "a study of an earlier version"
    with Journal(path) as journal:
        journal.append("users_described", values={"log_words_by_user": [5.5, None]})
    assert read_study(path).probe_traits == {"log_words": [5.5, None]}


def test_no_file_is_a_study_that_has_not_begun(tmp_path: Path) -> None:
    assert read_study(tmp_path / "journal.jsonl").header is None


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_cut_off_last_line_is_ignored_and_removed_before_appending(path: Path, cut: int) -> None:
    path.write_bytes(path.read_bytes()[:-cut])
    assert [trial.status for trial in read_study(path).trials] == ["completed", "started", "started"]
    with Journal(path) as journal:
        journal.append("trial_failed", index=1, reason="again")
    assert read_study(path).trials[1].reason == "again"
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_damaged_line_in_the_middle_is_named(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    lines[2] = lines[2][:20] + "\n"
    path.write_text("".join(lines))
    with pytest.raises(MilpError, match=r"journal\.jsonl, line 3"):
        read_study(path)


def test_a_missing_line_in_the_middle_is_named(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    del lines[1]
    path.write_text("".join(lines))
    with pytest.raises(MilpError, match="line 2"):
        read_study(path)


def test_a_line_with_a_value_of_another_kind_is_named(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b'{"event":"users_described","values":[1]}\n')
    with pytest.raises(MilpError, match=r"journal.jsonl, line 10 is damaged \(AttributeError"):
        read_study(path)


def test_the_first_end_of_a_trial_stands(path: Path) -> None:
    with Journal(path) as journal:
        journal.append("trial_completed", index=1, metrics={"validation_loss": 1.0, "rouge_l": 1.0})
    assert read_study(path).trials[1].status == "failed"


def test_two_processes_cannot_write_one_journal(path: Path) -> None:
    with Journal(path), pytest.raises(MilpError, match="another search"):
        Journal(path)
    Journal(path).close()


def test_a_number_that_json_does_not_have_is_refused_and_not_written(path: Path) -> None:
    before = path.read_bytes()
    with Journal(path) as journal, pytest.raises(ValueError):
        journal.append("trial_completed", index=2, metrics={"validation_loss": float("nan")})
    assert path.read_bytes() == before
    assert read_study(path).trials[2].status == "started"


def test_a_finished_study_that_gets_more_trials_is_not_finished(path: Path) -> None:
    with Journal(path) as journal:
        journal.append("study_finished", reason="all trials have ended")
        assert journal.state.finished == "all trials have ended"
        journal.append_all([suggested(3, (False, False), batch=1)])
        assert journal.state.finished is None


class FullDisk:
    """A file on a disk that has room for some more bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self._room = file, room

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> int:
        if self._room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        n_written = self._file.write(data[: self._room])
        self._room -= n_written
        return int(n_written)


def test_on_a_full_disk_no_line_is_written_in_part_and_with_room_the_study_goes_on(path: Path) -> None:
    before = path.read_bytes()
    ends = {"metrics": {"validation_loss": 1.0, "rouge_l": 2.0}}
    with Journal(path) as journal:
        journal._file = FullDisk(journal._file, room=40)
        with pytest.raises(MilpError, match=r"cannot be written: No space left.*Make room.*same command"):
            journal.append("trial_completed", index=2, **ends)
        assert path.read_bytes() == before
        with pytest.raises(MilpError, match="cannot be written"):
            journal.append("trial_completed", index=2, **ends)
    with Journal(path) as journal:
        assert journal.state.trials[2].status == "started", "its end was not recorded: it is run again"
        journal.append("trial_completed", index=2, **ends)
    assert len(read_study(path).completed) == 2


def test_a_disk_that_tells_late_is_told_of_at_the_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    journal = Journal(path)
    monkeypatch.setattr(os, "fsync", full)
    journal.append("trial_started", index=2)
    with pytest.raises(MilpError, match="No space left"):
        journal.close()


def test_what_is_written_while_the_disk_is_busy_is_on_it_once_the_journal_is_closed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_busy, may_go_on = threading.Event(), threading.Event()
    on_disk: list[int] = []
    sync = os.fsync

    def slow(descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        is_busy.set()
        may_go_on.wait(60)
        sync(descriptor)
        on_disk.append(size)

    journal = Journal(path)
    monkeypatch.setattr(os, "fsync", slow)
    journal.append("trial_started", index=2)
    assert is_busy.wait(60)
    journal.append("trial_failed", index=2, reason="OutOfMemoryError")
    closing = threading.Thread(target=journal.close)
    closing.start()
    while not journal._is_closing:
        time.sleep(0.01)
    may_go_on.set()
    closing.join()
    assert on_disk[-1] == path.stat().st_size
