"""Nodes that come and go, die, are slow, hang or are full, under a study and under a batch of users.

A cluster of several raylets on this machine. Everything is real but the training, which is a sleep.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.clusters import STORE, Driver, Nodes, Throttled, trial_ends

from milp_ray.search.journal import read_events, read_study

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

STUDY = Path(__file__).with_name("study_driver.py")
BATCH = Path(__file__).with_name("batch_driver.py")
HOG = Path(__file__).with_name("store_hog.py")
Drive = Callable[..., Driver]
Measured = Callable[..., None]
# In Ray's names of the processes of trials: between two calls of an actor, and during one.
TRIAL = ("SleepingTrial", "ResourceTrainable")
USERS = "UserWorker.run"  # of those that work on users now


def journal_of(folder: Path) -> Path:
    return folder / "journal.jsonl"


def in_work(journal: Path) -> set[int]:
    return {trial.index for trial in read_study(journal).trials if trial.status == "started"}


def assert_sound(journal: Path, n_trials: int) -> None:
    """Every trial was completed once, none was run after its end, and no layout was tried twice."""
    assert sorted(trial_ends(journal)) == list(range(n_trials))
    ended: set[int] = set()
    for event in read_events(journal):
        if event["event"] == "trial_completed":
            ended.add(event["index"])
        assert event["event"] != "trial_failed"
        assert not (event["event"] == "trial_started" and event["index"] in ended)
    state = read_study(journal)
    assert len(state.keys) == n_trials


def trials_by_node(folder: Path) -> list[int]:
    """How many trials each node has done, by the processes that Tune says did them."""
    results = [json.loads(path.read_text()) for path in folder.rglob("result.json")]
    on = [(folder / "nodes" / str(result["pid"])).read_text() for result in results]
    return [on.count(node) for node in set(on)]


def outcomes(driver: Driver) -> list[dict[str, Any]]:
    return driver.events("outcome")


def assert_all_made(driver: Driver, n_users: int) -> None:
    """Every user has one outcome, and it is no failure."""
    found = outcomes(driver)
    assert sorted(int(outcome["user"]) for outcome in found) == list(range(n_users))
    assert {outcome["status"] for outcome in found} == {"done"}


def n_times_made(folder: Path) -> list[int]:
    """How often each user was made, whether it counted or not."""
    made = [int(line) for line in (folder / "log").read_text().split()]
    return [made.count(user) for user in sorted(set(made))]


# ------------------------------------------------------------------------------------ nodes come and go


def test_a_study_takes_in_a_new_node_and_goes_on_without_one_that_dies(
    nodes: Nodes, drive: Drive, tmp_path: Path, measured: Measured
) -> None:
    n_trials = 30
    first = nodes.add()
    journal = journal_of(tmp_path)
    driver = drive(STUDY, tmp_path, n_trials, 1.5, address=nodes.address)
    driver.wait_for(lambda: len(trial_ends(journal)) >= 2)
    assert len(in_work(journal)) == 1

    nodes.add()
    added = time.time()
    driver.wait_for(lambda: len(in_work(journal)) == 2)
    measured("node added, study", "nothing", time.time() - added, "a trial more is in work")
    processes = tmp_path / "nodes"
    driver.wait_for(lambda: len({path.read_text() for path in processes.iterdir()}) == 2)
    n_before = len(trial_ends(journal))
    driver.wait_for(lambda: len(trial_ends(journal)) >= n_before + 4 and len(in_work(journal)) == 2)

    before, doomed = trial_ends(journal), in_work(journal)
    assert len(before) < n_trials - 6, "it is in the middle"
    nodes.kill(first)
    killed = time.time()
    assert driver.result() == 0, driver.told
    ends = trial_ends(journal)
    assert_sound(journal, n_trials)
    assert before.items() <= ends.items()
    recovered = max(ends[index] for index in doomed) - killed
    measured("node killed, study", "its trial in work, tried again", recovered, "that trial has ended")
    slots = [e["n_slots"] for e in read_events(journal) if e["event"] in ("session_started", "slots_changed")]
    assert slots == [1, 2, 1]


def test_a_batch_goes_on_without_a_node_that_dies(
    nodes: Nodes, drive: Drive, tmp_path: Path, measured: Measured
) -> None:
    n_users = 60
    first = nodes.add()
    driver = drive(BATCH, tmp_path / "made", n_users, 0.6, 2, address=nodes.address)
    driver.wait_for(lambda: len(outcomes(driver)) >= 2)
    [veteran] = {outcome["worker"] for outcome in outcomes(driver)}

    nodes.add()
    added = time.time()
    driver.wait_for(lambda: {outcome["worker"] for outcome in outcomes(driver)} - {veteran})
    measured("node added, batch", "nothing", outcomes(driver)[-1]["at"] - added, "its first users are made")

    assert len(outcomes(driver)) < n_users - 10, "it is in the middle"
    nodes.kill(first)
    killed = time.time()
    assert driver.result() == 0, driver.told
    assert_all_made(driver, n_users)
    again = [outcome for outcome in outcomes(driver) if outcome["attempts"] > 1]
    assert 1 <= len(again) <= 2, "those that the node had in work"
    assert max(n_times_made(tmp_path / "made")) == 1
    [loss] = driver.events("worker_lost")
    lost = f"{len(again)} users in work, tried again"
    measured("node killed, batch", lost, max(outcome["at"] for outcome in again) - killed, "they are made")
    assert loss["with_node"] or loss["n_users"] <= 2


def test_after_the_whole_cluster_is_gone_the_same_command_goes_on(
    new_cluster: Callable[[], Nodes], drive: Drive, tmp_path: Path, measured: Measured
) -> None:
    n_trials = 16
    journal = journal_of(tmp_path)
    command = (STUDY, tmp_path, n_trials, 1.0)
    cluster = new_cluster()
    cluster.add(num_cpus=2)
    driver = drive(*command, address=cluster.address)
    driver.wait_for(lambda: len(trial_ends(journal)) >= 5)
    driver.kill()
    cluster.close()
    before = trial_ends(journal)
    assert 5 <= len(before) < n_trials

    cluster = new_cluster()
    cluster.add(num_cpus=2)
    restarted = time.time()
    assert (again := drive(*command, address=cluster.address)).result() == 0, again.told
    ends = trial_ends(journal)
    assert_sound(journal, n_trials)
    assert before.items() <= ends.items()
    first = min(end for index, end in ends.items() if index not in before)
    lost = "trials in work, run again"
    measured("head restarted, study", lost, first - restarted, "the command's first trial has ended")


# --------------------------------------------------------------------------------------- slow and hung


def test_a_slow_node_does_not_hold_back_a_study(
    nodes: Nodes, drive: Drive, tmp_path: Path, measured: Measured
) -> None:
    n_trials = 20
    slow = nodes.add()
    nodes.add()
    journal = journal_of(tmp_path)
    driver = drive(STUDY, tmp_path, n_trials, 1.0, address=nodes.address)
    driver.wait_for(lambda: len(trial_ends(journal)) >= 2)
    with Throttled(lambda: nodes.workers(slow, *TRIAL), share=0.1):
        begun, n_before = time.time(), len(trial_ends(journal))
        assert driver.result() == 0, driver.told
    ends = trial_ends(journal)
    assert_sound(journal, n_trials)
    seconds = (max(ends.values()) - begun) / (n_trials - n_before)
    measured("slow node (a tenth), study", "nothing", seconds, "a trial of 1 s, on two nodes")
    n_slow, n_fast = sorted(trials_by_node(tmp_path))
    assert n_slow + n_fast == n_trials
    assert n_fast > 2 * n_slow


def test_a_slow_node_does_not_hold_back_a_batch(
    nodes: Nodes, drive: Drive, tmp_path: Path, measured: Measured
) -> None:
    n_users = 24
    slow = nodes.add()
    nodes.add()
    driver = drive(BATCH, tmp_path / "made", n_users, 0.6, 6, address=nodes.address)
    driver.wait_for(lambda: len(nodes.workers(slow, USERS)) == 1)
    with Throttled(lambda: nodes.workers(slow, "UserWorker"), share=0.1):
        begun = time.time()
        assert driver.result() == 0, driver.told
    assert_all_made(driver, n_users)
    assert len(driver.events("worker_slow")) >= 1, "others have begun its users again"
    seconds = max(outcome["at"] for outcome in outcomes(driver)) - begun
    measured("slow node (a tenth), batch", "nothing", seconds, f"all {n_users} users of 0.6 s, on two nodes")


def test_a_trial_that_hangs_is_ended_and_tried_again(
    nodes: Nodes, drive: Drive, tmp_path: Path, measured: Measured
) -> None:
    n_trials = 40
    stuck = nodes.add()
    nodes.add()
    journal = journal_of(tmp_path)
    settings = json.dumps({"patience": 4.0})
    driver = drive(STUDY, tmp_path, n_trials, 1.0, settings, address=nodes.address)
    done = tmp_path / "nodes"
    driver.wait_for(lambda: any((done / f"{p.pid}.done").exists() for p in nodes.workers(stuck, *TRIAL)))
    [process] = nodes.workers(stuck, *TRIAL)
    process.suspend()
    doomed = in_work(journal)
    stopped = time.time()
    assert driver.result() == 0, driver.told
    assert_sound(journal, n_trials)
    [hung] = driver.events("trial_hung")
    assert hung["index"] in doomed
    recovered = trial_ends(journal)[hung["index"]] - stopped
    measured("hung worker, study", "its trial, tried again", recovered, "it has ended (8 s of patience)")


@pytest.mark.parametrize("n_nodes", [1, 2])
def test_a_worker_that_hangs_costs_its_batch_no_user(
    nodes: Nodes, drive: Drive, tmp_path: Path, measured: Measured, n_nodes: int
) -> None:
    """With another worker that has nothing left to do, and without one."""
    n_users = 16
    stuck = nodes.add()
    if n_nodes == 2:
        nodes.add()
    driver = drive(BATCH, tmp_path / "made", n_users, 0.4, 2, address=nodes.address)
    driver.wait_for(lambda: len(outcomes(driver)) >= 4 and nodes.workers(stuck, USERS))
    [process] = nodes.workers(stuck, USERS)
    process.suspend()
    stopped = time.time()
    assert driver.result() == 0, driver.told
    assert_all_made(driver, n_users)
    again = [outcome for outcome in outcomes(driver) if outcome["attempts"] > 1]
    assert 1 <= len(again) <= 2
    assert len(driver.events("worker_hung" if n_nodes == 1 else "worker_slow")) == 1
    what = "the only worker" if n_nodes == 1 else "one worker of two"
    recovered = max(outcome["at"] for outcome in again) - stopped
    until = f"they are made ({16 if n_nodes == 1 else 6} s of patience)"
    measured(f"hung worker, batch ({what})", "its users, tried again", recovered, until)


# -------------------------------------------------------------------------------------- full object stores


def test_full_object_stores_hold_up_neither_study_nor_batch(
    nodes: Nodes, drive: Drive, tmp_path: Path, measured: Measured
) -> None:
    n_trials = n_users = 8
    nodes.add(num_cpus=2)
    hog = drive(HOG, 2 * STORE >> 20, address=nodes.address)
    hog.wait_for(lambda: hog.events("full"))
    assert hog.events("full")[0]["nodes"] == 2
    study = drive(STUDY, tmp_path / "study", n_trials, 0.5, address=nodes.address)
    assert study.result() == 0, study.told
    journal = journal_of(tmp_path / "study")
    assert_sound(journal, n_trials)
    times = sorted(trial_ends(journal).values())
    seconds = (times[-1] - times[0]) / (n_trials - 1)
    measured("object stores full, study", "nothing", seconds, "a trial of 0.5 s, two at once")
    batch = drive(BATCH, tmp_path / "made", n_users, 0.5, 1, address=nodes.address)
    assert batch.result() == 0, batch.told
    assert_all_made(batch, n_users)
    at = [outcome["at"] for outcome in outcomes(batch)]
    seconds = (at[-1] - at[0]) / (n_users - 1)
    measured("object stores full, batch", "nothing", seconds, "a user of 0.5 s, two at once")
    assert hog.process.poll() is None, "the stores were full all the time"
