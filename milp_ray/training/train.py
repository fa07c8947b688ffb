"""The one entry to training: users' adapters over one frozen base, at once or with pauses.

A job is trained in stages: *memory* (next-content prediction over the history), then *instruction* (the loss
on responses only); or *joint*, both kinds of sequences mixed in every epoch. Each stage has an optimizer and
a learning-rate schedule of its own, over its own number of steps.

Jobs go through in packs (:mod:`milp_ray.training.pack`) wherever one device holds the base; one after the
other (:mod:`milp_ray.training.stages`) where ZeRO spreads a job, and for bases that packs do not know.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import TrainingSection
from milp_ray.errors import MilpError
from milp_ray.memory.lora import lora_config
from milp_ray.training.adapters import Adapter, adapter_config, injected, load_tensors, read_tensors
from milp_ray.training.base import Base
from milp_ray.training.checkpoint import KeptJobs, Progress, checkpoint_at
from milp_ray.training.hooks import Ended, Hooks
from milp_ray.training.job import TOO_LARGE, Job, JobResult, PausedJob, check_job, plan_job
from milp_ray.training.peaks import peak_rss_mib

if TYPE_CHECKING:
    import torch

    from milp_ray.training.stages import JobTraining

OnProgress = Callable[[str, int, int], None]
OnEpoch = Callable[[str, int, dict[str, "torch.Tensor"]], None]
OnResult = Callable[[JobResult], None]
OnFailure = Callable[[str, MilpError], None]
Result = TypeVar("Result", JobResult, PausedJob)


def train(
    base: Base,
    jobs: SequenceOf[Job],
    section: TrainingSection,
    prompt: PromptSection,
    *,
    checkpoint_dir: Path | KeptJobs | None = None,
    on_progress: OnProgress | None = None,
    on_epoch: OnEpoch | None = None,
    validate_every_epoch: bool = False,
    checkpoint_every_epoch: bool = True,
    on_result: OnResult | None = None,
    on_failure: OnFailure | None = None,
) -> list[JobResult]:
    """Train the jobs; the base is left bit for bit as it was.

    Args:
        base: the frozen base.
        jobs: what to train; results come in the same order.
        section: the recipe.
        prompt: the fixed phrases around a user's texts.
        checkpoint_dir: where an unfinished job is kept after every epoch. A job that finds its own checkpoint
            goes on from it and ends with the same bits; one whose result was taken removes it. ``None``:
            nothing is kept.
            :class:`~milp_ray.training.checkpoint.KeptJobs` keeps them in memory.
        on_progress: called with (job_id, steps done, steps of the whole job) after every optimizer step.
        on_epoch: called with (job_id, epochs done in the stage, the LoRA weights then) after every epoch; the
            weights are copies on the CPU, named as in PEFT's files.
        validate_every_epoch: measure the validation loss after every epoch, for the curve. Otherwise it is
            measured at the end only, or after every epoch where early stopping needs it.
        checkpoint_every_epoch: without, checkpoints of ``checkpoint_dir`` are gone on from and removed, but
            none is written: for jobs that nobody could continue if their process ended.
        on_result: called with each result as soon as it is there, in the order in which jobs end. The base
            must not be used by it. The results are then not kept: the list that is returned is empty.
        on_failure: called with (job_id, error) of a job that does not fit this base or whose training
            diverges, while the others go on. ``None``: the first such error is raised.

    Raises:
        MilpError: as ``on_failure`` says; job ids are not different; or a batch does not fit the device.
    """
    found: dict[str, JobResult] = {}

    def ended(job: Ended) -> None:
        result = result_of(base, job, section)
        if on_result is None:
            found[result.job_id] = result
        else:
            on_result(result)
        # Last: where the result could not be taken, a further call goes on from the job's end.
        if checkpoint_dir is not None:
            checkpoint_at(checkpoint_dir, result.job_id).remove()

    hooks = Hooks(
        checkpoint_dir=checkpoint_dir,
        on_progress=on_progress,
        on_epoch=on_epoch,
        validate_every_epoch=validate_every_epoch,
        checkpoint_every_epoch=checkpoint_every_epoch,
    )
    _check_ids(jobs)
    _train_all(base, jobs, section, prompt, hooks, ended, on_failure)
    return _in_order(jobs, found)


def train_until(
    base: Base,
    jobs: SequenceOf[Job],
    section: TrainingSection,
    prompt: PromptSection,
    *,
    epoch: int,
    checkpoint_dir: Path | KeptJobs,
    on_progress: OnProgress | None = None,
    on_failure: OnFailure | None = None,
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
        on_failure: as in :func:`train`; a job that fails has no entry in the list.

    Raises:
        ValueError: ``epoch`` is below 1.
        MilpError: as :func:`train`.
    """
    if epoch < 1:
        raise ValueError(f"epoch {epoch}: a job can be paused after its first epoch at the earliest")
    found: dict[str, PausedJob] = {}

    def ended(job: Ended) -> None:
        found[job.job.job_id] = paused_of(job)

    hooks = Hooks(checkpoint_dir, on_progress, checkpoint_every_epoch=False, until_epoch=epoch)
    _check_ids(jobs)
    _train_all(base, jobs, section, prompt, hooks, ended, on_failure)
    return _in_order(jobs, found)


def _check_ids(jobs: SequenceOf[Job]) -> None:
    if len({job.job_id for job in jobs}) < len(jobs):
        raise MilpError(f"{len(jobs)} jobs of one call share ids: give each its own")


