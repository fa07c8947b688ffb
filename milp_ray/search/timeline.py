"""When a study worked, waited and stood idle, from the times in its journal. Pure functions of the events.

Beside the events of a trial (:mod:`milp_ray.search.journal`) these tell of time, and any of them may be
missing:

    session_started  n_slots: trials that can run at once; n_processes: in how many processes, as many where
                     it is missing; Tune has started
    slots_changed    n_slots, from now on, each in a process of its own
    trial_rung       index, rung, epoch, values: a trial has reached a rung
    trial_stopped    index, rung, epoch, seconds: a trial was stopped at a rung and has no values
    batch_proposed   batch, seconds: the surrogate has proposed a batch
    session_ended    max_block_seconds: the longest time that Tune's controller was held up

A session that was killed has no end of its own: it ends with its last event. Times are seconds since 1970,
UTC.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

Event = Mapping[str, Any]
LifeStatus = Literal["waiting", "running", "completed", "stopped", "failed"]

_BEFORE_A_SESSION = ("users_described", "session_started")
_ENDS: dict[str, LifeStatus] = {
    "trial_completed": "completed",
    "trial_stopped": "stopped",
    "trial_failed": "failed",
}


@dataclass(frozen=True, slots=True)
class TrialLife:
    """One trial in time. ``started`` is its last start: one that a killed session left is started again."""

    index: int
    status: LifeStatus
    suggested: float
    started: float | None = None
    ended: float | None = None
    # Of work, as the trial measured them: its part, where a process is shared; a failed one tells none.
    seconds: float | None = None
    rung: int | None = None  # the last one reached
    epoch: int | None = None  # of that rung


@dataclass(frozen=True, slots=True)
class Session:
    """One run of Tune on the study; ``has_ended``: it said so itself, and was not killed or still runs."""

    start: float
    end: float
    n_slots: int  # at its end
    n_processes: int  # fewer than slots where trials share them
    has_ended: bool = False
    max_block_seconds: float | None = None

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Proposals:
    """Batches that were proposed: how many, and the seconds that took."""

    n_batches: int
    seconds: float
    longest_seconds: float


def event_times(events: Sequence[Event]) -> list[float]:
    """The time of each event, never before that of an earlier one: a machine's clock may be set back."""
    times: list[float] = []
    for event in events:
        time = datetime.fromisoformat(event["time"]).timestamp()
        times.append(max(time, times[-1]) if times else time)
    return times


def utc_text(time: float | None) -> str | None:
    """A time as the journal writes it."""
    return None if time is None else datetime.fromtimestamp(time, UTC).isoformat(timespec="milliseconds")


def sessions(events: Sequence[Event]) -> list[Session]:
    """The study's sessions in order; none before Tune has started."""
    found: list[Session] = []
    for event, time in zip(events, event_times(events), strict=True):
        if event["event"] == "users_described":
            continue  # once, before a session; no part of the one before
        if event["event"] == "session_started":
            n_slots = int(event["n_slots"])
            found.append(Session(time, time, n_slots, int(event.get("n_processes", n_slots))))
        elif found and not found[-1].has_ended:
            found[-1] = replace(found[-1], end=time)
            if event["event"] == "slots_changed":
                n_slots = int(event["n_slots"])
                found[-1] = replace(found[-1], n_slots=n_slots, n_processes=n_slots)
            if event["event"] == "session_ended":
                block = event.get("max_block_seconds")
                found[-1] = replace(found[-1], has_ended=True, max_block_seconds=block)
    return found


def trial_lives(events: Sequence[Event]) -> list[TrialLife]:
    """Every trial in time, in the order of the index.

    A trial that was started and has not ended runs, unless a session has ended or another one has begun
    since: then it waits to be started again. What the journal says of a trial after its end is ignored.
    """
    lives: list[TrialLife] = []
    for event, time in zip(events, event_times(events), strict=True):
        kind = event["event"]
        if kind == "trial_suggested":
            lives.append(TrialLife(len(lives), "waiting", suggested=time))
        elif kind in ("session_started", "session_ended"):
            lives = [replace(life, status="waiting") if life.status == "running" else life for life in lives]
        elif "index" in event and lives[event["index"]].ended is None:
            lives[event["index"]] = _after(lives[event["index"]], event, time)
    return lives


def _after(life: TrialLife, event: Event, time: float) -> TrialLife:
    kind = event["event"]
    if kind == "trial_started":
        return replace(life, status="running", started=time)
    if kind in ("trial_rung", "trial_stopped"):
        life = replace(life, rung=event.get("rung"), epoch=event.get("epoch"))
    if kind in _ENDS:
        seconds = event.get("metrics", event).get("seconds")
        return replace(life, status=_ENDS[kind], ended=time, seconds=seconds)
    return life


