from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from milp_ray.config.base import BaseSection
from milp_ray.config.cluster import RaySection
from milp_ray.config.personalize import PersonalizeSection
from milp_ray.errors import MilpError
from milp_ray.personalize.batch import worker_pool
from milp_ray.personalize.hands import Queue
from milp_ray.personalize.pool import Outcome, WorkerPool
from milp_ray.personalize.worker import CannotGoOnError, PackFunction, UserWorker, safe_reason

SECRET = "my pin is 4711"

# Functions are made inside tests: workers cannot import this module, so what they run is sent by value.


def make_state() -> Callable[[], dict[str, int]]:
    return lambda: {"pid": os.getpid(), "calls": 0}


def section_of(n_workers: int, max_retries: int = 2) -> PersonalizeSection:
    """Half a CPU a worker: other pools find room beside the one that the module shares."""
    return PersonalizeSection(n_workers=n_workers, max_retries=max_retries, cpus_per_worker=0.5)


@pytest.fixture(scope="module")
def pool(ray_local: None) -> Iterator[WorkerPool]:
    """Two workers, shared by the tests of this module: their imports are what costs."""
    with WorkerPool(make_state(), section=section_of(2), name="test") as opened:
        yield opened


def by_key(outcomes: list[Outcome]) -> dict[str, Outcome]:
    keys = [outcome.key for outcome in outcomes]
    assert len(keys) == len(set(keys)), "an item has two outcomes"
    return {outcome.key: outcome for outcome in outcomes}


def each(function: Callable[[Any, Any], Any]) -> PackFunction:
    """Applies ``function`` to one item after the other."""

    def packed(state: Any, items: Any, report: Callable[[int, Any], None]) -> None:
        for place, item in enumerate(items):
            report(place, function(state, item))

    return packed


def run(pool: WorkerPool, function: Callable[[Any, Any], Any], items: list[Any]) -> dict[str, Outcome]:
    return by_key(list(pool.map(each(function), items, key=str, size=float)))


@pytest.mark.ray
def test_every_item_has_one_outcome(pool: WorkerPool) -> None:
    outcomes = run(pool, lambda state, item: item * item, list(range(30)))
    assert {key: outcome.value for key, outcome in outcomes.items()} == {str(i): i * i for i in range(30)}
    assert all(outcome.status == "done" and outcome.attempts == 1 for outcome in outcomes.values())


@pytest.mark.ray
def test_no_items_start_no_workers(ray_local: None) -> None:
    with WorkerPool(make_state(), section=section_of(2)) as idle:
        assert list(idle.map(each(lambda state, item: item), [], key=str)) == []
        assert idle.n_workers == 0


@pytest.mark.ray
def test_longer_items_are_begun_first(ray_local: None, tmp_path: Path) -> None:
    log = tmp_path / "order"

    def note(state: Any, item: int) -> None:
        with log.open("a") as file:
            file.write(f"{item}\n")

    with WorkerPool(make_state(), section=section_of(1)) as one_worker:
        run(one_worker, note, [3, 1, 9, 7, 5, 8, 2, 6, 4, 0])
    assert [int(line) for line in log.read_text().split()] == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.ray
def test_stages_share_the_workers_and_their_state(pool: WorkerPool) -> None:
    def count(state: dict[str, int], item: int) -> tuple[int, int]:
        state["calls"] += 1
        return state["pid"], state["calls"]

    calls = [outcome.value for _ in range(2) for outcome in run(pool, count, list(range(8))).values()]
    assert len({pid for pid, _ in calls}) <= 2
    assert len(set(calls)) == len(calls), "a worker counts on from the stage before; a new state would repeat"


