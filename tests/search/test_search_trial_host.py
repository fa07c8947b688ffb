"""Trials that share a process: on Ray Tune, with a host that is really killed; and who goes where."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import ValidationError

from milp_ray.config import Config
from milp_ray.config.base import BaseSection
from milp_ray.config.evaluation import EvaluationSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.search import EarlyStoppingSection, SearchSection, SpaceSection, SurrogateSection
from milp_ray.config.training import TrainingSection
from milp_ray.errors import MilpError
from milp_ray.memory.architecture import FfnShapes
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.search.journal import read_events, read_study
from milp_ray.search.measure import TrialTask, measure
from milp_ray.search.results import StudyResult
from milp_ray.search.rungs import RUNG
from milp_ray.search.study import StudySettings, run_study
from milp_ray.search.timeline import utilisation
from milp_ray.search.trainers import SCRATCH_PREFIX
from milp_ray.search.trial_host import HostFailed, HostMeasurement, HostSpec, Seats, TrialHost, trial_hosts
from milp_ray.training.base import load_base
from milp_ray.users.records import UserSplit

MODULES = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
SHAPES = FfnShapes(
    4, tuple((name, *sides) for name, sides in zip(MODULES, [(32, 64)] * 2 + [(64, 32)], strict=True))
)
PAIR = {"trials_per_process": 2}


# --------------------------------------------------------------------------------------- what is asked for


def test_a_trial_with_a_process_of_its_own_has_no_host() -> None:
    assert HostSpec.of(SearchSection()) is None
    assert HostSpec.of(SearchSection(gpus_per_trial=0.25)) is None


def test_a_host_holds_what_a_process_of_one_trial_would_and_a_whole_gpu() -> None:
    assert HostSpec.of(SearchSection(trials_per_process=4)) == HostSpec(4, cpus=1.0, gpus=0.0)
    assert HostSpec.of(SearchSection(trials_per_gpu=4, cpus_per_trial=2)) == HostSpec(4, cpus=2.0, gpus=1.0)
    assert HostSpec.of(SearchSection(trials_per_gpu=4, gpus_per_trial=1)) == HostSpec(4, cpus=1.0, gpus=1.0)


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"trials_per_gpu": 2, "gpus_per_trial": 2}, "a trial takes 2 processes .* not both"),
        ({"trials_per_gpu": 2, "gpus_per_trial": 0.5}, "a part of a GPU .* leave gpus_per_trial out"),
        ({"trials_per_gpu": 2, "trials_per_process": 3}, "both say how many trials share a process"),
        ({"trials_per_process": 2, "processes_per_trial": 2}, "a trial takes 2 processes"),
        ({"trials_per_process": 2, "gpus_per_trial": 1}, "give trials_per_gpu"),
    ],
)
def test_contradictions_are_refused(search: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SearchSection(**search)


@pytest.mark.parametrize(
    "other",
    [
        {"training": {"deepspeed": {"zero_stage": 2}}},
        {"training": {"deepspeed": {"activation_checkpointing": True}}},
        {"base": {"dtype": "float16"}},
    ],
)
def test_what_trains_one_job_at_a_time_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"trains one job at a time, not packs"):
        Config.model_validate({"name": "x", "search": {"trials_per_gpu": 2}, **other})


def test_trials_go_where_the_fewest_are() -> None:
    seats = Seats(2)
    assert [seats.take(trial) for trial in range(4)] == [0, 1, 0, 1]
    seats.leave(1)
    seats.leave(1)
    assert [seats.take(trial) for trial in (4, 5)] == [1, 0]


def test_a_shared_process_is_counted_once() -> None:
    """Two trials of 4 s each of one process that worked for 10 s."""
    times = {"session_started": 0, "trial_completed": 9, "session_ended": 10}

    def event(kind: str, **fields: Any) -> dict[str, Any]:
        return {"event": kind, "time": f"2024-05-01T10:00:{times.get(kind, 0):02d}+00:00", **fields}

    events = [
        event("session_started", n_slots=2, n_processes=1),
        *(event("trial_suggested", index=i) for i in range(2)),
        *(event("trial_started", index=i) for i in range(2)),
        *(event("trial_completed", index=i, metrics={"seconds": 4.0}) for i in range(2)),
        event("session_ended"),
    ]
    assert utilisation(events) == pytest.approx(0.8)


# ------------------------------------------------------------------------------------- a host by itself


def layout(bits: str = "0110", rank: int = 4) -> CanonicalLayout:
    return CanonicalLayout(tuple(bit == "1" for bit in bits), rank)


@pytest.fixture(scope="module")
def splits(make_split: Callable[..., UserSplit]) -> list[UserSplit]:
    return [make_split(f"u-{i}", 3, 2, 2, 1, seed=i) for i in range(2)]


def task_of(base: Path, splits: list[UserSplit], **training: Any) -> TrialTask:
    common: dict[str, Any] = {"memory_epochs": 3, "learning_rate": 1e-2, "batch_size": 2}
    return TrialTask(
        base=BaseSection(model=str(base), device="cpu"),
        training=TrainingSection(**{**common, **training}),
        prompt=PromptSection(),
        stages="memory",
        max_new_tokens=6,
        batch_size=4,
        seed=0,
        splits=tuple(splits),
        rungs=(1,),
    )


def host_of(task: TrialTask) -> TrialHost:
    host = TrialHost()
    host.ready(lambda: task)
    return host


def test_a_trial_left_at_a_rung_holds_up_nobody(tiny_llama_dir: Path, splits: list[UserSplit]) -> None:
    task = task_of(tiny_llama_dir, splits)
    host = host_of(task)
    left = host.advance(0, layout("1111").to_dict(), False)
    assert left["values"][RUNG] == 0
    rung = host.advance(1, layout().to_dict(), False)["values"]
    host.forget(0)
    values = host.advance(1, layout().to_dict(), True)["values"]
    assert "broken" in host.advance(0, layout("1111").to_dict(), True), "it was forgotten"
    assert "values" in host.advance(0, layout("1111").to_dict(), False), "it may begin again"
    host.close()
    alone = measure(load_base(task.base), layout(), task)
    assert rung["validation_loss_at_rung"] > values["validation_loss"]
    assert values["validation_loss"] == pytest.approx(alone["validation_loss"], abs=1e-5)
    assert values["rouge_l"] == pytest.approx(alone["rouge_l"], abs=1e-6)
    assert (values["steps"], values["tokens"]) == (alone["steps"], alone["tokens"])
    assert list(Path(tempfile.gettempdir()).glob(f"{SCRATCH_PREFIX}{os.getpid()}-*")) == []


def test_a_diverging_layout_is_told_in_plain_words(tiny_llama_dir: Path, splits: list[UserSplit]) -> None:
    task = task_of(tiny_llama_dir, splits, learning_rate=1e30, memory_epochs=6)
    host = host_of(task)
    answer = host.advance(0, layout().to_dict(), False)
    if "values" in answer:  # it may get as far as the rung
        answer = host.advance(0, layout().to_dict(), True)
    host.close()
    assert "diverged" in answer["failed"]
    assert "broken" in host.advance(1, layout().to_dict(), False), "it was closed"


# ------------------------------------------------------------------------------------------------- on Tune


def settings(base: Path, **search: Any) -> StudySettings:
    section: dict[str, Any] = {
        "n_trials": 8,
        "n_initial": 4,
        "batch_size": 2,
        "proposals": "repeatable",
        "lookahead": 2,
        "n_probe_users": 2,
        "objectives": ("validation_loss", "rouge_l", "adapter_parameters"),
        "surrogate": SurrogateSection(inference="map", n_ensemble=2),
        "max_failures": 1,
        "cpus_per_trial": 1,
    }
    return StudySettings(
        base=BaseSection(model=str(base), device="cpu"),
        space=SpaceSection(ranks=(2, 4)),
        training=TrainingSection(memory_epochs=2, learning_rate=1e-2),
        prompt=PromptSection(),
        search=SearchSection(**{**section, **search}),
        evaluation=EvaluationSection(max_new_tokens=6),
        seed=0,
    )


def assert_same_study(one: StudyResult, other: StudyResult) -> None:
    assert [trial.layout.key for trial in one.trials] == [trial.layout.key for trial in other.trials]
    for ours, theirs in zip(one.trials, other.trials, strict=True):
        for name in ("validation_loss", "rouge_l", "adapter_parameters", "steps", "tokens"):
            assert ours.metrics[name] == pytest.approx(theirs.metrics[name], abs=1e-5), name


@pytest.mark.ray
def test_a_cluster_without_room_for_a_host_is_told_of(
    ray_local: None, tmp_path: Path, tiny_llama_dir: Path, splits: list[UserSplit]
) -> None:
    large = settings(tiny_llama_dir, trials_per_process=4, cpus_per_trial=3)
    with pytest.raises(MilpError, match=r"4 trials that share a process take 3 CPUs .* cluster has 2 CPUs"):
        run_study(tmp_path / "study", large, splits, SHAPES)


@pytest.mark.slow
@pytest.mark.ray
def test_a_study_in_one_process_is_the_study_of_a_process_a_trial(
    ray_local: None, tmp_path: Path, tiny_llama_dir: Path, splits: list[UserSplit]
) -> None:
    """Twice in a shared process, and once with a process a trial; resuming either finds it finished."""
    pair = settings(tiny_llama_dir, **PAIR, max_concurrent_trials=2)
    shared = run_study(tmp_path / "a", pair, splits, SHAPES)
    again = run_study(tmp_path / "b", pair, splits, SHAPES)
    alone = run_study(tmp_path / "c", settings(tiny_llama_dir, max_concurrent_trials=1), splits, SHAPES)
    assert_same_study(shared, again)
    assert_same_study(shared, alone)
    assert run_study(tmp_path / "a", settings(tiny_llama_dir), splits, SHAPES) == shared
    events = read_events(tmp_path / "a" / "journal.jsonl")
    [session] = [event for event in events if event["event"] == "session_started"]
    assert (session["n_slots"], session["n_processes"]) == (2, 1)
    assert 0 < (utilisation(events) or 0) < 1
    order = [event["event"] for event in events]
    assert order[: order.index("trial_completed")].count("trial_started") == 2, "two trials at once"


@pytest.mark.ray
@pytest.mark.slow
def test_trials_stopped_at_a_rung_leave_the_others_as_they_are(
    ray_local: None, tmp_path: Path, tiny_llama_dir: Path, splits: list[UserSplit]
) -> None:
    stopping = EarlyStoppingSection(enabled=True, min_records=3)
    common: dict[str, Any] = {"n_trials": 8, "n_initial": 8}
    alone = run_study(tmp_path / "alone", settings(tiny_llama_dir, **common), splits, SHAPES)
    four = {"trials_per_process": 4, "cpus_per_trial": 2, "early_stopping": stopping}
    result = run_study(tmp_path / "shared", settings(tiny_llama_dir, **common, **four), splits, SHAPES)
    assert result.n_stopped >= 1
    assert result.n_stopped + result.n_completed == 8
    for ours, theirs in zip(result.trials, alone.trials, strict=True):
        if ours.status == "completed":
            loss = theirs.metrics["validation_loss"]
            assert ours.metrics["validation_loss"] == pytest.approx(loss, abs=1e-5)


@pytest.mark.ray
@pytest.mark.slow
def test_diverging_trials_fail_and_the_study_says_why(
    ray_local: None, tmp_path: Path, tiny_llama_dir: Path, splits: list[UserSplit]
) -> None:
    section = settings(tiny_llama_dir, n_trials=2, n_initial=2, **PAIR)
    wild = StudySettings(
        **{
            **vars(section),
            "training": TrainingSection(memory_epochs=3, learning_rate=1e30, max_grad_norm=1e30),
        }
    )
    with pytest.raises(MilpError, match=r"all 2 trials of the search failed.*diverged"):
        run_study(tmp_path / "study", wild, splits, SHAPES)


def host_processes() -> list[psutil.Process]:
    named = [(p, " ".join(p.info["cmdline"] or ())) for p in psutil.process_iter(["cmdline"])]
    ours = {child.pid for child in psutil.Process().children(recursive=True)}
    return [p for p, name in named if name.startswith("ray::TrialHost") and p.pid in ours]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_host_is_started_anew_and_its_trials_are_tried_again(
    ray_local: None, tmp_path: Path, tiny_llama_dir: Path, splits: list[UserSplit]
) -> None:
    """All hosts at once, with trials at work in them: no trial fails for good, none counts twice."""
    killed: list[int] = []
    journal = tmp_path / "study" / "journal.jsonl"

    def kill() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not killed:
            if journal.exists() and len(read_study(journal).completed) >= 2:
                killed.extend(process.pid for process in host_processes())
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    result = run_study(tmp_path / "study", settings(tiny_llama_dir, **PAIR, max_failures=2), splits, SHAPES)
    killer.join()
    assert killed
    assert result.n_completed == 8
    alone = run_study(tmp_path / "alone", settings(tiny_llama_dir), splits, SHAPES)
    assert_same_study(result, alone)


@pytest.mark.ray
@pytest.mark.slow
def test_a_measurement_whose_host_is_lost_says_so_and_the_next_one_waits_for_the_new_host(
    ray_local: None, tiny_llama_dir: Path, splits: list[UserSplit]
) -> None:
    task = task_of(tiny_llama_dir, splits)
    spec = HostSpec(2, cpus=1.0, gpus=0.0)
    with trial_hosts(task, spec, 1) as [host]:
        measurement = HostMeasurement(host, 0, layout(), 1)
        measurement.next_rung()
        [process] = host_processes()
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(HostFailed, match="lost"):
            measurement.finish()
        measurement.close()
        retried = HostMeasurement(host, 0, layout(), 1)
        retried.next_rung()
        assert retried.finish()["steps"] > 0
    deadline = time.monotonic() + 30
    while host_processes():
        assert time.monotonic() < deadline, "the host is still there"
        time.sleep(0.1)
