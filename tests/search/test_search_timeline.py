"""When a study worked and stood idle: the rules of its timeline, checked second by second."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milp_ray.search.timeline import (
    event_times,
    idle_share,
    most_at_once,
    proposals,
    sessions,
    trial_lives,
    trial_seconds,
    utc_text,
    utilisation,
    working_seconds,
)

START = datetime(2024, 5, 1, tzinfo=UTC)
Events = list[dict[str, Any]]


def at(second: float, event: str, **fields: Any) -> dict[str, Any]:
    return {"event": event, **fields, "time": (START + timedelta(seconds=second)).isoformat()}


def completed(second: float, index: int, seconds: float = 1.0) -> dict[str, Any]:
    return at(second, "trial_completed", index=index, metrics={"seconds": seconds})


def delayed(event: dict[str, Any], seconds: float) -> dict[str, Any]:
    time = datetime.fromisoformat(event["time"]) + timedelta(seconds=seconds)
    return {**event, "time": time.isoformat()}


@st.composite
def histories(draw: st.DrawFn) -> tuple[Events, list[tuple[int, int, int]]]:
    """A possible journal, and its seconds in sessions: (last event before it, slots, idle slots)."""
    events, seconds = [at(0, "study_started")], []
    time = n_slots = n_suggested = 0
    waiting: list[int] = []
    running: list[int] = []
    steps = ("pass", "suggest", "start", "end", "begin session", "change slots", "end session", "finish")
    for step in draw(st.lists(st.sampled_from(steps), max_size=40)):
        if step == "pass":
            for _ in range(draw(st.integers(1, 5))):
                idle = max(0, n_slots - len(running) - len(waiting))
                seconds.append((len(events) - 1, n_slots, idle))
                time += 1
        elif step == "suggest":
            events.append(at(time, "trial_suggested", index=n_suggested))
            waiting.append(n_suggested)
            n_suggested += 1
        elif step == "start" and waiting and len(running) < n_slots:
            running.append(waiting.pop(0))
            events.append(at(time, "trial_started", index=running[-1]))
        elif step == "end" and running:
            index = running.pop(draw(st.integers(0, len(running) - 1)))
            kind = draw(st.sampled_from(["trial_completed", "trial_failed", "trial_stopped"]))
            fields = {"metrics": {"seconds": 1.0}} if kind == "trial_completed" else {"seconds": 1.0}
            events.append(at(time, kind, index=index, **fields))
        elif step == "begin session":
            # What came after the last event of a session that did not end is the time of no session.
            seconds = [second for second in seconds if second[0] != len(events) - 1]
            n_slots = draw(st.integers(1, 4))
            events.append(at(time, "session_started", n_slots=n_slots))
            waiting, running = sorted(waiting + running), []
        elif step == "change slots" and n_slots:
            n_slots = draw(st.integers(1, 4))
            events.append(at(time, "slots_changed", n_slots=n_slots))
        elif step in ("end session", "finish") and n_slots:
            ended = at(time, "session_ended", max_block_seconds=0.1)
            events.append(ended if step == "end session" else at(time, "study_finished", reason="all"))
            n_slots = 0
            if step == "end session":
                waiting, running = sorted(waiting + running), []
    return events, [second for second in seconds if second[0] < len(events) - 1]


def more_to_come(events: Events, position: int) -> bool:
    later = [event["event"] for event in events[position + 1 :]]
    return "trial_suggested" in later[: later.index("study_finished")] if "study_finished" in later else (
        "trial_suggested" in later
    )  # fmt: skip


@given(histories())
def test_the_idle_share_is_that_of_the_seconds_counted_one_by_one(
    history: tuple[Events, list[tuple[int, int, int]]],
) -> None:
    events, seconds = history
    counted = [second for second in seconds if more_to_come(events, second[0])]
    slots = sum(n_slots for _, n_slots, _ in counted)
    found = idle_share(events)
    if slots == 0:
        assert found is None
    else:
        assert found == pytest.approx(sum(idle for *_, idle in counted) / slots, abs=1e-9)


@given(histories(), st.integers(1, 10_000))
def test_time_between_sessions_changes_nothing(
    history: tuple[Events, list[tuple[int, int, int]]], gap: int
) -> None:
    events, _ = history
    begins = [i for i, event in enumerate(events) if event["event"] == "session_started"]
    if len(begins) < 2:
        return
    later = [delayed(event, gap if i >= begins[1] else 0) for i, event in enumerate(events)]
    assert idle_share(later) == pytest.approx(idle_share(events), abs=1e-9)
    assert utilisation(later) == pytest.approx(utilisation(events), abs=1e-9)
    worked, worked_later = (working_seconds(e, event_times(e)) for e in (events, later))
    assert worked_later == pytest.approx(worked, abs=1e-4)


@given(histories())
def test_every_share_lies_between_0_and_1_and_worked_time_never_falls(
    history: tuple[Events, list[tuple[int, int, int]]],
) -> None:
    events, _ = history
    idle = idle_share(events, n_trials=50)
    assert idle is None or 0.0 <= idle <= 1.0
    worked = working_seconds(events, event_times(events))
    assert worked == sorted(worked)
    parts = sessions(events)
    assert worked[-1] == pytest.approx(
        sum(part.seconds for part in parts) if parts else event_times(events)[-1] - event_times(events)[0]
    )


def test_slots_are_idle_while_a_batch_is_waited_for_and_nothing_is_left_to_run() -> None:
    events = [
        at(0, "session_started", n_slots=2),
        at(0, "trial_suggested", index=0),
        at(0, "trial_suggested", index=1),
        at(0, "trial_started", index=0),
        at(0, "trial_started", index=1),
        completed(6, 0),  # one slot free for 4 s
        completed(10, 1),  # both free for 5 s
        at(15, "trial_suggested", index=2),
        at(17, "trial_started", index=2),  # waited for its slot: not idle; and the last one to be proposed
        completed(20, 2),
        at(20, "study_finished", reason="all"),
        at(21, "session_ended"),
    ]
    assert idle_share(events) == pytest.approx((4 + 2 * 5) / (2 * 15))


def test_an_unfinished_study_is_idle_as_long_as_it_lacks_trials() -> None:
    events = [
        at(0, "session_started", n_slots=1),
        at(0, "trial_suggested", index=0),
        at(0, "trial_started", index=0),
        completed(5, 0),
        at(20, "batch_proposed", batch=1, seconds=15.0),
    ]
    assert idle_share(events) is None, "as far as the journal knows nothing was to come"
    assert idle_share(events, n_trials=1) is None
    assert idle_share(events, n_trials=2) == pytest.approx(15 / 20)


def test_a_killed_session_ends_with_its_last_event() -> None:
    events = [
        at(0, "session_started", n_slots=2),
        at(0, "trial_suggested", index=0),
        at(1, "trial_started", index=0),
        at(4, "trial_rung", index=0, rung=0, epoch=2, values={}),
        at(900, "session_started", n_slots=3),
        at(901, "trial_started", index=0),
        completed(907, 0, seconds=5.0),
        at(908, "session_ended", max_block_seconds=0.25),
    ]
    first, second = sessions(events)
    assert (first.seconds, first.n_slots, first.has_ended, first.max_block_seconds) == (4, 2, False, None)
    assert (second.seconds, second.n_slots, second.has_ended, second.max_block_seconds) == (8, 3, True, 0.25)
    assert utilisation(events) == pytest.approx(5 / (2 * 4 + 3 * 8))
    start = event_times(events)[0]
    assert working_seconds(events, [start + 2, start + 500, start + 901]) == [2, 4, 5]


def test_slots_that_come_and_go_count_from_then_on() -> None:
    events = [
        at(0, "session_started", n_slots=1),
        at(0, "trial_suggested", index=0),
        at(0, "trial_started", index=0),
        at(10, "slots_changed", n_slots=2),
        at(20, "slots_changed", n_slots=4),
        completed(30, 0, seconds=7.0),
        at(30, "session_ended"),
    ]
    [session] = sessions(events)
    assert (session.seconds, session.n_slots, session.n_processes) == (30, 4, 4)
    assert utilisation(events) == pytest.approx(7 / (10 + 20 + 40))
    assert idle_share(events, n_trials=2) == pytest.approx((0 + 10 + 30) / (10 + 20 + 40))


def test_describing_the_users_of_an_older_study_is_no_part_of_its_sessions() -> None:
    killed = [at(0, "study_started"), at(1, "session_started", n_slots=1), at(5, "trial_suggested", index=0)]
    later = [at(100, "session_started", n_slots=1), completed(103, 0), at(104, "session_ended")]
    described = [*killed, at(99, "users_described", values={}), *later]
    assert sessions(described) == sessions([*killed, *later])
    assert idle_share(described) == idle_share([*killed, *later])


def test_the_life_of_every_kind_of_trial() -> None:
    events = [
        at(0, "session_started", n_slots=4),
        *(at(0, "trial_suggested", index=i) for i in range(5)),
        *(at(1, "trial_started", index=i) for i in range(4)),
        at(3, "trial_rung", index=0, rung=0, epoch=2, values={}),
        at(3, "trial_rung", index=1, rung=0, epoch=2, values={}),
        at(4, "trial_stopped", index=1, rung=0, epoch=2, seconds=2.5),
        at(5, "trial_failed", index=2, reason="diverged"),
        completed(6, 3, seconds=4.5),
        completed(7, 1, seconds=100.0),  # a second end
    ]
    lives = trial_lives(events)
    assert [life.status for life in lives] == ["running", "stopped", "failed", "completed", "waiting"]
    assert [life.seconds for life in lives] == [None, 2.5, None, 4.5, None]
    assert [(life.rung, life.epoch) for life in lives[:2]] == [(0, 2), (0, 2)]
    assert utc_text(lives[1].ended) == "2024-05-01T00:00:04.000+00:00"
    assert (lives[4].started, utc_text(None)) == (None, None)
    assert trial_seconds(lives) == 7.0
    assert most_at_once(lives, event_times(events)[-1]) == 4
    # Once the session is over, or killed and followed by another, what ran waits again.
    for ending in (at(9, "session_ended"), at(9, "session_started", n_slots=1)):
        assert trial_lives([*events, ending])[0].status == "waiting"


def test_a_journal_without_sessions_tells_no_shares_but_its_time() -> None:
    events = [
        at(0, "study_started"),
        at(2, "trial_suggested", index=0),
        at(2, "trial_started", index=0),
        completed(9, 0),
    ]
    assert sessions(events) == []
    assert (idle_share(events, 5), utilisation(events), proposals(events)) == (None, None, None)
    assert working_seconds(events, event_times(events)) == [0, 2, 2, 9]


def test_trials_that_follow_each_other_do_not_run_at_once() -> None:
    events = [
        at(0, "trial_suggested", index=0),
        at(0, "trial_suggested", index=1),
        at(0, "trial_started", index=0),
        completed(5, 0),
        at(5, "trial_started", index=1),
    ]
    assert most_at_once(trial_lives(events), event_times(events)[-1] + 10) == 1


def test_what_proposing_took() -> None:
    found = proposals([at(1, "batch_proposed", seconds=2.0), at(2, "batch_proposed", seconds=0.5)])
    assert found is not None
    assert (found.n_batches, found.seconds, found.longest_seconds) == (2, 2.5, 2.0)


def test_a_clock_that_was_set_back_gives_no_negative_time() -> None:
    events = [at(0, "session_started", n_slots=1), at(10, "study_started"), at(4, "session_ended")]
    times = event_times(events)
    assert [time - times[0] for time in times] == [0, 10, 10]
    assert sessions(events)[0].seconds == 10
