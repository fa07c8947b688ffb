"""The one entry to training: users' adapters over one frozen base, at once or with pauses.

A job is trained in stages: *memory* (next-content prediction over the history), then *instruction* (the loss
on responses only); or *joint*, both kinds of sequences mixed in every epoch. Each stage has an optimizer and
a learning-rate schedule of its own, over its own number of steps.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milp_ray.config import PromptSection, TrainingSection
from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.memory.lora import lora_config
from milp_ray.training.adapters import Adapter, adapter_of, injected
from milp_ray.training.base import Base
from milp_ray.training.checkpoint import CheckpointFile
from milp_ray.training.data import Sequence, instruction_set, memory_set
from milp_ray.users.records import UserSplit

if TYPE_CHECKING:
    import torch

    from milp_ray.training.stages import JobTraining, Stage

MEMORY, INSTRUCTION, JOINT = "memory", "instruction", "joint"
PARTS = frozenset({MEMORY, INSTRUCTION})

OnProgress = Callable[[str, int, int], None]
OnEpoch = Callable[[str, int, dict[str, "torch.Tensor"]], None]


@dataclass(frozen=True)
class Job:
    """Train one user's adapter under one layout.

    ``parts`` are the kinds of sequences to train on, of {"memory", "instruction"}. ``seed`` alone decides
    the initial weights, the order of sequences and dropout.
    """

    job_id: str
    split: UserSplit
    layout: CanonicalLayout
    parts: frozenset[str]
    seed: int


@dataclass
class JobResult:
    """What became of a job.

    ``adapter`` is ``None`` for the empty layout; ``validation_loss`` (mean nats a response token over the
    validation examples) where there are none. ``tokens`` were trained on, padding not counted; ``curve`` has
    one entry an epoch: stage, epoch, training_loss, validation_loss.
    """

    job_id: str
    adapter: Adapter | None
    validation_loss: float | None
    steps: int
    tokens: int
    seconds: float
    peak_rss_mib: float
    curve: list[dict[str, Any]]


@dataclass(frozen=True)
class PausedJob:
    """Where a job stands part of the way through its plan; nothing here is a result of the job.

    ``epoch`` epochs are done, of all stages together. ``validation_loss`` (mean nats a response token;
    ``None`` without validation examples) is that of the weights so far. ``steps`` and ``tokens`` count from
    the job's beginning, ``seconds`` from this call's.
    """

    job_id: str
    epoch: int
    validation_loss: float | None
    steps: int
    tokens: int
    seconds: float


def train(
    base: Base,
    jobs: SequenceOf[Job],
    section: TrainingSection,
    prompt: PromptSection,
    *,
    checkpoint_dir: Path | None = None,
    on_progress: OnProgress | None = None,
    on_epoch: OnEpoch | None = None,
    validate_every_epoch: bool = False,
    checkpoint_every_epoch: bool = True,
) -> list[JobResult]:
    """Train the jobs, one after the other; the base is left bit for bit as it was.

    Args:
        base: the frozen base.
        jobs: what to train; results come in the same order.
        section: the recipe.
        prompt: the fixed phrases around a user's texts.
        checkpoint_dir: where an unfinished job is kept after every epoch. A job that finds its own checkpoint
            goes on from it and ends with the same bits; one that ends removes it. ``None``: nothing is kept.
        on_progress: called with (job_id, steps done, steps of the whole job) after every optimizer step.
        on_epoch: called with (job_id, epochs done in the stage, the LoRA weights then) after every epoch; the
            weights are copies on the CPU, named as in PEFT's files.
        validate_every_epoch: measure the validation loss after every epoch, for the curve. Otherwise it is
            measured at the end only, or after every epoch where early stopping needs it.
        checkpoint_every_epoch: without, checkpoints of ``checkpoint_dir`` are gone on from and removed, but
            none is written: for jobs that nobody could continue if their process ended.

    Raises:
        MilpError: a job's parts or layout do not fit this base, or its training diverges.
    """
    return [
        _train_job(
            base,
            job,
            section,
            prompt,
            checkpoint_dir,
            on_progress,
            on_epoch,
            validate_every_epoch=validate_every_epoch,
            checkpoint_every_epoch=checkpoint_every_epoch,
        )
        for job in jobs
    ]


def train_until(
    base: Base,
    jobs: SequenceOf[Job],
    section: TrainingSection,
    prompt: PromptSection,
    *,
    epoch: int,
    checkpoint_dir: Path,
    on_progress: OnProgress | None = None,
) -> list[PausedJob]:
    """Train each job until ``epoch`` epochs of its plan are done, measure it there and keep it.

    The learning rate follows the whole plan. A later call with a larger ``epoch``, or :func:`train` with the
    same ``checkpoint_dir``, goes on; what :func:`train` then gives has the same bits as a job that was never
    paused. A job whose plan is shorter is trained to its end, one that is further already is left there.

    Args:
        base: the frozen base.
        jobs: what to train; results come in the same order.
        section: the recipe; its epochs, not ``epoch``, decide the schedule.
        prompt: the fixed phrases around a user's texts.
        epoch: counted through all stages (:func:`planned_epochs`), at least 1.
        checkpoint_dir: keeps each job where it pauses; one that was killed on the way there begins again from
            its last pause.
        on_progress: as in :func:`train`.

    Raises:
        ValueError: ``epoch`` is below 1.
        MilpError: as :func:`train`.
    """
    if epoch < 1:
        raise ValueError(f"epoch {epoch}: a job can be paused after its first epoch at the earliest")
    return [_train_job_until(base, job, section, prompt, epoch, checkpoint_dir, on_progress) for job in jobs]


def planned_epochs(section: TrainingSection, parts: frozenset[str]) -> int:
    """Epochs of all stages of a job with ``parts``, each of which has sequences."""
    epochs = {MEMORY: section.memory_epochs, INSTRUCTION: section.instruction_epochs}
    wanted = [epochs[part] for part in parts]
    return max(wanted) if section.stages == JOINT else sum(wanted)


def _train_job(
    base: Base,
    job: Job,
    section: TrainingSection,
    prompt: PromptSection,
    checkpoint_dir: Path | None,
    on_progress: OnProgress | None,
    on_epoch: OnEpoch | None,
    **options: bool,
) -> JobResult:
    start = time.perf_counter()
    _check(job, base)
    if job.layout.is_empty:
        loss = _loss_of_base(base, job, section, prompt)
        return JobResult(job.job_id, None, loss, 0, 0, time.perf_counter() - start, _peak_rss_mib(), [])
    checkpoint = CheckpointFile(checkpoint_dir, job.job_id) if checkpoint_dir is not None else None
    with _training(base, job, section, prompt, checkpoint, on_progress, on_epoch, **options) as training:
        progress, loss = training.run()
        adapter = adapter_of(training.model, job.layout, base)
    if checkpoint is not None:
        checkpoint.remove()
    return JobResult(
        job_id=job.job_id,
        adapter=adapter,
        validation_loss=loss,
        steps=progress.steps,
        tokens=progress.tokens,
        seconds=time.perf_counter() - start,
        peak_rss_mib=_peak_rss_mib(),
        curve=progress.curve,
    )


def _train_job_until(
    base: Base,
    job: Job,
    section: TrainingSection,
    prompt: PromptSection,
    epoch: int,
    checkpoint_dir: Path,
    on_progress: OnProgress | None,
) -> PausedJob:
    start = time.perf_counter()
    _check(job, base)
    if job.layout.is_empty:
        loss = _loss_of_base(base, job, section, prompt)
        return PausedJob(job.job_id, 0, loss, 0, 0, time.perf_counter() - start)
    checkpoint = CheckpointFile(checkpoint_dir, job.job_id)
    with _training(
        base, job, section, prompt, checkpoint, on_progress, checkpoint_every_epoch=False
    ) as training:
        progress, loss = training.run(until_epoch=epoch)
    # The curve has one entry an epoch.
    done, seconds = len(progress.curve), time.perf_counter() - start
    return PausedJob(job.job_id, done, loss, progress.steps, progress.tokens, seconds)


@contextmanager
def _training(
    base: Base,
    job: Job,
    section: TrainingSection,
    prompt: PromptSection,
    checkpoint: CheckpointFile | None,
    on_progress: OnProgress | None,
    on_epoch: OnEpoch | None = None,
    **options: bool,
) -> Iterator[JobTraining]:
    """A job of a layout that is not empty, on the base for the time."""
    from milp_ray.training.stages import JobTraining

    validation = instruction_set(job.split.validation, base, prompt, max_length=base.context_length)
    stages = _stages(job, base, section, prompt)
    config = lora_config(job.layout, base.spec, section.lora_alpha, section.dropout, base.model_id)
    with injected(base, config, job.seed) as model:
        yield JobTraining(
            base,
            model,
            first_layer=job.layout.layers[0],
            stages=stages,
            validation=tuple(validation),
            section=section,
            seed=job.seed,
            fingerprint=_fingerprint(job, base, section, stages, validation),
            checkpoint=checkpoint,
            on_step=(lambda i, n: on_progress(job.job_id, i, n)) if on_progress is not None else None,
            on_epoch=(lambda i, tensors: on_epoch(job.job_id, i, tensors)) if on_epoch is not None else None,
            **options,
        )


def _loss_of_base(base: Base, job: Job, section: TrainingSection, prompt: PromptSection) -> float | None:
    """Validation loss of the base as it is: what the empty layout gives."""
    from milp_ray.training.loss import TargetLoss, mean_token_loss, sequence_losses

    validation = instruction_set(job.split.validation, base, prompt, max_length=base.context_length)
    loss = TargetLoss(base.model, base.first_position)
    return mean_token_loss(sequence_losses(base, loss, validation, section.batch_size))


def _check(job: Job, base: Base) -> None:
    if not job.parts or not job.parts <= PARTS:
        raise MilpError(f"a job's parts are {sorted(job.parts)}: give one or both of {sorted(PARTS)}")
    if job.layout.n_layers != base.n_layers:
        raise MilpError(
            f"layout {job.layout.key} is for {job.layout.n_layers} layers, but the base {base.model_id!r} "
            f"has {base.n_layers}; search a layout for this base"
        )
    if not job.layout.is_empty:
        base.shapes.check_rank(job.layout.rank)


def _stages(job: Job, base: Base, section: TrainingSection, prompt: PromptSection) -> tuple[Stage, ...]:
    """The stages of a job that have sequences."""
    from milp_ray.training.stages import Stage

    limit = _max_length(section, base)
    parts: dict[str, tuple[Sequence, ...]] = {}
    if MEMORY in job.parts:
        blocks = memory_set(job.split, base, prompt, max_length=limit, block_turns=section.memory_block_turns)
        parts[MEMORY] = tuple(blocks)
    if INSTRUCTION in job.parts:
        parts[INSTRUCTION] = tuple(instruction_set(job.split.train, base, prompt, max_length=limit))
    epochs = {MEMORY: section.memory_epochs, INSTRUCTION: section.instruction_epochs}
    if section.stages == JOINT and len(parts) > 1:
        n_epochs = planned_epochs(section, job.parts)
        stages = [Stage(JOINT, parts[MEMORY] + parts[INSTRUCTION], n_epochs)]
    else:
        stages = [Stage(name, sequences, epochs[name]) for name, sequences in parts.items()]
    return tuple(stage for stage in stages if stage.sequences)


def _max_length(section: TrainingSection, base: Base) -> int:
    if section.max_length is not None and section.max_length > base.context_length:
        raise MilpError(
            f"training.max_length {section.max_length} is above the base's context of {base.context_length} "
            f"tokens; use at most {base.context_length}, or null for all of it"
        )
    return section.max_length or base.context_length


def _fingerprint(
    job: Job, base: Base, section: TrainingSection, stages: tuple[Stage, ...], validation: list[Sequence]
) -> str:
    """Hash of everything that a job's result depends on, texts included (as tokens; not to be read back)."""
    made_from = {
        "base": [base.model_id, base.revision, str(base.dtype)],
        "layout": job.layout.to_dict(),
        "seed": job.seed,
        "section": section.model_dump(mode="json"),
        "stages": [[s.name, s.epochs, [[q.ids, q.target_from] for q in s.sequences]] for s in stages],
        "validation": [[q.ids, q.target_from] for q in validation],
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def _peak_rss_mib() -> float:
    """Largest resident memory of this process so far; Linux counts KiB, macOS bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