@pytest.mark.ray
def test_an_exception_fails_its_item_only_and_quotes_no_text(pool: WorkerPool) -> None:
    def choke(state: Any, item: int) -> int:
        if item == 2:
            raise KeyError(SECRET)
        if item == 3:
            raise MilpError("the user has no history; give one")
        return item

    outcomes = run(pool, choke, list(range(5)))
    assert [key for key, outcome in outcomes.items() if outcome.failed] in (["2", "3"], ["3", "2"])
    assert (outcomes["2"].error, outcomes["3"].error) == ("KeyError", "MilpError")
    assert SECRET not in repr(outcomes["2"])
    assert outcomes["3"].reason == "the user has no history; give one"


@pytest.mark.ray
def test_a_value_that_cannot_be_sent_fails_its_item_only(pool: WorkerPool) -> None:
    def unsendable(state: Any, item: int) -> Any:
        return (value for value in [SECRET]) if item == 1 else item

    outcomes = run(pool, unsendable, [0, 1, 2])
    assert [outcome.failed for _, outcome in sorted(outcomes.items())] == [False, True, False]
    assert SECRET not in repr(outcomes["1"])


@pytest.mark.ray
def test_an_item_whose_worker_is_killed_is_done_by_another(pool: WorkerPool, tmp_path: Path) -> None:
    marker = tmp_path / "killed"

    def die_once(state: Any, item: int) -> int:
        if item == 3 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid()

    outcomes = run(pool, die_once, list(range(6)))
    assert marker.exists()
    assert all(outcome.status == "done" for outcome in outcomes.values())
    again = {key for key, outcome in outcomes.items() if outcome.attempts > 1}
    assert "3" in again, "those in its company are done again as well, each alone"
    assert len(again) < 6
    assert max(outcome.attempts for outcome in outcomes.values()) == 2


@pytest.mark.ray
def test_an_item_that_always_kills_its_worker_fails_in_the_end(ray_local: None) -> None:
    def die(state: Any, item: int) -> int:
        if item == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    with WorkerPool(make_state(), section=section_of(1, max_retries=1)) as pool:
        outcomes = run(pool, die, [0, 1, 2])
    assert (outcomes["1"].error, outcomes["1"].attempts) == ("WorkerLost", 3), "once in company, twice alone"
    assert (outcomes["0"].value, outcomes["2"].value) == (0, 2)


@pytest.mark.ray
def test_a_consumer_that_stops_early_leaves_the_pool_usable(pool: WorkerPool) -> None:
    stream = pool.map(each(lambda state, item: item), range(10), key=str)
    next(stream)
    stream.close()
    assert set(run(pool, lambda state, item: item, [1, 2])) == {"1", "2"}


@pytest.mark.ray
def test_a_factory_that_fails_says_why(ray_local: None) -> None:
    def fail() -> None:
        raise MilpError("base.model 'nowhere' is no folder")

    with (
        WorkerPool(fail, section=section_of(1)) as broken,
        pytest.raises(MilpError, match="'nowhere' is no folder"),
    ):
        list(broken.map(each(lambda state, item: item), [1], key=str))


@pytest.mark.ray
def test_workers_that_die_while_they_start_end_the_map(ray_local: None) -> None:
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with (
        WorkerPool(die, section=section_of(1)) as broken,
        pytest.raises(MilpError, match="3 workers in a row died while they loaded the base"),
    ):
        list(broken.map(each(lambda state, item: item), [1], key=str))


@pytest.mark.ray
def test_workers_are_as_many_as_fit_unless_told(ray_local: None) -> None:
    with WorkerPool(make_state(), section=PersonalizeSection()) as fitting:
        assert fitting.max_workers == 2
    with WorkerPool(make_state(), section=PersonalizeSection(cpus_per_worker=0.5)) as fitting:
        assert fitting.max_workers == 4
    for section in (PersonalizeSection(cpus_per_worker=64), PersonalizeSection(gpus_per_worker=1)):
        with pytest.raises(MilpError, match="no node has"), WorkerPool(make_state(), section=section):
            pass


