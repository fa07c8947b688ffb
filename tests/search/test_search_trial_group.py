"""Trials that several processes train, through Ray Train inside Tune: as one process, and nothing is left."""

from __future__ import annotations

import os
import signal
import tempfile
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
from milp_ray.config.search import EarlyStoppingSection, SearchSection, SpaceSection
from milp_ray.config.training import TrainingSection
from milp_ray.errors import MilpError
from milp_ray.memory.architecture import FfnShapes
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.search.journal import read_events
from milp_ray.search.measure import TrialTask, measure
from milp_ray.search.study import StudySettings, run_study
from milp_ray.search.trainers import SCRATCH_PREFIX
from milp_ray.search.trial_group import GroupFailed, GroupSpec, TrialGroup, no_resources
from milp_ray.training.base import load_base
from milp_ray.users.records import UserSplit

MODULES = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
SHAPES = FfnShapes(
    4, tuple((name, *sides) for name, sides in zip(MODULES, [(32, 64)] * 2 + [(64, 32)], strict=True))
)
PAIR = GroupSpec(2, cpus=0.5, gpus=0.0)


# ------------------------------------------------------------------------------------------------ resources


def test_a_trial_of_one_process_is_no_group() -> None:
    assert GroupSpec.of(SearchSection()) is None
    assert GroupSpec.of(SearchSection(gpus_per_trial=0.25)) is None
    assert GroupSpec.of(SearchSection(gpus_per_trial=1)) is None


def test_a_trial_of_several_gpus_has_a_process_on_each() -> None:
    group = GroupSpec.of(SearchSection(gpus_per_trial=4, cpus_per_trial=8))
    assert group == GroupSpec(4, cpus=2.0, gpus=1.0)


