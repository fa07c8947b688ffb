"""Stopping at rungs: the scheduler's decisions by themselves, and on Ray Tune with really trained trials."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle, tune
from ray.tune.schedulers import TrialScheduler

from milp_ray.config.base import BaseSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.search import EarlyStoppingSection
from milp_ray.config.training import TrainingSection
from milp_ray.environment import environment
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.search.measure import TrialTask, measure
from milp_ray.search.rungs import RUNG, RungRecord
from milp_ray.search.scheduler import RungScheduler
from milp_ray.search.trainers import SCRATCH_PREFIX
from milp_ray.search.trial import FAILED, MeasureLayout
from milp_ray.training.base import load_base
from milp_ray.users.records import UserSplit

BOTH = ("validation_loss", "adapter_parameters")
SECTION = EarlyStoppingSection(enabled=True, eta=2, first_rung=1, min_records=1)


def record(trial: int, loss: float, parameters: int = 0, rung: int = 0) -> RungRecord:
    return RungRecord(trial, rung, rung + 1, parameters, loss, None, (loss,), 0.5, 10, 2)


def judge(scheduler: RungScheduler, a_record: RungRecord) -> str:
    result = {**a_record.to_dict(), "training_iteration": a_record.rung + 1, "time_total_s": 1.0}
    trial = SimpleNamespace(config={"trial": a_record.trial})
    return scheduler.on_trial_result(SimpleNamespace(), trial, result)


# ----------------------------------------------------------------------------------------- the decisions


def test_a_trial_goes_on_when_it_is_in_the_best_half_of_those_that_came() -> None:
    scheduler = RungScheduler(1, SECTION, BOTH[:1])
    losses = [5.0, 4.0, 9.0, 4.5, 1.0]
    decisions = [judge(scheduler, record(i, loss)) for i, loss in enumerate(losses)]
    # 4.5 is second of four; 9.0 third of three, where two are kept.
    assert [d == TrialScheduler.STOP for d in decisions] == [False, False, True, False, False]
    assert judge(scheduler, record(5, 4.7)) == TrialScheduler.STOP


def test_a_small_adapter_is_a_reason_to_go_on_where_its_size_is_an_objective() -> None:
    for objectives, decision in ((BOTH, TrialScheduler.CONTINUE), (BOTH[:1], TrialScheduler.STOP)):
        scheduler = RungScheduler(1, SECTION, objectives)
        for i in range(3):
            judge(scheduler, record(i, 1.0 + i / 10, 1000 + i))
        assert judge(scheduler, record(3, 2.0, 10)) == decision


def test_rungs_are_judged_apart() -> None:
    scheduler = RungScheduler(1, SECTION, BOTH)
    judge(scheduler, record(0, 1.0, rung=0))
    judge(scheduler, record(0, 0.5, rung=1))
    assert judge(scheduler, record(1, 3.0, rung=1)) == TrialScheduler.STOP
    assert judge(scheduler, record(2, 0.9, rung=0)) == TrialScheduler.CONTINUE


def test_nothing_is_stopped_before_enough_records_and_earlier_sessions_count() -> None:
    section = SECTION.model_copy(update={"min_records": 3})
    fresh = RungScheduler(1, section, BOTH)
    assert [judge(fresh, record(i, float(i))) for i in range(2)] == [TrialScheduler.CONTINUE] * 2
    assert judge(fresh, record(2, 2.0)) == TrialScheduler.STOP
    resumed = RungScheduler(1, section, BOTH, [record(0, 0.0), record(1, 1.0)])
    assert judge(resumed, record(2, 2.0)) == TrialScheduler.STOP


def test_a_trial_that_is_measured_again_counts_once() -> None:
    scheduler = RungScheduler(1, SECTION.model_copy(update={"min_records": 3}), BOTH, [record(0, 1.0)])
    judge(scheduler, record(0, 1.0))
    assert judge(scheduler, record(1, 9.0)) == TrialScheduler.CONTINUE  # the second record, not the third


def test_records_are_told_also_of_a_trial_that_is_stopped() -> None:
    told: list[RungRecord] = []
    scheduler = RungScheduler(1, SECTION, BOTH, on_rung=told.append)
    assert judge(scheduler, record(0, 1.0)) == TrialScheduler.CONTINUE
    assert judge(scheduler, record(1, 2.0)) == TrialScheduler.STOP
    assert told == [record(0, 1.0), record(1, 2.0)]
    assert "2 at rung 0; 1 stopped" in scheduler.debug_string()


def test_tune_may_pickle_it_whatever_the_callback_holds(tmp_path: Path) -> None:
    with (tmp_path / "journal").open("a") as file:
        scheduler = RungScheduler(1, SECTION, BOTH, on_rung=lambda r: file.write(str(r.trial)))
        judge(scheduler, record(0, 1.0))
        copied = pickle.loads(cloudpickle.dumps(scheduler))
    assert judge(copied, record(1, 9.0, parameters=9)) == TrialScheduler.STOP


def test_a_result_that_is_no_rung_s_is_let_through() -> None:
    scheduler = RungScheduler(1, SECTION, BOTH)
    trial = SimpleNamespace(config={"trial": 0})
    for result in ({"validation_loss": 1.0}, {FAILED: "diverged"}):
        assert scheduler.on_trial_result(SimpleNamespace(), trial, result) == TrialScheduler.CONTINUE


# ------------------------------------------------------------------------------------------------ on Tune

LAYOUTS = [((0, 1, 2, 3), 8), ((0, 1, 2, 3), 4), ((3,), 1), ((), 0), ((2, 3), 8)]


def layout(index: int) -> CanonicalLayout:
    layers, rank = LAYOUTS[index]
    return CanonicalLayout(tuple(i in layers for i in range(4)), rank)


@pytest.fixture(scope="module")
def task(make_split: Callable[..., UserSplit], tiny_llama_dir: Path) -> TrialTask:
    return TrialTask(
        base=BaseSection(model=str(tiny_llama_dir), device="cpu"),
        training=TrainingSection(memory_epochs=3, learning_rate=1e-2, batch_size=2),
        prompt=PromptSection(),
        stages="memory",
        max_new_tokens=4,
        batch_size=8,
        seed=0,
        splits=tuple(make_split(f"u-{i}", 4, 2, 2, 1, seed=i) for i in range(2)),
        rungs=(1, 2),
    )


@pytest.fixture(scope="module")
def search(
    ray_local: None, task: TrialTask, tmp_path_factory: pytest.TempPathFactory
) -> tuple[tune.ResultGrid, list[RungRecord], list[RungRecord]]:
    """The layouts on one worker, one after the other: records of all rungs, and those of stopped trials."""
    rungs: list[RungRecord] = []
    scheduler = RungScheduler(1, SECTION, ("validation_loss", "rouge_l"), on_rung=rungs.append)
    folder = tmp_path_factory.mktemp("tune")
    layouts = [layout(i).to_dict() for i in range(len(LAYOUTS))]
    settings = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # one that Tune leaves behind swallows a later interruption
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
    }
    with environment(settings):
        grid = tune.Tuner(
            tune.with_resources(tune.with_parameters(MeasureLayout, task=task), {"cpu": 1}),
            param_space={
                "trial": tune.grid_search(list(range(len(LAYOUTS)))),
                "layout": tune.sample_from(lambda spec: layouts[spec["trial"]]),
            },
            tune_config=tune.TuneConfig(scheduler=scheduler, reuse_actors=True, max_concurrent_trials=1),
            run_config=tune.RunConfig(
                storage_path=str(folder),
                verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            ),
        ).fit()
    ended_at = {trial: metrics.get(RUNG) for trial, metrics in results(grid).items()}
    return grid, rungs, [r for r in rungs if r.rung == ended_at[r.trial]]


def results(grid: tune.ResultGrid) -> dict[int, dict[str, Any]]:
    return {result.config["trial"]: result.metrics for result in grid}


@pytest.mark.ray
def test_bad_trials_are_stopped_and_the_others_are_not(search: tuple) -> None:
    grid, rungs, stops = search
    assert grid.num_errors == 0
    wanted = []
    for n, a_record in enumerate(rungs, start=1):
        losses = [r.validation_loss_at_rung for r in rungs[:n] if r.rung == a_record.rung]
        n_better = sum(loss < a_record.validation_loss_at_rung for loss in losses)
        if n_better >= (len(losses) + 1) // 2:
            wanted.append(a_record)
    assert stops == wanted
    assert 0 < len(stops) < len(LAYOUTS)
    for trial, metrics in results(grid).items():
        stopped = trial in {r.trial for r in stops}
        assert ("validation_loss" in metrics) != stopped
        assert ("rouge_l" in metrics) != stopped


@pytest.mark.ray
def test_what_survives_measures_the_same_bits_as_without_rungs(search: tuple, task: TrialTask) -> None:
    grid, _, stops = search
    base = load_base(task.base)
    survivors = set(range(len(LAYOUTS))) - {r.trial for r in stops}
    assert survivors
    clock = {"seconds", "peak_rss_mib", "peak_gpu_mib", "began"}
    for trial in survivors:
        alone = measure(base, layout(trial), replace(task, rungs=()))
        reported = results(grid)[trial]
        assert {n: reported[n] for n in alone if n not in clock} == {
            n: v for n, v in alone.items() if n not in clock
        }


@pytest.mark.ray
def test_one_worker_takes_all_trials_and_leaves_nothing_on_the_disk(search: tuple) -> None:
    grid, _, _ = search
    [process] = {metrics["pid"] for metrics in results(grid).values()}
    assert list(Path(tempfile.gettempdir()).glob(f"{SCRATCH_PREFIX}{process}-*")) == []


def test_an_actor_forgets_what_a_stopped_trial_kept(
    task: TrialTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    actor = MeasureLayout.__new__(MeasureLayout)
    actor._task = task
    actor.config = {"layout": layout(0).to_dict()}
    assert actor.step()[RUNG] == 0
    assert len(list(tmp_path.iterdir())) == 1
    actor.config = {"layout": layout(2).to_dict()}
    assert actor.reset_config(actor.config) is True
    assert list(tmp_path.iterdir()) == []
    assert [actor.step().get(RUNG) for _ in range(3)] == [0, 1, None]
    assert list(tmp_path.iterdir()) == []
    actor.step()
    actor.cleanup()
    assert list(tmp_path.iterdir()) == []
