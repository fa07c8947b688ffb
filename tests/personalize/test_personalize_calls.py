"""When a worker is taken for slow, and when for hung."""

from __future__ import annotations

import pytest

from milp_ray.personalize import calls
from milp_ray.personalize.calls import Call, Pace
from milp_ray.personalize.hands import Task


class Clock:
    now = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(calls.time, "monotonic", lambda: clock.now)
    return clock


def call(clock: Clock, n_items: int, size: float, seconds: float = 0.0) -> Call[int]:
    tasks = [Task((-size, i), str(i), i, size) for i in range(n_items)]
    return Call(tasks, since=clock.now - seconds)


def test_nothing_is_known_before_a_call_has_ended(clock: Clock) -> None:
    pace, one = Pace(), call(clock, 1, 5.0, seconds=1e6)
    assert pace.expected(one) is None
    assert not pace.is_slow(one)
    assert not pace.has_hung(one, 20.0)


def test_what_is_expected_grows_with_the_number_and_with_the_size(clock: Clock) -> None:
    pace = Pace()
    pace.ended(call(clock, 2, 10.0, seconds=8.0))
    assert pace.expected(call(clock, 2, 10.0)) == 8.0
    assert pace.expected(call(clock, 4, 1.0)) == 16.0
    assert pace.expected(call(clock, 2, 30.0)) == 24.0


def test_one_slow_worker_does_not_change_what_is_expected(clock: Clock) -> None:
    pace = Pace()
    for seconds in (100.0, 10.0):
        pace.ended(call(clock, 1, 0.0, seconds))
    assert pace.expected(call(clock, 1, 0.0)) == 10.0


def test_slow_and_hung_are_many_times_as_long_and_a_while_at_least(clock: Clock) -> None:
    pace = Pace()
    pace.ended(call(clock, 1, 0.0, seconds=1.0))
    assert not pace.is_slow(call(clock, 1, 0.0, seconds=calls.SLOW_AT_LEAST))
    assert pace.is_slow(call(clock, 1, 0.0, seconds=calls.SLOW_AT_LEAST + 1))
    assert not pace.has_hung(call(clock, 1, 0.0, seconds=calls.HUNG_AT_LEAST), 20.0)
    assert pace.has_hung(call(clock, 1, 0.0, seconds=calls.HUNG_AT_LEAST + 1), 20.0)
    pace = Pace()
    pace.ended(call(clock, 1, 0.0, seconds=100.0))
    assert not pace.is_slow(call(clock, 1, 0.0, seconds=100 * calls.SLOW))
    assert pace.is_slow(call(clock, 1, 0.0, seconds=100 * calls.SLOW + 1))
    assert not pace.has_hung(call(clock, 1, 0.0, seconds=2000.0), 20.0)
    assert pace.has_hung(call(clock, 1, 0.0, seconds=2001.0), 20.0)