def proposals(events: Sequence[Event]) -> Proposals | None:
    """What proposing took; ``None`` where no batch was proposed."""
    seconds = [float(event["seconds"]) for event in events if event["event"] == "batch_proposed"]
    return Proposals(len(seconds), sum(seconds), max(seconds)) if seconds else None


def idle_share(events: Sequence[Event], n_trials: int | None = None) -> float | None:
    """Share of slot-time in which a slot stands free and no suggested trial waits for it.

    Counted inside sessions (the time between them does not count), and while trials are still to be
    proposed: in a finished study until its last suggestion, since the slots that empty at a study's very end
    are nobody's fault. A free slot that a suggested trial waits for is being filled, not idle: of so many
    slots, as many are idle as exceed the trials that are suggested and have not ended.

    Args:
        events: of one study, in the order of the journal.
        n_trials: how many trials there will be: tells for an unfinished study whether more are to be proposed
            now. ``None``: as many as were suggested.

    Returns:
        Between 0 and 1; ``None`` where there is no such slot-time.
    """
    times = event_times(events)
    to_come = _are_trials_to_come(events, n_trials)
    total = idle = 0.0
    n_slots = 0  # of the session that is open
    unfinished: set[int] = set()
    n_suggested = 0
    for position, event in enumerate(events):
        kind = event["event"]
        if kind in ("session_started", "slots_changed"):
            n_slots = int(event["n_slots"])
        elif kind in ("session_ended", "study_finished"):
            n_slots = 0
        elif kind == "trial_suggested":
            unfinished.add(n_suggested)
            n_suggested += 1
        elif kind in _ENDS:
            unfinished.discard(event["index"])
        is_last = position + 1 == len(events)
        if is_last or not to_come[position] or events[position + 1]["event"] in _BEFORE_A_SESSION:
            continue
        seconds = times[position + 1] - times[position]
        total += n_slots * seconds
        idle += max(0, n_slots - len(unfinished)) * seconds
    return idle / total if total > 0 else None


def _are_trials_to_come(events: Sequence[Event], n_trials: int | None) -> list[bool]:
    """For each event, whether more trials were to be proposed just after it."""
    n_suggested = sum(event["event"] == "trial_suggested" for event in events)
    still = n_trials is not None and n_suggested < n_trials
    found = []
    for event in reversed(events):
        found.append(still)
        if event["event"] == "trial_suggested":
            still = True
        elif event["event"] == "study_finished":
            still = False  # also where it was given more trials afterwards
    return found[::-1]


def trial_seconds(lives: Sequence[TrialLife]) -> float:
    """Seconds of work of all trials that ended, stopped ones too; failed ones do not tell theirs."""
    return sum(life.seconds for life in lives if life.seconds is not None)


def utilisation(events: Sequence[Event]) -> float | None:
    """Seconds of trials over those of the sessions' processes; ``None`` where there are none.

    A trial that shares a process counts with its part of that process's time.

    What is missing to 1: idle slots, starting workers, and trials whose work was lost with a session.
    """
    seconds = _process_seconds(events)
    return trial_seconds(trial_lives(events)) / seconds if seconds > 0 else None


def _process_seconds(events: Sequence[Event]) -> float:
    """Seconds of the sessions, each as many times as there were processes."""
    total = sum(session.n_processes * session.seconds for session in sessions(events))
    # Until they changed, there were as many processes as before.
    first, n_processes = 0.0, 0
    for event, time in zip(events, event_times(events), strict=True):
        if event["event"] == "session_started":
            first, n_processes = time, int(event.get("n_processes", event["n_slots"]))
        elif event["event"] == "slots_changed":
            now = int(event["n_slots"])
            total += (n_processes - now) * (time - first)
            n_processes = now
    return total


def most_at_once(lives: Sequence[TrialLife], until: float) -> int:
    """The most trials that ran at the same time, those that have not ended being taken to run ``until``."""
    changes = []
    for life in lives:
        if life.started is not None and life.status != "waiting":
            changes += [(life.started, 1), (until if life.ended is None else life.ended, -1)]
    most = now = 0
    for _, change in sorted(changes):  # at the same moment ends come first
        now += change
        most = max(most, now)
    return most


def working_seconds(events: Sequence[Event], at: Sequence[float]) -> list[float]:
    """Seconds that the study had worked at each of the times ``at``: what lies between sessions is left out.

    Where the journal has no session the time since its first event.
    """
    parts = sessions(events)
    if not parts:
        first = event_times(events[:1])
        return [time - first[0] for time in at]
    return [sum(min(max(time - part.start, 0.0), part.seconds) for part in parts) for time in at]
