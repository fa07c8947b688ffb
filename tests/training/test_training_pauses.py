"""Training in parts: a job that was paused or killed ends with the bits of one that never was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs import MakeSplit, make_job

from milp_ray.config.base import BaseSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import TrainingSection
from milp_ray.training.base import Base, load_base
from milp_ray.training.checkpoint import CheckpointFile, KeptJobs
from milp_ray.training.job import Job, JobResult, PausedJob, planned_epochs
from milp_ray.training.train import train, train_until

PROMPT = PromptSection()


@pytest.fixture(scope="module")
def base(tiny_llama_dir: Path) -> Base:
    return load_base(BaseSection(model=str(tiny_llama_dir), device="cpu"))


def section(**changes: Any) -> TrainingSection:
    """Two steps an epoch in either stage, three epochs of memory and two of instruction."""
    settings: dict[str, Any] = {
        "memory_epochs": 3,
        "instruction_epochs": 2,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "memory_block_turns": 2,
    }
    return TrainingSection(**{**settings, **changes})


def whole(base: Base, a_job: Job, training: TrainingSection, **options: Any) -> JobResult:
    [result] = train(base, [a_job], training, PROMPT, **options)
    return result


def until(
    base: Base, a_job: Job, training: TrainingSection, epoch: int, folder: Path | KeptJobs
) -> PausedJob:
    [part] = train_until(base, [a_job], training, PROMPT, epoch=epoch, checkpoint_dir=folder)
    return part


def same(a: JobResult, b: JobResult) -> bool:
    assert a.adapter is not None
    assert b.adapter is not None
    numbers = [(r.validation_loss, r.steps, r.tokens, r.curve) for r in (a, b)]
    tensors = [r.adapter.tensors for r in (a, b) if r.adapter is not None]
    return numbers[0] == numbers[1] and all(
        torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[1]
    )


@pytest.mark.parametrize(
    ("pauses", "changes"),
    [
        ((1,), {}),
        ((1, 3), {"dropout": 0.1}),  # the second one between the two stages
        ((2, 4), {"deepspeed": {"zero_stage": 2}}),
        ((1,), {"deepspeed": {"zero_stage": 3}, "memory_epochs": 2, "instruction_epochs": 0}),
        ((5,), {}),  # after the last epoch
        ((99,), {"stages": "joint", "dropout": 0.1}),
        ((1, 2), {"early_stopping_patience": 1, "learning_rate": 0.3, "memory_epochs": 6}),
    ],
)
def test_a_paused_job_ends_with_the_same_bits(
    base: Base, make_split: MakeSplit, tmp_path: Path, pauses: tuple[int, ...], changes: dict[str, Any]
) -> None:
    a_job, training = make_job(make_split()), section(**changes)
    for epoch in pauses:
        part = until(base, a_job, training, epoch, tmp_path)
        assert part.epoch <= epoch
        assert len(list(tmp_path.iterdir())) == 1
    resumed = whole(base, a_job, training, checkpoint_dir=tmp_path, checkpoint_every_epoch=False)
    assert same(resumed, whole(base, a_job, training))
    assert list(tmp_path.iterdir()) == [], "a finished job leaves no checkpoint"


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.1},
        {"early_stopping_patience": 1, "learning_rate": 0.3, "memory_epochs": 6},
        {"deepspeed": {"zero_stage": 2}},  # without packs
    ],
)
def test_jobs_kept_in_memory_end_with_the_same_bits(
    base: Base, make_split: MakeSplit, changes: dict[str, Any]
) -> None:
    a_job, training, kept = make_job(make_split()), section(**changes), KeptJobs()
    for epoch in (1, 3):
        until(base, a_job, training, epoch, kept)
        assert list(kept.found) == [a_job.job_id]
    resumed = whole(base, a_job, training, checkpoint_dir=kept, checkpoint_every_epoch=False)
    assert same(resumed, whole(base, a_job, training))
    assert not kept.found, "a finished job leaves no checkpoint"


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_a_result_that_could_not_be_taken_is_trained_for_once_only(
    base: Base, make_split: MakeSplit, tmp_path: Path, zero_stage: int
) -> None:
    a_job, training = make_job(make_split()), section(deepspeed={"zero_stage": zero_stage})

    def refuse(_: JobResult) -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        train(base, [a_job], training, PROMPT, checkpoint_dir=tmp_path, on_result=refuse)
    steps: list[int] = []
    again = whole(
        base, a_job, training, checkpoint_dir=tmp_path, on_progress=lambda _, done, __: steps.append(done)
    )
    assert steps == []
    assert same(again, whole(base, a_job, training))
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_fails_on_its_way_to_a_pause_leaves_the_others(base: Base, make_split: MakeSplit) -> None:
    jobs = [make_job(make_split(), job_id="fits"), make_job(make_split(), "01010", job_id="of five layers")]
    failed: list[str] = []
    parts = train_until(
        base,
        jobs,
        section(),
        PROMPT,
        epoch=1,
        checkpoint_dir=KeptJobs(),
        on_failure=lambda job_id, error: failed.append(job_id),
    )
    assert [part.job_id for part in parts] == ["fits"]
    assert failed == ["of five layers"]


def test_a_pause_tells_the_validation_loss_of_that_epoch(
    base: Base, make_split: MakeSplit, tmp_path: Path
) -> None:
    a_job, training = make_job(make_split()), section()
    curve = whole(base, a_job, training, validate_every_epoch=True).curve
    for epoch in (1, 3, 4, 5):
        part = until(base, a_job, training, epoch, tmp_path)
        assert part.validation_loss == curve[epoch - 1]["validation_loss"]
        assert (part.epoch, part.steps) == (epoch, 2 * epoch)


def test_under_early_stopping_a_pause_tells_the_best_loss_so_far(
    base: Base, make_split: MakeSplit, tmp_path: Path
) -> None:
    training = section(early_stopping_patience=9, learning_rate=0.3, instruction_epochs=9)
    a_job = make_job(make_split(n_train=2, n_val=6), parts=frozenset({"instruction"}))
    losses = [row["validation_loss"] for row in whole(base, a_job, training).curve]
    n = next(i for i in range(1, len(losses)) if losses[i] > min(losses[:i])) + 1
    part = until(base, a_job, training, n, tmp_path)
    assert part.validation_loss == pytest.approx(min(losses[:n]), rel=1e-6)
    assert part.validation_loss != pytest.approx(losses[n - 1], rel=1e-6)


def test_each_epoch_is_trained_once_and_kept_only_where_the_job_pauses(
    base: Base, make_split: MakeSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[int] = []
    write = CheckpointFile.write

    def watched(self: CheckpointFile, progress: Any, tensors: Any) -> None:
        writes.append(progress.steps)
        write(self, progress, tensors)

    monkeypatch.setattr(CheckpointFile, "write", watched)
    steps: list[int] = []
    options: dict[str, Any] = {
        "checkpoint_dir": tmp_path,
        "on_progress": lambda _, done, n: steps.append(done),
    }
    jobs, training = [make_job(make_split())], section()
    train_until(base, jobs, training, PROMPT, epoch=2, **options)
    train_until(base, jobs, training, PROMPT, epoch=2, **options)
    train(base, jobs, training, PROMPT, checkpoint_every_epoch=False, **options)
    assert steps == list(range(1, 11))
    assert writes == [4]


def test_a_job_that_is_further_is_left_there(base: Base, make_split: MakeSplit, tmp_path: Path) -> None:
    a_job, training = make_job(make_split()), section()
    later = until(base, a_job, training, 4, tmp_path)
    earlier = until(base, a_job, training, 1, tmp_path)
    assert replace(earlier, seconds=later.seconds) == later


def test_the_empty_layout_and_a_user_without_texts_have_nothing_to_pause(
    base: Base, make_split: MakeSplit, tmp_path: Path
) -> None:
    empty = until(base, make_job(make_split(), "0000"), section(), 1, tmp_path)
    assert (empty.epoch, empty.steps, empty.tokens) == (0, 0, 0)
    assert empty.validation_loss == whole(base, make_job(make_split(), "0000"), section()).validation_loss
    silent = until(base, make_job(make_split(n_turns=0, n_train=0, n_val=0)), section(), 1, tmp_path)
    assert (silent.epoch, silent.validation_loss) == (0, None)
    assert list(tmp_path.iterdir()) == []


def test_a_pause_before_the_first_epoch_is_refused(base: Base, make_split: MakeSplit, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="epoch 0"):
        until(base, make_job(make_split()), section(), 0, tmp_path)


@pytest.mark.parametrize("stages", ["sequential", "joint"])
@pytest.mark.parametrize("parts", [{"memory"}, {"instruction"}, {"memory", "instruction"}])
def test_planned_epochs_are_those_that_a_job_trains(
    base: Base, make_split: MakeSplit, stages: str, parts: set[str]
) -> None:
    training, chosen = section(stages=stages), frozenset(parts)
    result = whole(base, make_job(make_split(), parts=chosen), training)
    assert len(result.curve) == planned_epochs(training, chosen)


# ------------------------------------------------------------------------------------------- killed jobs


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("killed_after", [1, 2, 3, 5, 6, 7])
def test_a_killed_job_that_is_continued_gives_the_same_bits(
    base: Base, make_split: MakeSplit, tmp_path: Path, killed_after: int
) -> None:
    """Two steps an epoch, two epochs a stage: killed within and at the end of epochs of either stage."""
    a_job, training = make_job(make_split()), section(memory_epochs=2, dropout=0.1)
    never_killed = whole(base, a_job, training, validate_every_epoch=True)

    def kill(_: str, done: int, __: int) -> None:
        if done == killed_after:
            raise Killed

    with pytest.raises(Killed):
        whole(base, a_job, training, validate_every_epoch=True, checkpoint_dir=tmp_path, on_progress=kill)
    steps: list[int] = []
    resumed = whole(
        base,
        a_job,
        training,
        validate_every_epoch=True,
        checkpoint_dir=tmp_path,
        on_progress=lambda _, done, __: steps.append(done),
    )
    finished_epochs = (killed_after - 1) // 2
    assert steps == list(range(2 * finished_epochs + 1, 9)), "finished epochs are not done again"
    assert same(never_killed, resumed)
    assert (never_killed.steps, never_killed.tokens, never_killed.curve) == (
        resumed.steps,
        resumed.tokens,
        resumed.curve,
    )
    assert list(tmp_path.iterdir()) == [], "a finished job leaves no checkpoint"


@pytest.mark.parametrize("killed_after", [2, 4, 6])
def test_early_stopping_is_continued_as_well(
    base: Base, make_split: MakeSplit, tmp_path: Path, killed_after: int
) -> None:
    a_job = make_job(make_split(n_train=2, n_val=6), parts=frozenset({"instruction"}))
    training = section(
        instruction_epochs=40, learning_rate=0.1, early_stopping_patience=2, batch_size=1, stages="joint"
    )
    never_killed = whole(base, a_job, training)
    assert 6 < never_killed.steps < 80, "the case needs a job that ends early, after the kill"

    def kill(_: str, done: int, __: int) -> None:
        if done == killed_after:
            raise Killed

    with pytest.raises(Killed):
        whole(base, a_job, training, checkpoint_dir=tmp_path, on_progress=kill)
    resumed = whole(base, a_job, training, checkpoint_dir=tmp_path)
    assert same(never_killed, resumed)
    assert (never_killed.steps, never_killed.curve) == (resumed.steps, resumed.curve)


def test_another_jobs_checkpoint_is_not_continued(base: Base, make_split: MakeSplit, tmp_path: Path) -> None:
    def kill(_: str, done: int, __: int) -> None:
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        whole(base, make_job(make_split()), section(), checkpoint_dir=tmp_path, on_progress=kill)
    other = section(learning_rate=2e-3)
    assert same(
        whole(base, make_job(make_split()), other, checkpoint_dir=tmp_path),
        whole(base, make_job(make_split()), other),
    )


def test_a_damaged_checkpoint_starts_the_job_anew(base: Base, make_split: MakeSplit, tmp_path: Path) -> None:
    def kill(_: str, done: int, __: int) -> None:
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        whole(base, make_job(make_split()), section(), checkpoint_dir=tmp_path, on_progress=kill)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:200])
    result = whole(base, make_job(make_split()), section(), checkpoint_dir=tmp_path)
    assert same(result, whole(base, make_job(make_split()), section()))