def test_neighbours_do_not_fail_with_an_item() -> None:
    calls: list[list[int]] = []

    def choke(state: Any, items: Any, report: Callable[[int, Any], None]) -> None:
        calls.append(list(items))
        for place, item in enumerate(items):
            if item == 2:
                raise KeyError(SECRET)
            report(place, MilpError("no history") if item == 1 else item)

    replies = UserWorker("w").run(choke, [0, 1, 2, 3])
    assert calls == [[0, 1, 2, 3], [2], [3]]
    assert [reply.error for reply in replies] == [None, "MilpError", "KeyError", None]
    assert [reply.value for reply in replies] == [0, None, None, 3]


def test_what_no_item_is_to_blame_for_ends_all_of_them() -> None:
    calls: list[list[int]] = []

    def full(state: Any, items: Any, report: Callable[[int, Any], None]) -> None:
        calls.append(list(items))
        report(0, "published")
        raise CannotGoOnError("the disk is full")

    replies = UserWorker("w").run(full, [0, 1, 2])
    assert calls == [[0, 1, 2]], "nothing is tried again"
    assert [reply.value for reply in replies] == ["published", None, None]
    assert [reply.ends_all for reply in replies] == [False, True, True]
    assert replies[2].reason == "the disk is full"


@pytest.mark.ray
def test_a_map_ends_with_what_no_item_is_to_blame_for(pool: WorkerPool) -> None:
    def full(state: Any, items: Any, report: Callable[[int, Any], None]) -> None:
        report(0, "published")
        raise CannotGoOnError("the disk is full")

    with pytest.raises(MilpError, match="the disk is full"):
        list(pool.map(full, range(20), key=str, at_once=4))
    assert set(run(pool, lambda state, item: item, [1, 2])) == {"1", "2"}, "the pool is of use afterwards"


def test_a_function_that_forgets_an_item_fails_it() -> None:
    replies = UserWorker("w").run(lambda state, items, report: None, [1, 2])
    assert [reply.error for reply in replies] == ["RuntimeError"] * 2


@pytest.mark.parametrize(("n", "n_hands", "most"), [(13, 2, 64), (13, 2, 4), (5, 8, 64), (1, 1, 1)])
def test_items_are_dealt_in_even_hands(n: int, n_hands: int, most: int) -> None:
    queue: Queue[int] = Queue(range(n), key=str, size=float)
    hands = []
    while queue:
        hands.append([task.item for task in queue.deal(n_hands, most)])
    assert sorted(item for hand in hands for item in hand) == list(range(n))
    assert max(map(len, hands)) <= min(most, math.ceil(n / n_hands))
    if n == 13 and most == 64:
        assert hands[0] == [12, 10, 8, 6, 4, 2, 0], "every second one, the largest first"


def test_a_reason_names_the_place_and_withholds_the_message() -> None:
    worker = UserWorker("w")

    def choke(state: Any, item: str) -> None:
        PersonalizeSection(n_workers=item)  # pydantic quotes what it was given

    [reply] = worker.run(each(choke), [SECRET])
    assert reply.error == "ValidationError"
    assert SECRET not in repr(reply)
    assert "withheld" in str(reply.reason)


def test_a_reason_names_the_line_of_the_package() -> None:
    from milp_ray.memory.layout import CanonicalLayout

    try:
        CanonicalLayout((True,), rank=SECRET)
    except TypeError as error:
        reason = safe_reason(error)
    assert reason.startswith("TypeError at milp_ray/memory/layout.py:")
    assert SECRET not in reason


@pytest.mark.parametrize(("gpus", "share"), [(0.0, 1.0), (0.25, 0.25), (1.0, 1.0)])
def test_a_worker_loads_its_base_with_its_part_of_a_gpu(
    gpus: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float] = []
    monkeypatch.setattr("milp_ray.training.base.load_base", lambda _, *, share: told.append(share))
    worker_pool(BaseSection(), PersonalizeSection(gpus_per_worker=gpus), RaySection())._factory()
    assert told == [share]
