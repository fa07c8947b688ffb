"""Whole studies on Ray Tune: every trial trains a tiny random model, and a process is really killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from milp_ray.config.base import BaseSection
from milp_ray.config.evaluation import EvaluationSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.search import SearchSection, SpaceSection, SurrogateSection
from milp_ray.config.training import TrainingSection
from milp_ray.errors import MilpError
from milp_ray.memory.architecture import FfnShapes
from milp_ray.search import study
from milp_ray.search.journal import read_events, read_study
from milp_ray.search.results import StudyResult, load_result
from milp_ray.search.study import StudySettings, run_study
from milp_ray.users.records import UserSplit

pytestmark = pytest.mark.ray

MODULES = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
SHAPES = FfnShapes(
    4, tuple((name, *sides) for name, sides in zip(MODULES, [(32, 64)] * 2 + [(64, 32)], strict=True))
)


def settings(base: Path, **search: Any) -> StudySettings:
    section = {
        "n_trials": 8,
        "n_initial": 4,
        "batch_size": 2,
        "proposals": "repeatable",
        "lookahead": 2,
        "n_probe_users": 2,
        "objectives": ("validation_loss", "rouge_l", "adapter_parameters"),
        "surrogate": SurrogateSection(inference="map", n_ensemble=2),
        "max_failures": 0,
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


@pytest.fixture(scope="module")
def splits(make_split: Callable[..., UserSplit]) -> list[UserSplit]:
    return [make_split(f"u-{i}", 3, 2, 2, 1, seed=i) for i in range(2)]


@pytest.fixture(scope="module")
def one_worker(
    tmp_path_factory: pytest.TempPathFactory, ray_local: None, tiny_llama_dir: Path, splits: list[UserSplit]
) -> tuple[Path, StudyResult]:
    """A study that one worker ran from beginning to end."""
    folder = tmp_path_factory.mktemp("one") / "study"
    return folder, run_study(folder, settings(tiny_llama_dir, max_concurrent_trials=1), splits, SHAPES)


def values(result: StudyResult) -> list[tuple]:
    names = ("validation_loss", "rouge_l", "adapter_parameters")
    return [(t.index, t.batch, t.layout.key, *(t.metrics.get(n) for n in names)) for t in result.trials]


def test_a_study_measures_initial_and_proposed_layouts(one_worker: tuple[Path, StudyResult]) -> None:
    folder, result = one_worker
    assert result.n_completed == 8
    assert [t.generator for t in result.trials] == ["sobol"] * 4 + ["saas_nehvi"] * 4
    assert len({t.layout.key for t in result.trials}) == 8
    assert result.finished == "all trials have ended"
    assert load_result(folder / "journal.jsonl") == result
    assert {len(own) for own in read_study(folder / "journal.jsonl").probe_traits.values()} == {2}
    assert (folder / "trials.parquet").exists()


def test_no_text_of_a_user_is_in_what_a_study_writes(
    one_worker: tuple[Path, StudyResult], splits: list[UserSplit]
) -> None:
    folder, _ = one_worker
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.name == "result.json" for path in files)
    for path in files:
        content = path.read_bytes()
        for split in splits:
            assert not any(turn.text.encode() in content for turn in split.history), path
            assert split.user_id.encode() not in content, path


@pytest.mark.slow
def test_a_warm_started_study_tries_the_earlier_front_first(
    one_worker: tuple[Path, StudyResult], tiny_llama_dir: Path, splits: list[UserSplit], tmp_path: Path
) -> None:
    folder, earlier = one_worker
    search = settings(tiny_llama_dir, warm_start=(folder.parent,), n_trials=6)
    result = run_study(tmp_path / "study", search, splits, SHAPES)
    assert result.n_completed == 6
    generators = [trial.generator for trial in result.trials]
    assert generators[:2] == ["warm_start"] * 2
    assert generators[4:] == ["saas_nehvi"] * 2
    front = {point.layout.key for point in earlier.front}
    assert {trial.layout.key for trial in result.trials[:2]} <= front
    # The probe users are the same, so what was the best is measured to be as good again.
    known = {trial.layout.key: trial.metrics["validation_loss"] for trial in earlier.trials}
    for trial in result.trials[:2]:
        assert trial.metrics["validation_loss"] == known[trial.layout.key]


def test_a_warm_started_study_is_resumed_as_it_began_whatever_became_of_the_earlier_one(
    one_worker: tuple[Path, StudyResult],
    tiny_llama_dir: Path,
    splits: list[UserSplit],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = []
    monkeypatch.setattr(study, "_search", lambda *given: known.append(given[5]))
    earlier = tmp_path / "earlier"
    (earlier / "study").mkdir(parents=True)
    shutil.copy(one_worker[0] / "journal.jsonl", earlier / "study")
    search = settings(tiny_llama_dir, warm_start=(earlier,))
    with pytest.raises(MilpError, match="0 trials"):
        run_study(tmp_path / "study", search, splits, SHAPES)
    journal = earlier / "study" / "journal.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    [last] = [e for e in lines if e["event"] == "trial_completed" and e["index"] == 7]
    journal.write_text("".join(json.dumps(e) + "\n" for e in lines if e is not last))
    with pytest.raises(MilpError, match="0 trials"):
        run_study(tmp_path / "study", search, splits, SHAPES)
    shutil.rmtree(earlier)
    with pytest.raises(MilpError, match="0 trials"):
        run_study(tmp_path / "study", search, splits, SHAPES)
    assert known[0] == known[1] == known[2]
    assert len(known[0][0].observations) == 8
    with pytest.raises(MilpError, match=r"\(the earlier searches of search.warm_start differ\)"):
        run_study(tmp_path / "study", settings(tiny_llama_dir), splits, SHAPES)


@pytest.mark.slow
def test_a_study_with_early_stopping_is_resumed_with_what_it_saw_at_rungs(
    ray_local: None, tiny_llama_dir: Path, splits: list[UserSplit], tmp_path: Path
) -> None:
    stopping = {"enabled": True, "eta": 2, "first_rung": 1, "min_records": 3}
    common = {"early_stopping": stopping, "max_concurrent_trials": 1, "n_initial": 6}
    part = settings(tiny_llama_dir, **common, n_trials=6)
    run_study(tmp_path / "study", part, splits, SHAPES)
    whole = settings(tiny_llama_dir, **common, n_trials=9)
    result = run_study(tmp_path / "study", whole, splits, SHAPES)
    assert len(result.trials) == 9
    assert result.n_stopped >= 1
    assert result.n_stopped + result.n_completed == 9
    events = read_events(tmp_path / "study" / "journal.jsonl")
    assert sorted(e["index"] for e in events if e["event"] == "trial_rung") == list(range(9))
    stopped = [trial for trial in result.trials if trial.status == "stopped"]
    assert all("validation_loss" not in trial.metrics for trial in stopped)
    assert not {point.index for point in result.front} & {trial.index for trial in stopped}


def test_a_finished_study_is_not_run_again(
    one_worker: tuple[Path, StudyResult], tiny_llama_dir: Path, splits: list[UserSplit]
) -> None:
    folder, result = one_worker
    before = (folder / "journal.jsonl").read_bytes()
    # A different number of workers or retries is the same study.
    again = run_study(folder, settings(tiny_llama_dir, max_failures=3), splits, SHAPES)
    assert again == result
    assert (folder / "journal.jsonl").read_bytes() == before


@pytest.mark.parametrize("change", ["seed", "training", "users"])
def test_another_search_is_refused_in_the_same_folder(
    change: str, one_worker: tuple[Path, StudyResult], tiny_llama_dir: Path, splits: list[UserSplit]
) -> None:
    other = settings(tiny_llama_dir)
    if change == "seed":
        other = replace(other, seed=1)
    elif change == "training":
        other = replace(other, training=TrainingSection(memory_epochs=3))
    users = splits[::-1] if change == "users" else splits
    with pytest.raises(MilpError, match="another search"):
        run_study(one_worker[0], other, users, SHAPES)


DRIVER = """
import pickle, sys
from pathlib import Path
from milp_ray.config.cluster import RaySection
from milp_ray.search.study import run_study
from milp_ray.telemetry import ray_session