def _train_all(
    base: Base,
    jobs: SequenceOf[Job],
    section: TrainingSection,
    prompt: PromptSection,
    hooks: Hooks,
    on_ended: Callable[[Ended], None],
    on_failure: OnFailure | None,
) -> None:
    """Every job to its end or pause, in packs where that can be."""
    from milp_ray.training.pack import can_pack, train_packed
    from milp_ray.training.pack_size import pack_size

    def failed(job: Job, error: MilpError) -> None:
        if on_failure is None:
            raise error
        on_failure(job.job_id, error)

    packs = can_pack(base, section)
    alone: list[Job] = []
    together: list[Job] = []
    for job in jobs:
        try:
            check_job(job, base, section)
        except MilpError as error:
            failed(job, error)
            continue
        (together if packs and not job.layout.is_empty else alone).append(job)
    for job in alone:
        try:
            ended = train_alone(base, job, section, prompt, hooks)
        except MilpError as error:
            failed(job, error)
        else:
            on_ended(ended)
    if together:
        # Jobs of one layout after the other: each layout at work has a rack, whose slots take memory.
        first = {job.layout: i for i, job in reversed(list(enumerate(together)))}
        together.sort(key=lambda job: first[job.layout])
        size = pack_size(base, together, section, prompt)
        train_packed(
            base, together, section, prompt, hooks, pack_size=size, on_ended=on_ended, on_failure=failed
        )


def train_alone(base: Base, job: Job, section: TrainingSection, prompt: PromptSection, hooks: Hooks) -> Ended:
    """One job with the base to itself; of the empty layout, the base as it is is measured.

    Raises:
        MilpError: the job does not fit this base or the device, or its training diverges.
    """
    import torch

    try:
        return _alone(base, job, section, prompt, hooks)
    except torch.OutOfMemoryError:
        error = MilpError(TOO_LARGE)
    raise error  # out here: the device's error holds on to the pass that did not fit


def _alone(base: Base, job: Job, section: TrainingSection, prompt: PromptSection, hooks: Hooks) -> Ended:
    start = time.perf_counter()
    if job.layout.is_empty:
        loss = _loss_of_base(base, job, section, prompt)
        return Ended(job, Progress(""), loss, {}, time.perf_counter() - start)
    with _training(base, job, section, prompt, hooks) as training:
        progress, loss = training.run(until_epoch=hooks.until_epoch)
        tensors = read_tensors(training.model)
    return Ended(job, progress, loss, tensors, time.perf_counter() - start)


@contextmanager
def _training(
    base: Base, job: Job, section: TrainingSection, prompt: PromptSection, hooks: Hooks
) -> Iterator[JobTraining]:
    """A job of a layout that is not empty, on the base for the time."""
    from milp_ray.training.rack import pairs_of
    from milp_ray.training.stages import JobTraining
    from milp_ray.training.start import first_weights

    plan = plan_job(job, base, section, prompt)
    config = lora_config(job.layout, base.spec, section.lora_alpha, section.dropout, base.model_id)
    folder, on_progress, on_epoch = hooks.checkpoint_dir, hooks.on_progress, hooks.on_epoch
    with injected(base, config, job.seed) as model:
        load_tensors(model, first_weights(job, pairs_of(job.layout, base.spec, base.shapes)))
        yield JobTraining(
            base,
            model,
            first_layer=job.layout.layers[0],
            stages=plan.stages,
            validation=plan.validation,
            section=plan.section,
            seed=job.seed,
            fingerprint=plan.fingerprint,
            checkpoint=checkpoint_at(folder, job.job_id) if folder is not None else None,
            on_step=(lambda i, n: on_progress(job.job_id, i, n)) if on_progress is not None else None,
            on_epoch=(lambda i, tensors: on_epoch(job.job_id, i, tensors)) if on_epoch is not None else None,
            validate_every_epoch=hooks.validate_every_epoch,
            checkpoint_every_epoch=hooks.checkpoint_every_epoch,
        )


def result_of(base: Base, ended: Ended, section: TrainingSection) -> JobResult:
    """What is handed out of a job that has come to its end."""
    job, adapter = ended.job, None
    if not job.layout.is_empty:
        config = lora_config(job.layout, base.spec, section.lora_alpha, section.dropout, base.model_id)
        adapter = Adapter(adapter_config(config, base, list(ended.tensors)), ended.tensors, job.layout)
    return JobResult(
        job_id=job.job_id,
        adapter=adapter,
        validation_loss=ended.validation_loss,
        steps=ended.progress.steps,
        tokens=ended.progress.tokens,
        seconds=ended.seconds,
        peak_rss_mib=peak_rss_mib(),
        curve=ended.progress.curve,
    )


def paused_of(ended: Ended) -> PausedJob:
    """What is handed out of a job that has paused."""
    progress, name = ended.progress, ended.job.job_id
    # The curve has one entry an epoch.
    done = len(progress.curve)
    return PausedJob(name, done, ended.validation_loss, progress.steps, progress.tokens, ended.seconds)


def _in_order(jobs: SequenceOf[Job], found: dict[str, Result]) -> list[Result]:
    return [found[job.job_id] for job in jobs if job.job_id in found]


def _loss_of_base(base: Base, job: Job, section: TrainingSection, prompt: PromptSection) -> float | None:
    """Validation loss of the base as it is: what the empty layout gives."""
    from milp_ray.training.loss import mean_token_loss
    from milp_ray.training.response_loss import Wanted, response_losses

    [losses] = response_losses(base, [Wanted(job.split.validation)], prompt, batch_size=section.batch_size)
    return mean_token_loss(losses)
