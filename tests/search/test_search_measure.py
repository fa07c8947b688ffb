"""One trial's measurement, really trained on a tiny random model."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from milp_ray.config.base import BaseSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import TrainingSection
from milp_ray.errors import MilpError
from milp_ray.memory.architecture import adapter_parameters
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.search.measure import BEGAN, Measurement, TrialTask, check_probe_users, measure
from milp_ray.search.results import METRICS
from milp_ray.search.rungs import RUNG, RungRecord
from milp_ray.search.trainers import OwnTrainer
from milp_ray.training.base import Base, load_base
from milp_ray.training.job import Job, JobResult, PausedJob
from milp_ray.users.records import UserSplit

SOME = CanonicalLayout((False, True, False, True), 4)
EMPTY = CanonicalLayout((False,) * 4, 0)


@pytest.fixture(scope="module")
def base(tiny_llama_dir: Path) -> Base:
    return load_base(BaseSection(model=str(tiny_llama_dir), device="cpu"))


@pytest.fixture(scope="module")
def splits(make_split: Callable[..., UserSplit]) -> tuple[UserSplit, ...]:
    return tuple(make_split(f"u-{i}", 4, 2, 2, 1, seed=i) for i in range(2))


def task(splits: tuple[UserSplit, ...], base: Base, **changes: object) -> TrialTask:
    settings: dict = {
        "base": BaseSection(model=base.model_id),
        "training": TrainingSection(memory_epochs=3, instruction_epochs=3, learning_rate=1e-2),
        "prompt": PromptSection(),
        "stages": "memory",
        "max_new_tokens": 8,
        "batch_size": 8,
        "seed": 0,
        "splits": splits,
    }
    return TrialTask(**{**settings, **changes})


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


CLOCK = {"seconds", "peak_rss_mib", "peak_gpu_mib", "began"}


def less_clock(values: dict) -> dict:
    return {name: value for name, value in values.items() if name not in CLOCK}


def test_a_trial_reports_numbers_only_and_the_same_ones_every_time(
    base: Base, splits: tuple[UserSplit, ...]
) -> None:
    first = measure(base, SOME, task(splits, base))
    assert set(first) == {*METRICS, BEGAN, "per_user"} - {"startup_seconds"}
    text = json.dumps(first)
    assert not any(turn.text in text for split in splits for turn in split.history)
    again = measure(base, SOME, task(splits, base))
    assert less_clock(first) == less_clock(again)
    assert first["steps"] > 0
    assert first["adapter_parameters"] == adapter_parameters(SOME, base.shapes)


def test_means_and_standard_errors_are_over_the_probe_users(
    base: Base, splits: tuple[UserSplit, ...]
) -> None:
    both = measure(base, SOME, task(splits, base))
    alone = measure(base, SOME, task(splits[:1], base))
    first, second = both["per_user"]["validation_loss"]
    assert alone["validation_loss"] == first  # a user's training does not depend on who else is measured
    assert both["validation_loss"] == pytest.approx((first + second) / 2)
    assert both["validation_loss_sem"] == pytest.approx(abs(first - second) / 2)
    assert alone["validation_loss_sem"] is None


def test_the_empty_layout_is_the_base_as_it_is(base: Base, splits: tuple[UserSplit, ...]) -> None:
    values = measure(base, EMPTY, task(splits, base))
    assert (values["steps"], values["tokens"], values["adapter_parameters"]) == (0, 0, 0)
    assert values["validation_loss"] != measure(base, SOME, task(splits, base))["validation_loss"]


def test_both_stages_train_more_than_memory_alone(base: Base, splits: tuple[UserSplit, ...]) -> None:
    memory = measure(base, SOME, task(splits, base))
    both = measure(base, SOME, task(splits, base, stages="both"))
    assert both["steps"] > memory["steps"]
    assert both["validation_loss"] < memory["validation_loss"]


def test_probe_users_need_validation_examples(make_split: Callable[..., UserSplit]) -> None:
    with pytest.raises(MilpError, match="no probe users"):
        check_probe_users([])
    with pytest.raises(MilpError, match="1 of 2 probe users"):
        check_probe_users([make_split("a"), make_split("b", n_val=0)])


# ------------------------------------------------------------------------------------------------- rungs


@pytest.mark.parametrize("stages", ["memory", "both"])
def test_rungs_change_no_value(base: Base, splits: tuple[UserSplit, ...], scratch: Path, stages: str) -> None:
    plain = task(splits, base, stages=stages)
    rungs = {"memory": (1, 2), "both": (2, 4)}[stages]
    with Measurement(base, SOME, replace(plain, rungs=rungs)) as measurement:
        for epoch in rungs:
            assert measurement.has_rungs_left
            assert measurement.next_rung()["epoch"] == epoch
        assert not measurement.has_rungs_left
        assert less_clock(measurement.finish()) == less_clock(measure(base, SOME, plain))


def test_a_rung_tells_the_mean_loss_so_far_under_names_that_no_final_value_has(
    base: Base, splits: tuple[UserSplit, ...]
) -> None:
    with Measurement(base, SOME, task(splits, base, rungs=(1, 2))) as measurement:
        values = [measurement.next_rung(), measurement.next_rung()]
        final = measurement.finish()
    records = [RungRecord.from_dict(v, trial=7) for v in values]
    assert [(r.trial, r.rung, r.epoch) for r in records] == [(7, 0, 1), (7, 1, 2)]
    for record in records:
        first, second = record.validation_loss_at_rung_by_user
        assert record.validation_loss_at_rung == pytest.approx((first + second) / 2)
        assert record.validation_loss_at_rung_sem == pytest.approx(abs(first - second) / 2)
    losses = [record.validation_loss_at_rung for record in records]
    assert losses[0] > losses[1] > final["validation_loss"]
    assert records[0].steps_at_rung < records[1].steps_at_rung < final["steps"]
    assert set(values[0]) & set(final) == {"adapter_parameters"}
    assert RUNG not in final
    assert json.loads(json.dumps(values)) == values


def test_nothing_is_written_without_a_rung_and_nothing_left_after_one(
    base: Base, splits: tuple[UserSplit, ...], scratch: Path
) -> None:
    measurement = Measurement(base, SOME, task(splits, base, rungs=(1,)))
    measurement.next_rung()
    [folder] = scratch.iterdir()
    assert len(list(folder.iterdir())) == len(splits)
    assert folder.stat().st_mode & 0o077 == 0, "an adapter is personal data"
    measurement.close()
    assert list(scratch.iterdir()) == []
    measure(base, SOME, task(splits, base))
    assert list(scratch.iterdir()) == []


def test_the_empty_layout_passes_rungs_as_it_is(base: Base, splits: tuple[UserSplit, ...]) -> None:
    with Measurement(base, EMPTY, task(splits, base, rungs=(1, 2))) as measurement:
        rung = measurement.next_rung()
        final = measurement.finish()
    assert rung["validation_loss_at_rung"] == final["validation_loss"]
    assert (rung["steps_at_rung"], rung["adapter_parameters"]) == (0, 0)


def test_a_loss_at_a_rung_that_is_no_number_is_a_failure(
    base: Base, splits: tuple[UserSplit, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(*_: object, **__: object) -> list[PausedJob]:
        return [PausedJob("probe-0", 1, math.inf, 2, 3, 0.1)]

    monkeypatch.setattr("milp_ray.training.train.train_until", diverged)
    measurement = Measurement(base, SOME, task(splits, base, rungs=(1,)))
    with pytest.raises(MilpError, match="after epoch 1 the validation loss of probe user 0"):
        measurement.next_rung()
    measurement.close()


def test_a_loss_at_the_end_that_is_no_number_is_a_failure_also_where_it_is_no_objective(
    base: Base, splits: tuple[UserSplit, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = OwnTrainer.train

    def diverged(trainer: OwnTrainer, jobs: Sequence[Job]) -> list[JobResult]:
        return [replace(result, validation_loss=math.nan) for result in trained(trainer, jobs)]

    monkeypatch.setattr(OwnTrainer, "train", diverged)
    with pytest.raises(MilpError, match="diverged: at the end the validation loss of probe user 0"):
        measure(base, SOME, task(splits, base))
