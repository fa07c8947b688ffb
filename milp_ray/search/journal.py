"""The journal of a study: an append-only file of JSON lines, each written before the search goes on.

Written means handed to the operating system, which keeps it whatever becomes of this process. A thread then
sees to it that it reaches the disk: waiting for that would block Tune's controller for as long as other
programs write much.

The journal is the truth of a search. A study killed at any moment resumes from it alone: what
:func:`replay` makes of its lines is all the state there is. Events, in the order in which a trial meets them:

    study_started    digest of what decides the results, the space, objectives, seed
    users_described  values (traits of the probe users, by which similar users are known; no texts)
    session_started  n_slots (trials that may run at once): a process takes the study up
    slots_changed    n_slots, from now on: nodes came or went
    batch_asked      batch, n, pending (indices of the trials that are proposed around, results not used)
    batch_proposed   batch, seconds from asking to the answer
    trial_suggested  index, batch, raw factors, canonical layout, key,
                     generator (sobol, warm_start, saas_nehvi, random)
    trial_started    index
    trial_rung       index, rung, epoch, values (of partial training, never taken for final ones)
    trial_completed  index, metrics (objective values, SEMs over the probe users, extras)
    trial_stopped    index, rung, epoch, seconds (stopped early; it has no values)
    trial_failed     index, reason (class and place of the error, never a text of a user)
    session_ended    max_block_seconds (the longest that Tune's controller waited for the searcher)
    study_finished   reason

A line is a line once its newline is written: a last line without one was cut off by a crash, is ignored, and
is removed before the next line is appended. Any other damage is an error that names the line. Where a disk is
full the lines that it has no room for are taken back, so that the journal ends with a whole one.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal

from milp_ray.atomic_files import sync_folder
from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.search.rungs import RungRecord

BY_USER = "_by_user"  # the end of the names of values that are one a probe user

TrialStatus = Literal["suggested", "started", "completed", "stopped", "failed"]
Event = Mapping[str, Any]


@dataclass(frozen=True)
class TrialRecord:
    """What the journal knows about one trial."""

    index: int
    batch: int  # 0: the initial trials; k ≥ 1: the k-th batch of the surrogate
    raw: Mapping[str, Any]
    layout: CanonicalLayout
    generator: str
    status: TrialStatus = "suggested"
    metrics: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None
    time: str | None = None  # when it ended, UTC

    @property
    def has_ended(self) -> bool:
        """Whether the trial is over, for good or ill."""
        return self.status in ("completed", "stopped", "failed")


@dataclass(frozen=True)
class AskedBatch:
    """A batch that was asked for: how many layouts, and which trials were pending when it was."""

    batch: int
    n: int
    pending: tuple[int, ...]


@dataclass
class StudyState:
    """A study as its journal tells it; ``trials`` are in the order of their index.

    ``keys`` are the canonical keys of all trials, whatever became of them; ``asked`` is the batch that was
    asked for last and has not been proposed; ``rungs`` are the values of partial training, as journalled.
    ``probe_traits`` are the probe users' traits by name, in their order (``None`` for one who was forgotten);
    a study of an earlier version has none. ``unfinished`` and ``ended`` are indices of trials, the latter in
    the order of their ends: what is asked after every event must not take the longer the more trials there
    are.
    """

    header: dict[str, Any] | None = None
    trials: list[TrialRecord] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    asked: AskedBatch | None = None
    rungs: list[RungRecord] = field(default_factory=list)
    probe_traits: dict[str, list[float | None]] = field(default_factory=dict)
    finished: str | None = None  # the reason, once the study is finished
    unfinished: set[int] = field(init=False)
    ended: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.unfinished = {trial.index for trial in self.trials if not trial.has_ended}
        self.ended = [trial.index for trial in self.trials if trial.has_ended]
        self._counts = Counter(trial.status for trial in self.trials)

    def apply(self, event: Event) -> None:
        """Take one event in.

        A second end of a trial is ignored: what was recorded first stands.

        Raises:
            LookupError, ValueError, TypeError, AttributeError, MilpError: the event does not fit.
        """
        kind = event["event"]
        if kind == "study_started":
            if self.header is not None:
                raise ValueError("a second study_started")
            self.header = dict(event)
        elif kind == "trial_suggested":
            if event["index"] != len(self.trials):
                raise ValueError(f"trial {event['index']} suggested where {len(self.trials)} is next")
            layout = CanonicalLayout.from_dict(event["layout"])
            self.trials.append(
                TrialRecord(event["index"], event["batch"], dict(event["raw"]), layout, event["generator"])
            )
            self.keys.add(layout.key)
            self.unfinished.add(event["index"])
            self._counts["suggested"] += 1
            self.finished = None  # a finished study that was given more trials goes on
        elif kind in ("trial_started", "trial_completed", "trial_stopped", "trial_failed"):
            self._apply_to_trial(kind, event)
        elif kind == "batch_asked":
            self.asked = AskedBatch(event["batch"], event["n"], tuple(event["pending"]))
        elif kind == "batch_proposed":
            self.asked = None
        elif kind == "trial_rung":
            self.rungs.append(RungRecord.from_dict({**event, **event["values"]}, trial=event["index"]))
        elif kind == "users_described":
            values = event["values"].items()
            self.probe_traits = {name.removesuffix(BY_USER): list(own) for name, own in values}
        elif kind in ("session_started", "slots_changed", "session_ended"):
            pass  # of interest to whoever measures the search, not to its state
        elif kind == "study_finished":
            self.finished = event["reason"]
        else:
            raise ValueError(f"unknown event {kind!r}")

    def _apply_to_trial(self, kind: str, event: Event) -> None:
        index = event["index"]
        if not 0 <= index < len(self.trials):
            raise ValueError(f"trial {index} was never suggested")
        trial = self.trials[index]
        if trial.has_ended:
            return
        changes: dict[str, Any] = {"status": kind.removeprefix("trial_")}
        if kind == "trial_completed":
            changes |= {"metrics": dict(event["metrics"]), "time": event.get("time")}
        elif kind == "trial_stopped":
            spent = {name: event[name] for name in ("rung", "epoch", "seconds")}
            changes |= {"metrics": spent, "time": event.get("time")}
        elif kind == "trial_failed":
            changes |= {"reason": event["reason"], "time": event.get("time")}
        changed = self.trials[index] = replace(trial, **changes)
        self._counts[trial.status] -= 1
        self._counts[changed.status] += 1
        if changed.has_ended:
            self.unfinished.remove(index)
            self.ended.append(index)

    def count(self, status: TrialStatus) -> int:
        """How many trials are as ``status`` says."""
        return self._counts[status]

    @property
    def completed(self) -> list[TrialRecord]:
        """Trials with values, in the order of their index."""
        return [trial for trial in self.trials if trial.status == "completed"]


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events in the journal; a cut-off last line is left out. No file: no events.

    Raises:
        MilpError: a line is damaged; the message names file and line.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [_parse(line, path, number) for number, line in enumerate(lines[:-1], start=1)]


def replay(events: Iterable[Event], path: Path) -> StudyState:
    """The state that the events add up to.

    Raises:
        MilpError: an event does not fit those before it; the message names file and line.
    """
    state = StudyState()
    for number, event in enumerate(events, start=1):
        try:
            state.apply(event)
        except (LookupError, ValueError, TypeError, AttributeError, MilpError) as error:
            raise _damaged(path, number, f"{type(error).__name__}: {error}") from error
    return state


def read_study(path: Path) -> StudyState:
    """The state of the study whose journal is at ``path``.

    Raises:
        MilpError: the journal is damaged.
    """
    return replay(read_events(path), path)


class Journal:
    """The journal, open for appending by one process at a time.

    Raises:
        MilpError: the journal is damaged, or another process is writing it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise MilpError(
                f"{path} is being written by another search: wait for it to end or stop it"
            ) from error
        _cut_off_partial_line(path)
        sync_folder(path.parent)
        self.state = read_study(path)
        self._failure: OSError | None = None
        self._unsynced, self._is_closing = threading.Event(), False
        self._syncer = threading.Thread(target=self._sync, name="journal-sync", daemon=True)
        self._syncer.start()

    def append(self, event: str, **fields: Any) -> None:
        """Write one event and take it into :attr:`state`.

        Raises:
            ValueError: a number is not finite, or the event does not fit the state.
            MilpError: the disk is full or fails; this journal object is of no use any more.
        """
        self.append_all([{"event": event, **fields}])

    def append_all(self, events: Iterable[Event]) -> None:
        """Write several events in one go; a kill in the middle of it leaves the first of them, whole ones.

        Raises:
            ValueError, MilpError: as :meth:`append`.
        """
        self._check()
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        lines = [json.dumps({**e, "time": time}, allow_nan=False, separators=(",", ":")) for e in events]
        for line in lines:
            self.state.apply(json.loads(line))
        self._write("".join(line + "\n" for line in lines).encode())
        self._unsynced.set()

    def close(self) -> None:
        """Wait until everything is on the disk, close the file and let another process write.

        Raises:
            MilpError: the disk is full or fails, and nobody was told of it yet.
        """
        if self._file.closed:
            return
        is_told = self._failure is not None
        self._is_closing = True
        self._unsynced.set()
        self._syncer.join()
        self._sync_once()  # what was written while it last did
        self._file.close()
        if not is_told:
            self._check()

    def _write(self, data: bytes) -> None:
        whole = os.fstat(self._file.fileno()).st_size
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            self._failure = error
            os.ftruncate(self._file.fileno(), whole)
            self._check()

    def _sync(self) -> None:
        """Bring to the disk what has been written, again and again."""
        while not self._is_closing:
            self._unsynced.wait()
            self._unsynced.clear()
            self._sync_once()

    def _sync_once(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:  # a shared filesystem may tell only now that it is full
            self._failure = self._failure or error

    def _check(self) -> None:
        if self._failure is not None:
            said = os.strerror(self._failure.errno or 0)
            raise MilpError(
                f"{self.path} cannot be written: {said}. Make room on its disk, or mend it; every trial that "
                "ended before is kept, and the same command goes on from there"
            ) from self._failure

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise _damaged(path, number, "it is not JSON") from error
    if not isinstance(entry, dict) or "event" not in entry:
        raise _damaged(path, number, "it is not an event")
    return entry


def _damaged(path: Path, number: int, why: str) -> MilpError:
    return MilpError(
        f"{path}, line {number} is damaged ({why}). A journal is only ever appended to: restore the file "
        "from a copy, or remove it to start the search afresh"
    )


def _cut_off_partial_line(path: Path) -> None:
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
            os.fsync(file.fileno())
