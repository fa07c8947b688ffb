"""When a trial is taken for hung: by the clock, against the longest trial before it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from milp_ray.search import hung
from milp_ray.search.hung import HungTrials


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(hung.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Trials whose process was ended."""
    found: list[int] = []
    monkeypatch.setattr(HungTrials, "_end", lambda self, trial, seconds: found.append(trial.config["trial"]))
    return found


def trial(index: int, status: str = "RUNNING") -> Any:
    actor = SimpleNamespace(ray_actor=object() if status == "RUNNING" else None)
    return SimpleNamespace(
        trial_id=f"t{index}", config={"trial": index}, status=status, temporary_state=actor
    )


def wait(callback: HungTrials, clock: Clock, seconds: float, *trials: Any) -> None:
    """Let time pass; the callback is called before and after."""
    clock.now += hung._LOOK_AGAIN
    callback.on_step_end(0, list(trials))
    clock.now += seconds
    callback.on_step_end(0, list(trials))


def complete(callback: HungTrials, clock: Clock, seconds: float) -> None:
    done = trial(99)
    wait(callback, clock, seconds, done)
    done.status = "TERMINATED"
    callback.on_trial_complete(0, [done], done)


def test_before_a_trial_has_ended_none_is_ended(clock: Clock, ended: list[int]) -> None:
    wait(HungTrials(4.0), clock, 1e6, trial(0))
    assert ended == []


@pytest.mark.parametrize(("longest", "limit"), [(10.0, hung.AT_LEAST), (1000.0, 4000.0)])
def test_a_trial_is_ended_after_its_time_and_once(
    clock: Clock, ended: list[int], longest: float, limit: float
) -> None:
    callback, slow, late = HungTrials(4.0), trial(1), trial(2, "PENDING")
    complete(callback, clock, longest)
    wait(callback, clock, limit - 1, slow, late)
    assert ended == []
    late.temporary_state.ray_actor = object()  # of an earlier trial, which is to take this one
    wait(callback, clock, 2, slow, late)
    assert ended == [1], "the other one has just begun"
    actor, slow.temporary_state.ray_actor = slow.temporary_state.ray_actor, None  # Tune tries it again
    slow.status = "PENDING"
    wait(callback, clock, 2, slow)
    slow.status, slow.temporary_state.ray_actor = "RUNNING", actor
    wait(callback, clock, limit - 1, slow)
    assert ended == [1], "its time begins anew"
