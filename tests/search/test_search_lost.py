"""Processes that Ray ends as their node runs out of memory, of which it tells otherwise than of others."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.air.execution._internal import RayActorManager
from ray.air.execution._internal.tracked_actor import TrackedActor
from ray.air.execution._internal.tracked_actor_task import TrackedActorTask
from ray.exceptions import OutOfMemoryError, RayActorError

from milp_ray.config.base import BaseSection
from milp_ray.config.evaluation import EvaluationSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.search import SearchSection, SpaceSection
from milp_ray.config.training import TrainingSection
from milp_ray.errors import MilpError
from milp_ray.memory.architecture import FfnShapes
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.search import lost
from milp_ray.search.journal import read_events, read_study
from milp_ray.search.lost import told_to_tune
from milp_ray.search.searcher import error_reason
from milp_ray.search.study import StudySettings
from milp_ray.search.suggest import ActorProposer, Question
from milp_ray.search.trial_host import Host, HostFailed, HostMeasurement
from milp_ray.users.records import UserSplit


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise OutOfMemoryError("1 worker(s) were killed due to the node running low on memory")


def test_tune_takes_a_process_that_was_ended_for_its_memory_for_one_that_died() -> None:
    told: list[Exception] = []
    manager: Any = RayActorManager(SimpleNamespace(free_resources=lambda **_: None))
    actor = TrackedActor(1)
    manager._live_actors_to_ray_actors_resources[actor] = (None, None)
    task = TrackedActorTask(actor, on_error=lambda _, error: told.append(error))
    with told_to_tune():
        manager._actor_task_failed(tracked_actor_task=task, exception=OutOfMemoryError("the node is full"))
    assert isinstance(told[0], RayActorError)
    assert error_reason(pickle.loads(pickle.dumps(told[0]))) == "OutOfMemory"
    with pytest.raises(RuntimeError):  # as it was before
        manager._actor_task_failed(tracked_actor_task=task, exception=OutOfMemoryError("the node is full"))


def test_a_proposer_that_was_ended_for_its_memory_is_asked_again_and_then_told_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Question] = []
    actor = SimpleNamespace(
        propose=SimpleNamespace(remote=lambda question, _: asked.append(question) or "reply")
    )
    monkeypatch.setattr(ActorProposer, "start", lambda self: setattr(self, "_actor", actor))
    monkeypatch.setattr(ray, "wait", lambda replies, timeout: (replies, []))
    monkeypatch.setattr(ray, "get", out_of_memory)
    proposer = ActorProposer(SimpleNamespace())  # type: ignore[arg-type]
    proposer.submit(Question((), batch=1, n=1))
    for _ in range(3):
        assert proposer.poll() is None
    assert len(asked) == 4
    with pytest.raises(MilpError, match=r"lost again and again.*out of memory.*inference=map"):
        proposer.poll()


def test_a_trial_whose_host_was_ended_for_its_memory_says_that_it_was_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def method() -> Any:
        called = SimpleNamespace(remote=lambda *_: None)
        return SimpleNamespace(remote=called.remote, options=lambda **_: called)

    monkeypatch.setattr(ray, "get", out_of_memory)
    host = Host(SimpleNamespace(ready=method(), advance=method(), forget=method()), lambda: None)  # type: ignore
    measurement = HostMeasurement(host, 0, CanonicalLayout((True, False), 2), 1)
    with pytest.raises(HostFailed, match="lost"):
        measurement.next_rung()
    measurement._is_begun = True
    measurement.close()


# Ray's memory monitor, which ends everything here: next to no memory may be used.
DRIVER = """
import pickle, sys, time
from pathlib import Path
import ray
from ray import tune
from milp_ray.search.study import run_study


class Waits(tune.Trainable):
    def setup(self, config, task):
        pass

    def step(self):
        time.sleep(600)


if __name__ == "__main__":
    arguments = pickle.loads(Path(sys.argv[1]).read_bytes())
    monitor = {"memory_usage_threshold": 0.001, "memory_monitor_refresh_ms": 100}
    ray.init(
        address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False,
        _system_config=monitor,
    )
    run_study(*arguments, trainable=Waits)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_trials_that_ray_s_memory_monitor_ends_are_tried_again_and_then_have_failed(
    tmp_path: Path, make_split: Callable[..., UserSplit]
) -> None:
    settings = StudySettings(
        base=BaseSection(model="none", device="cpu"),
        space=SpaceSection(ranks=(2, 4)),
        training=TrainingSection(),
        prompt=PromptSection(),
        search=SearchSection(n_trials=2, n_initial=2, max_failures=1),
        evaluation=EvaluationSection(),
        seed=0,
    )
    shapes = FfnShapes(4, (("mlp.up_proj", 32, 64),))
    split = make_split("u-0", 3, 2, 2, 1, seed=0)
    (tmp_path / "arguments").write_bytes(pickle.dumps((tmp_path / "study", settings, [split], shapes)))
    (tmp_path / "driver.py").write_text(DRIVER)
    driver = subprocess.run(
        [sys.executable, str(tmp_path / "driver.py"), str(tmp_path / "arguments")],
        env={**os.environ, "PYTHONPATH": str(Path(lost.__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "all 2 trials of the search failed: OutOfMemory" in driver.stderr
    journal = tmp_path / "study" / "journal.jsonl"
    assert [(t.status, t.reason) for t in read_study(journal).trials] == [("failed", "OutOfMemory")] * 2
    assert read_events(journal)[-2]["event"] == "study_finished"
    errors = (tmp_path / "study" / "tune").rglob("error.txt")
    assert ["Failure # 2" in path.read_text() for path in errors] == [True, True], "tried twice"
