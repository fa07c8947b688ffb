"""A job's output is followed to the job's end, whatever becomes of the connection meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from milp_ray.errors import MilpError
from milp_ray.launch import jobs
from milp_ray.launch.jobs import Jobs

LINES = [f"line {number}\n" for number in range(700)]
SECONDS = 700.0
LOST = RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
AWAY = RuntimeError("Request failed with status code 500: Traceback: the GCS is not available")
UNKNOWN = RuntimeError("Request failed with status code 404: Job mine does not exist")


class Clock:
    """In place of the module ``time``: it stands still but for who sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Cluster:
    """In place of Ray's client: each connection and each question gets the next of what it was given.

    Args:
        clock: goes on by a second with every piece of a stream.
        streams: pieces, of which an exception ends the stream, and ``None`` never comes; the last again.
        states: of the job, or what is raised instead; the last again.
    """

    def __init__(self, clock: Clock, streams: list[list[Any]], states: list[Any]) -> None:
        self.clock, self.streams, self.states = clock, streams, states

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        for piece in self.streams.pop(0) if len(self.streams) > 1 else self.streams[0]:
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                await asyncio.Event().wait()
            self.clock.now += 1.0
            yield piece

    def get_job_info(self, name: str) -> Any:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(state, Exception):
            raise state
        return SimpleNamespace(status=SimpleNamespace(value=state), message="", driver_exit_code=0)

    def get_job_logs(self, name: str) -> str:
        return "".join([*LINES, "the end\n"])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(jobs, "time", clock)
    return clock


def follow(clock: Clock, streams: list[list[Any]], states: list[Any], write: Callable[[str], Any]) -> str:
    known = object.__new__(Jobs)  # the usual way asks a cluster
    known.shown, known.option = "CLUSTER", "--address URL"
    known._client = Cluster(clock, streams, states)
    return known.follow("mine", write).state


@pytest.mark.parametrize(
    ("streams", "states"),
    [
        ([[*LINES, LOST], [*LINES, "the end\n"]], ["RUNNING", "SUCCEEDED"]),  # after more than ten minutes
        ([[*LINES, LOST], [LOST], LINES], [AWAY, AWAY, "SUCCEEDED"]),
        ([[*LINES[:5], ConnectionResetError(104, "reset")], LINES], [ConnectionError("away"), "SUCCEEDED"]),
        ([[LOST]], [*["RUNNING"] * 1000, "SUCCEEDED"]),  # what tells the state is there
    ],
)
def test_a_lost_connection_costs_nothing_and_nothing_is_printed_twice(
    clock: Clock, streams: list[list[Any]], states: list[Any]
) -> None:
    written: list[str] = []
    assert follow(clock, streams, states, written.append) == "SUCCEEDED"
    assert "".join(written) == "".join([*LINES, "the end\n"])


def test_a_connection_that_says_nothing_any_more_is_not_waited_for_for_ever(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_LONGEST_WAIT_SECONDS", 0.01)
    written: list[str] = []
    streams = [[*LINES[:5], None], [None], LINES]
    assert follow(clock, streams, ["RUNNING", "RUNNING", "SUCCEEDED"], written.append) == "SUCCEEDED"
    assert "".join(written) == "".join([*LINES, "the end\n"])


def test_a_cluster_that_is_silent_is_given_up_after_ten_minutes_of_that(clock: Clock) -> None:
    with pytest.raises(MilpError, match=r"silent for ten minutes .*`milp-ray logs mine --address URL`"):
        follow(clock, [[*LINES, LOST], [LOST]], [AWAY], [].append)
    assert SECONDS + 600 < clock.now < SECONDS + 610


def test_a_job_that_is_not_there_is_told_at_once(clock: Clock) -> None:
    with pytest.raises(MilpError, match="there is no job 'mine' on CLUSTER"):
        follow(clock, [[LOST]], [UNKNOWN], [].append)
    assert clock.now == 0


def test_a_reader_who_has_gone_is_no_lost_connection(clock: Clock) -> None:
    gone = BrokenPipeError(32, "Broken pipe")

    def write(text: str) -> None:
        raise gone

    with pytest.raises(BrokenPipeError) as raised:
        follow(clock, [LINES], ["RUNNING"], write)
    assert raised.value is gone
    assert clock.now == 1