if __name__ == "__main__":
    folder, settings, splits, shapes = pickle.loads(Path(sys.argv[1]).read_bytes())
    with ray_session(RaySection(num_cpus=2)):
        run_study(folder, settings, splits, shapes)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_study_resumed_with_more_workers_is_the_same_study(
    one_worker: tuple[Path, StudyResult], tmp_path: Path, tiny_llama_dir: Path, splits: list[UserSplit]
) -> None:
    import pickle

    folder = tmp_path / "study"
    both = settings(tiny_llama_dir, max_concurrent_trials=2)
    (tmp_path / "arguments").write_bytes(pickle.dumps((folder, both, splits, SHAPES)))
    (tmp_path / "driver.py").write_text(DRIVER)
    driver = subprocess.Popen(
        [sys.executable, str(tmp_path / "driver.py"), str(tmp_path / "arguments")],
        env={**os.environ, "PYTHONPATH": str(Path(study.__file__).parents[2])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    journal = folder / "journal.jsonl"
    deadline = time.monotonic() + 240
    # Killed in the middle of the proposed trials: between two batches, or while some of one are running.
    while len(read_study(journal).completed) < 5 and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    ended = {t.index: t for t in read_study(journal).trials if t.has_ended}
    assert 5 <= len(ended) < 8
    resumed = run_study(folder, both, splits, SHAPES)
    assert values(resumed) == values(one_worker[1])
    assert resumed.front == one_worker[1].front
    assert {index: resumed.trials[index] for index in ended} == ended  # none lost, none measured again
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert len([e for e in lines if e["event"] == "trial_completed"]) == 8
    assert len([e for e in lines if e["event"] == "trial_suggested"]) == 8


@pytest.mark.slow
def test_failed_trials_are_marked_and_a_study_of_nothing_else_is_an_error(
    ray_local: None, tmp_path: Path, tiny_llama_dir: Path, splits: list[UserSplit]
) -> None:
    """Every layout with an adapter diverges under this step size."""
    wild = replace(
        settings(tiny_llama_dir, n_trials=2, n_initial=2),
        training=TrainingSection(memory_epochs=3, learning_rate=1e30, max_grad_norm=1e30),
    )
    with pytest.raises(MilpError, match="all 2 trials of the search failed"):
        run_study(tmp_path / "study", wild, splits, SHAPES)
    state = read_study(tmp_path / "study" / "journal.jsonl")
    assert [t.status for t in state.trials] == ["failed", "failed"]
    assert all(t.reason for t in state.trials)


def test_an_interruption_keeps_the_journal_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama_dir: Path, splits: list[UserSplit]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "_search", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"0 of 8 trials have ended.*same command"):
        run_study(tmp_path, settings(tiny_llama_dir), splits, SHAPES)
    assert read_study(tmp_path / "journal.jsonl").header is not None