def test_the_trials_own_process_reserves_neither_cpus_nor_gpus() -> None:
    [bundle] = no_resources().bundles
    assert set(bundle) == {"memory"}


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"gpus_per_trial": 1.5}, "gpus_per_trial 1.5: .* use 1 or 2"),
        ({"gpus_per_trial": 2, "processes_per_trial": 4}, "processes_per_trial 4 with gpus_per_trial 2"),
        ({"gpus_per_trial": 0.5, "processes_per_trial": 2}, "make them equal"),
    ],
)
def test_shares_that_do_not_come_out_are_refused(search: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SearchSection(**search)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"zero_stage": 2, "offload_parameters": "cpu"}, "zero_stage 2: only ZeRO-3 divides parameters"),
        ({"zero_stage": 0, "offload_optimizer": "cpu"}, "set zero_stage to 1, 2 or 3"),
    ],
)
def test_offload_needs_the_stage_that_divides(training: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainingSection(deepspeed=training)


def test_a_base_in_main_memory_needs_zero_3() -> None:
    kept = BaseSection(keep_on="cpu")
    with pytest.raises(ValidationError, match=r"keep_on is 'cpu' with .*zero_stage 0.* set zero_stage to 3"):
        Config(name="x", base=kept)
    Config(name="x", base=kept, training=TrainingSection(deepspeed={"zero_stage": 3}))


@pytest.mark.ray
def test_a_cluster_without_room_for_a_trial_is_told_of(
    ray_local: None, tmp_path: Path, tiny_llama_dir: Path, splits: list[UserSplit]
) -> None:
    large = settings(tiny_llama_dir, processes_per_trial=3, cpus_per_trial=3)
    with pytest.raises(MilpError, match=r"3 processes of a trial take .* cluster has 2 CPUs .* lower them"):
        run_study(tmp_path / "study", large, splits, SHAPES)


def test_processes_on_one_named_gpu_are_refused() -> None:
    with pytest.raises(
        ValidationError, match=r"base.device 'cuda:1': .* set base.device to 'auto' or 'cuda'"
    ):
        Config(name="x", base=BaseSection(device="cuda:1"), search=SearchSection(gpus_per_trial=2))
    assert Config(name="x", search=SearchSection(gpus_per_trial=2)).search.n_processes == 2


# --------------------------------------------------------------------------------------- on Ray, with workers


def settings(base: Path, **search: Any) -> StudySettings:
    section: dict[str, Any] = {
        "n_trials": 4,
        "n_initial": 4,
        "n_probe_users": 2,
        "max_failures": 0,
        "cpus_per_trial": 1,
        "objectives": ("validation_loss", "rouge_l"),
    }
    return StudySettings(
        base=BaseSection(model=str(base), device="cpu"),
        space=SpaceSection(ranks=(2, 4)),
        training=TrainingSection(
            memory_epochs=2, learning_rate=1e-2, batch_size=2, deepspeed={"zero_stage": 2}
        ),
        prompt=PromptSection(),
        search=SearchSection(**{**section, **search}),
        evaluation=EvaluationSection(max_new_tokens=6),
        seed=0,
    )


def task_of(base: Path, splits: list[UserSplit], **training: Any) -> TrialTask:
    common: dict[str, Any] = {"memory_epochs": 2, "learning_rate": 1e-2, "batch_size": 2}
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


@pytest.fixture(scope="module")
def splits(make_split: Callable[..., UserSplit]) -> list[UserSplit]:
    return [make_split(f"u-{i}", 5, 2, 2, 1, seed=i) for i in range(2)]


def layout(bits: str = "0110", rank: int = 4) -> CanonicalLayout:
    return CanonicalLayout(tuple(bit == "1" for bit in bits), rank)


def wait_for_free_cpus() -> None:
    import ray

    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != 2.0:
        assert time.monotonic() < deadline, "the processes' CPUs are still reserved"
        time.sleep(0.1)


@pytest.mark.ray
@pytest.mark.slow
def test_a_group_measures_what_one_process_measures(
    ray_local: None, tiny_llama_dir: Path, splits: list[UserSplit]
) -> None:
    """Layout after layout in the same processes: rungs, a trial left at a rung, a diverged one, the end."""
    task = task_of(tiny_llama_dir, splits, deepspeed={"zero_stage": 3})
    base = load_base(task.base)
    group = TrialGroup(task, PAIR)
    try:
        left = group.measurement(layout("1111"))
        assert left.has_rungs_left
        left.next_rung()
        left.close()
        for bits in ("0110", "1000"):
            measurement = group.measurement(layout(bits))
            rung = measurement.next_rung()
            assert not measurement.has_rungs_left
            values = measurement.finish()
            alone = measure(base, layout(bits), task)
            assert rung["validation_loss_at_rung"] > values["validation_loss"]
            assert values["validation_loss"] == pytest.approx(alone["validation_loss"], abs=1e-4)
            assert values["rouge_l"] == pytest.approx(alone["rouge_l"], abs=1e-6)
            assert values["steps"] == alone["steps"]
            assert values["per_user"].keys() == alone["per_user"].keys()
    finally:
        group.end()
    wait_for_free_cpus()
    assert list(Path(tempfile.gettempdir()).glob(f"{SCRATCH_PREFIX}{os.getpid()}-*")) == []


@pytest.mark.ray
@pytest.mark.slow
def test_a_diverged_layout_is_told_and_the_processes_go_on(
    ray_local: None, tiny_llama_dir: Path, splits: list[UserSplit]
) -> None:
    wild = TrialGroup(task_of(tiny_llama_dir, splits, learning_rate=1e30, memory_epochs=6), PAIR)
    try:
        for _ in range(2):
            with pytest.raises(MilpError, match="diverged"):
                wild.measurement(layout()).finish()
    finally:
        wild.end()


@pytest.mark.ray
@pytest.mark.slow
def test_a_lost_process_ends_the_group_and_the_next_order_starts_another(
    ray_local: None, tiny_llama_dir: Path, splits: list[UserSplit]
) -> None:
    group = TrialGroup(task_of(tiny_llama_dir, splits), PAIR)
    try:
        group.measurement(layout()).next_rung()
        workers = [p for p in psutil.process_iter(["cmdline"]) if "RayTrainWorker" in str(p.info["cmdline"])]
        assert len(workers) == 2
        os.kill(workers[0].pid, signal.SIGKILL)
        with pytest.raises(GroupFailed):
            group.measurement(layout("0011")).finish()
        assert group.measurement(layout("0011")).finish()["steps"] > 0
    finally:
        group.end()
    wait_for_free_cpus()


@pytest.mark.ray
@pytest.mark.slow
def test_a_study_of_groups_two_at_once_gives_what_one_process_a_trial_gives(
    ray_local: None, tmp_path: Path, tiny_llama_dir: Path, splits: list[UserSplit]
) -> None:
    stopping = EarlyStoppingSection(enabled=True, min_records=4)
    plain = run_study(tmp_path / "plain", settings(tiny_llama_dir), splits, SHAPES)
    groups = settings(tiny_llama_dir, processes_per_trial=2, early_stopping=stopping)
    result = run_study(tmp_path / "groups", groups, splits, SHAPES)
    order = [e["event"] for e in read_events(tmp_path / "groups" / "journal.jsonl")]
    ends = [order.index(end) for end in ("trial_completed", "trial_stopped") if end in order]
    assert order[: min(ends)].count("trial_started") == 2, "two trials at once"
    assert result.n_completed >= 3
    ours = {trial.index: trial.metrics for trial in plain.trials}
    for trial in result.trials:
        if trial.status != "completed":
            assert trial.status == "stopped"
            continue
        expected = ours[trial.index]["validation_loss"]
        assert trial.metrics["validation_loss"] == pytest.approx(expected, abs=1e-4)
        assert trial.metrics["rouge_l"] == pytest.approx(ours[trial.index]["rouge_l"], abs=1e-6)
    wait_for_free_cpus()
