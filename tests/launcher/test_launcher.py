"""From `ray up` to `ray down`, by ssh: runs that are submitted, fail, are stopped, and lose their machines.

The tests share one cluster and are in the order in which a person would meet this.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from support.launched import ALL_GPUS, Cluster, Run
from support.machines import HOME, SHARED

from milp_ray.search.journal import read_events

pytestmark = [pytest.mark.launcher, pytest.mark.timeout(1800)]

N_GPUS = sum(ALL_GPUS.values())
SEARCH = {
    "n_trials": 24,
    "n_initial": 20,
    "batch_size": 2,
    "objectives": ["validation_loss", "adapter_parameters"],
    "surrogate": {"inference": "map"},
    "cpus_per_trial": 0.5,
    "gpus_per_trial": 1,
}
BATCH = {"cpus_per_worker": 0.5, "gpus_per_worker": 1}
MODEL = "tiny_llama"

Record = Callable[[str, object], None]


def test_it_comes_up_and_answers_nobody_without_the_token(cluster: Cluster, record_property: Record) -> None:
    generated = cluster.network.laptop.run("ray", "get-auth-token", "--generate")
    assert generated.returncode == 0, generated.stdout
    started = time.monotonic()
    cluster.ray("up")
    record_property("seconds", ("ray up", time.monotonic() - started))
    record_property("seconds", ("until all GPUs are there", cluster.wait_for_gpus(ALL_GPUS)))
    token = cluster.network.machines["head"].run("cat", HOME / ".ray" / "auth_token").stdout.strip()
    answers = [cluster.answer("/api/jobs/", each)[0] for each in (None, "0" * len(token), token)]
    assert answers == [401, 403, 200]


def test_a_study_that_fails_says_so_whatever_the_job_list_says(cluster: Cluster) -> None:
    diverging = {"memory_epochs": 2, "instruction_epochs": 1, "learning_rate": 1e30}
    search = {**SEARCH, "n_trials": 2, "n_initial": 2, "max_failures": 0}
    run = Run(cluster, "failing", MODEL, search=search, training=diverging, personalize=BATCH)
    submitted = cluster.submit(run.config)
    assert submitted.exit_code(600) == 1, submitted.output
    assert "all 2 trials of the search failed" in submitted.output
    status = run.status
    assert status is not None
    assert (status.state, status.stage, status.exit_code) == ("failed", "search", 2)
    assert status.host == "head"
    assert status.reason in submitted.output.replace("\n", " ")


def test_a_study_is_stopped_and_goes_on_and_outlives_an_unplugged_worker(
    cluster: Cluster, record_property: Record
) -> None:
    training = {"memory_epochs": 100, "instruction_epochs": 1}
    run = Run(cluster, "study", MODEL, search=SEARCH, training=training, personalize=BATCH)
    submitted = cluster.submit(run.config)
    submitted.until(lambda: run.n_ended >= 1, "a trial has ended")
    cluster.ray("exec", f"milp-ray stop {SHARED}/runs/study")
    assert submitted.exit_code(300) == 1, submitted.output
    status = run.status
    assert status is not None
    assert (status.state, status.stage, status.exit_code) == ("stopped", "search", 130)
    before = read_events(run.folder.journal)
    kept = {trial.index for trial in run.study.completed}
    assert 1 <= len(kept) < SEARCH["n_trials"], "it was to be stopped in the middle"

    again = cluster.milp_submit(cluster.network.storage / run.config.relative_to(SHARED))
    again.until(lambda: run.n_ended > len(kept) and len(run.running) >= N_GPUS, "all GPUs have a trial")
    n_ended, in_work = run.n_ended, run.running
    cluster.network.unplug("worker-2")
    next_one = again.until(lambda: run.n_ended > n_ended, "another trial has ended")
    record_property("seconds", ("from the cut to the next finished trial", next_one))
    all_of_them = next_one + again.until(lambda: not in_work & run.running, "what was in work has ended")
    record_property("seconds", ("from the cut until all trials in work have ended", all_of_them))
    assert again.exit_code(600) == 0, again.output
    assert "submitted study" in again.output
    for command in ("status", "logs"):
        done = cluster.milp_ray(command, "study", "--cluster", cluster.file)
        assert done.returncode == 0, done.stdout
    assert "results for programs" in done.stdout

    journal = read_events(run.folder.journal)
    completed = [event["index"] for event in journal if event["event"] == "trial_completed"]
    assert sorted(completed) == list(range(SEARCH["n_trials"]))
    assert journal[: len(before)] == before
    begun = {event["index"] for event in journal[len(before) :] if event["event"] == "trial_started"}
    assert not begun & kept, "what was finished is not done again"
    assert set(run.store.users()) == {"u-0", "u-1"}
    status = run.status
    assert status is not None
    assert (status.state, status.exit_code) == ("succeeded", 0)


def test_a_batch_outlives_a_worker_that_is_killed(cluster: Cluster, record_property: Record) -> None:
    cluster.network.plug_in("worker-2")
    record_property("seconds", ("from the link's return to its GPUs'", cluster.wait_for_gpus(ALL_GPUS)))
    training = {"memory_epochs": 40, "instruction_epochs": 1, "pack_size": 1}
    search = {**SEARCH, "n_trials": 2, "n_initial": 2, "trial_epochs": 1}
    run = Run(cluster, "batch", MODEL, n_users=24, search=search, training=training, personalize=BATCH)
    submitted = cluster.submit(run.config)
    worker = cluster.network.machines["worker-1"]
    submitted.until(
        lambda: run.n_adapters >= 1 and any("UserWorker.run" in title for title in worker.processes()),
        "a first adapter, and work on worker-1",
    )
    n_adapters = run.n_adapters
    worker.kill()
    assert n_adapters < run.n_users, "it was to be killed in the middle"
    next_one = submitted.until(lambda: run.n_adapters > n_adapters, "another adapter")
    record_property("seconds", ("from the kill to the next adapter", next_one))
    all_of_them = next_one + submitted.until(lambda: run.n_adapters == run.n_users, "all adapters")
    record_property("seconds", ("from the kill until all users have an adapter", all_of_them))
    assert submitted.exit_code(600) == 0, submitted.output
    for user_id in run.store.users():
        run.store.verify(user_id)
    assert run.store.versions("u-0") == [1]
    done = run.summary()["personalize"]
    assert (done["done"], done["failed"]) == (run.n_users, 0)


def test_a_machine_that_is_switched_on_again_gets_its_ray_back(
    cluster: Cluster, record_property: Record
) -> None:
    cluster.network.start("worker-1")
    record_property("seconds", ("from switching on to its GPUs", cluster.wait_for_gpus(ALL_GPUS)))


def test_all_of_it_goes_down(cluster: Cluster, record_property: Record) -> None:
    cluster.ray("down")
    assert cluster.rays("head") == []
    # The launcher stops the head node alone; workers end when they have not found it for a minute.
    started = time.monotonic()
    while any(cluster.rays(name) for name in ALL_GPUS):
        assert time.monotonic() - started < 300, "a worker's Ray outlives its cluster"
        time.sleep(1.0)
    record_property("seconds", ("from ray down to the last worker's end", time.monotonic() - started))
