"""Many jobs at once over one frozen base: users, layouts and lengths mixed, each with its own optimizer.

Every job sits in a slot of a rack (:mod:`milp_ray.training.rack`). A step takes the next batch of each job,
puts their sequences on one line of tokens without padding (:mod:`milp_ray.training.flat`), runs the base once
over it (:mod:`milp_ray.training.packed_base`), and steps each job by its own mean loss, clipping, learning
rate and moments. A job that ends is measured and handed out at once, and its slot goes to the next one. No
job's result depends on its neighbours beyond rounding. Jobs may come and be taken out while the pack runs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch

from milp_ray.errors import MilpError
from milp_ray.memory.lora import target_modules
from milp_ray.training.checkpoint import Progress, checkpoint_at
from milp_ray.training.distributed import Processes
from milp_ray.training.flat import can_lie_flat
from milp_ray.training.hooks import Ended, Hooks
from milp_ray.training.job import TOO_LARGE, plan_job
from milp_ray.training.pack_queue import PackQueue, Waiting
from milp_ray.training.packed_base import PackedBase
from milp_ray.training.slot_job import SlotJob
from milp_ray.training.start import first_weights

if TYPE_CHECKING:
    from milp_ray.config.prompt import PromptSection
    from milp_ray.config.training import TrainingSection
    from milp_ray.training.base import Base
    from milp_ray.training.job import Job, JobPlan
    from milp_ray.training.rack import Rack


def can_pack(base: Base, section: TrainingSection) -> bool:
    """Whether jobs are trained in packs: one device holds the base, in float32 or bfloat16.

    float16 needs DeepSpeed's loss scaling, and ZeRO spreads a single job over processes.
    """
    deepspeed = section.deepspeed
    return (
        deepspeed.zero_stage == 0
        and Processes.here().size == 1
        and base.engine_device == base.device
        and not deepspeed.activation_checkpointing
        and base.dtype in (torch.float32, torch.bfloat16)
        and can_lie_flat(base)
    )


def train_packed(
    base: Base,
    jobs: SequenceOf[Job],
    section: TrainingSection,
    prompt: PromptSection,
    hooks: Hooks,
    *,
    pack_size: int,
    on_ended: Callable[[Ended], None],
    on_failure: Callable[[Job, MilpError], None],
) -> None:
    """Train ``jobs``, ``pack_size`` at a time; the base is left bit for bit as it was.

    Args:
        base: the frozen base; it must not be used by ``on_ended`` and ``on_failure``.
        jobs: none of the empty layout; begun in this order.
        section: the recipe.
        prompt: the fixed phrases.
        hooks: callbacks and checkpoints.
        pack_size: most slots in use at once.
        on_ended: called with each job as soon as it has ended or paused.
        on_failure: called with a job that cannot go on; the others do.
    """
    if not jobs:
        return
    modules = {name for job in jobs for name in target_modules(job.layout, base.spec)}
    pack = Pack(base, section, prompt, hooks, on_ended=on_ended, on_failure=on_failure, size=pack_size)
    pack.add(jobs, hooks.until_epoch)
    with pack.on_base(modules):
        while pack.has_jobs:
            pack.step()


class Pack:
    """The loop over steps, to be driven from outside, and everything between them.

    ``size`` is the most slots in use at once; it may be changed between two steps. The callbacks are those of
    :func:`train_packed`.
    """

    def __init__(
        self,
        base: Base,
        section: TrainingSection,
        prompt: PromptSection,
        hooks: Hooks,
        *,
        on_ended: Callable[[Ended], None],
        on_failure: Callable[[Job, MilpError], None],
        size: int,
    ) -> None:
        self._base, self._section, self._prompt, self._hooks = base, section, prompt, hooks
        self._on_ended, self._on_failure = on_ended, on_failure
        self.size = size
        self._queue = PackQueue()
        self._active: list[SlotJob] = []
        self._packed = PackedBase(base, section)
        self._jobs_a_pass = sys.maxsize

    @property
    def has_jobs(self) -> bool:
        """Whether a job waits or has a slot."""
        return bool(self._queue or self._active)

    @property
    def jobs(self) -> list[Job]:
        """The jobs that have a slot, and those that wait."""
        return [*(slot_job.plan.job for slot_job in self._active), *self._queue.jobs]

    def add(self, jobs: Iterable[Job], until_epoch: int | None = None) -> None:
        """Let jobs wait for slots, to be trained to their end or until ``until_epoch`` epochs are done."""
        self._queue.add(jobs, until_epoch)

    def take_out(self, job_ids: Collection[str]) -> None:
        """Forget jobs, wherever they are; nobody is told of them any more."""
        for job in self._queue.take_out(job_ids):
            self._finished(job)
        for slot_job in [one for one in self._active if one.plan.job.job_id in job_ids]:
            self._active.remove(slot_job)
            self._leave(slot_job)

    @contextmanager
    def on_base(self, modules: Iterable[str]) -> Iterator[None]:
        """Take hold of the base, whose maps ``modules`` may carry LoRA; a job must be waiting.

        Raises:
            MilpError: the first job alone does not fit the device.
        """
        chosen = list(modules)
        with ExitStack() as stack:
            while not self._takes_hold(stack, chosen):
                if self.size == 1:
                    raise MilpError(TOO_LARGE)
                self.size //= 2
            yield

    def _takes_hold(self, stack: ExitStack, modules: list[str]) -> bool:
        """Whether the base and the first rack fit the device."""
        first = self._queue.first_layout()
        try:
            stack.enter_context(self._packed.held(modules, first, self._queue.n_slots(first, self.size)))
        except torch.OutOfMemoryError:
            return False
        return True

    def lent_base(self) -> AbstractContextManager[None]:
        """Between two steps, the base for other uses than the pack's: to generate, or to measure it alone."""
        return self._packed.lent()

    def step(self) -> None:
        """Fill the slots, and take one optimizer step of every job that has one."""
        self._fill()
        if self._active:
            self._step()
            self._close_epochs()

    # ------------------------------------------------------------------------------------------- slots

    def _fill(self) -> None:
        """Give free slots to the jobs that wait."""
        begun: list[SlotJob] = []
        while (n_seated := len(self._active) + len(begun)) < self.size:
            found = self._queue.next(self._packed.racks, self.size)
            if found is None:
                break
            started = time.perf_counter()
            try:
                slot_job = self._seat(*found)
            except MilpError as error:
                self._give_up(found[0], error)
            except torch.OutOfMemoryError:
                self._make_do(found, n_seated)
            else:
                slot_job.seconds += time.perf_counter() - started
                begun.append(slot_job)
        self._run_below(begun)
        self._active += self._advance(begun)
        # Jobs of one rack next to each other, so that a rack's tokens are one stretch of the line.
        order = {id(rack): i for i, rack in enumerate(self._packed.racks.values())}
        self._active.sort(key=lambda j: (order[id(j.rack)], j.slot))

    def _make_do(self, entry: Waiting, n_seated: int) -> None:
        """There was no memory for a job's slot: it waits for those that have one, or gets a narrower rack."""
        job, _ = entry
        n_slots = n_seated or self._queue.n_slots(job.layout, self.size) // 2
        if n_slots:
            self.size = n_slots
            self._queue.put_back(entry)
        else:
            self._give_up(job, MilpError(TOO_LARGE))

    def _run_below(self, begun: list[SlotJob]) -> None:
        """Run what lies below the lowest LoRA for jobs that begin; for all, where another layer is lowest."""
        if not begun:
            return
        started = time.perf_counter()
        seated = [*self._active, *begun]
        lowest = min(slot_job.plan.job.layout.layers[0] for slot_job in seated)
        if lowest != self._packed.prefix.first_layer:
            self._packed.prefix.move(lowest, [t for slot_job in self._active for t in slot_job.all_texts])
        else:
            seated = begun
        self._packed.prefix.keep([t for slot_job in seated for t in slot_job.all_texts if len(t)])
        seconds = time.perf_counter() - started
        n_tokens = sum(slot_job.n_tokens for slot_job in seated)
        for slot_job in seated:
            slot_job.seconds += seconds * slot_job.n_tokens / max(1, n_tokens)

    def _seat(self, job: Job, until_epoch: int | None) -> SlotJob:
        plan = plan_job(job, self._base, self._section, self._prompt)
        rack = self._packed.rack_for(job.layout, self._queue.n_slots(job.layout, self.size))
        slot = rack.free.pop()
        try:
            return self._begin(plan, rack, slot, until_epoch)
        except BaseException:
            rack.free.append(slot)
            raise

    def _begin(self, plan: JobPlan, rack: Rack, slot: int, until_epoch: int | None) -> SlotJob:
        job, found = plan.job, None
        if self._hooks.checkpoint_dir is not None:
            found = checkpoint_at(self._hooks.checkpoint_dir, job.job_id).read(plan.fingerprint)
        progress, tensors = found or (Progress(plan.fingerprint), {})
        slot_job = SlotJob(plan, rack, slot, progress, until_epoch)
        if found is None:
            rack.load(slot, first_weights(job, tuple(rack.pairs.values())))
            rack.forget(slot)
        else:
            slot_job.restore(tensors)
        return slot_job

    def _leave(self, slot_job: SlotJob) -> None:
        slot_job.rack.free.append(slot_job.slot)
        for texts in slot_job.all_texts:
            self._packed.prefix.drop(texts)
        self._finished(slot_job.plan.job)

    def _finished(self, job: Job) -> None:
        if self._queue.finished(job):
            self._packed.drop_rack(job.layout)

    def _give_up(self, job: Job, error: MilpError) -> None:
        """A job that got no slot cannot go on."""
        self._finished(job)
        self._on_failure(job, error)

    def _fail(self, slot_job: SlotJob, error: MilpError) -> None:
        self._leave(slot_job)
        self._on_failure(slot_job.plan.job, error)

    # -------------------------------------------------------------------------------------------- steps

    def _step(self) -> None:
        """One optimizer step of every job that has a slot."""
        started = time.perf_counter()
        parts = [slot_job.next_part() for slot_job in self._active]
        done, before = 0, self._jobs_a_pass
        while done < len(parts):
            n = min(self._jobs_a_pass, len(parts) - done)
            jobs, some = self._active[done : done + n], parts[done : done + n]
            try:
                sums = self._packed.train(some, [slot_job.next_step() for slot_job in jobs])
            except torch.OutOfMemoryError:
                self._jobs_a_pass = max(1, n // 2)
                if n == 1:
                    # It was this job that did not fit: of the others nothing was learnt.
                    self._jobs_a_pass = before
                    del parts[done]
                    self._fail(self._active.pop(done), MilpError(TOO_LARGE))
            else:
                for slot_job, nll in zip(jobs, sums, strict=True):
                    slot_job.epoch_nll += nll
                done += n
        seconds = time.perf_counter() - started
        n_tokens = sum(part.n_tokens for part in parts)
        for slot_job, part in zip(self._active, parts, strict=True):
            slot_job.seconds += seconds * part.n_tokens / n_tokens
            slot_job.count_step(part)
            if self._hooks.on_progress is not None:
                job, progress = slot_job.plan.job, slot_job.progress
                self._hooks.on_progress(job.job_id, progress.steps, slot_job.plan.n_steps)

    # ------------------------------------------------------------------------------- between the steps

    def _close_epochs(self) -> None:
        """What is due for the jobs whose epoch is over; those that end leave their slots."""
        closing = [slot_job for slot_job in self._active if not slot_job.windows]
        if not closing:
            return
        going = [slot_job for slot_job in self._active if slot_job.windows]
        finite: list[SlotJob] = []
        for slot_job in closing:
            slot_job.progress.epoch += 1
            try:
                slot_job.check_finite(slot_job.epoch_nll / slot_job.epoch_weight)
            except MilpError as error:
                self._fail(slot_job, error)
            else:
                finite.append(slot_job)
        self._validate(finite)
        for slot_job in finite:
            if self._hooks.on_epoch is not None:
                tensors = slot_job.rack.read(slot_job.slot)
                self._hooks.on_epoch(slot_job.plan.job.job_id, slot_job.progress.epoch, tensors)
            if self._hooks.checkpoint_every_epoch:
                self._write(slot_job)
        remaining = {id(slot_job) for slot_job in (*going, *self._advance(finite))}
        self._active = [slot_job for slot_job in self._active if id(slot_job) in remaining]

    def _validate(self, jobs: list[SlotJob]) -> None:
        """The entries of the curve; the best weights so far, for early stopping."""
        patience = self._section.early_stopping_patience
        losses: list[float | None] = [None] * len(jobs)
        if patience is not None or self._hooks.validate_every_epoch:
            losses = self._validation_losses(jobs)
        for slot_job, loss in zip(jobs, losses, strict=True):
            progress = slot_job.progress
            progress.curve.append(
                {
                    "stage": slot_job.stage.name,
                    "epoch": progress.epoch,
                    "training_loss": slot_job.epoch_nll / slot_job.epoch_weight,
                    "validation_loss": loss,
                }
            )
            if patience is None or loss is None:
                continue
            if progress.best_loss is None or loss < progress.best_loss:
                progress.best_loss, progress.n_worse = loss, 0
                slot_job.best = slot_job.rack.read(slot_job.slot)
            else:
                progress.n_worse += 1

    def _advance(self, jobs: list[SlotJob]) -> list[SlotJob]:
        """Begin each job's next epoch; those that have none are measured, handed out, and not returned."""
        going: list[SlotJob] = []
        ending: list[SlotJob] = []
        for slot_job in jobs:
            (going if self._begin_next(slot_job) else ending).append(slot_job)
        losses = self._validation_losses(ending) if ending else []
        for slot_job, loss in zip(ending, losses, strict=True):
            tensors = slot_job.rack.read(slot_job.slot)
            self._leave(slot_job)
            self._on_ended(Ended(slot_job.plan.job, slot_job.progress, loss, tensors, slot_job.seconds))
        return going

    def _begin_next(self, slot_job: SlotJob) -> bool:
        """Whether there is a further epoch; stages that are over end with their best weights."""
        progress = slot_job.progress
        while slot_job.plan.stages:
            if progress.epoch < slot_job.last_epoch and not slot_job.is_over:
                slot_job.begin_epoch()
                return True
            stops = slot_job.pauses_here or progress.stage + 1 == len(slot_job.plan.stages)
            if stops and slot_job.has_trained and slot_job.until_epoch is not None:
                self._write(slot_job)
            if slot_job.best:
                slot_job.rack.load(slot_job.slot, slot_job.best)
            if stops:
                return False
            progress.begin_stage(progress.stage + 1)
            slot_job.best = {}
            slot_job.rack.forget(slot_job.slot)
        return False

    def _validation_losses(self, jobs: list[SlotJob]) -> list[float | None]:
        """Mean loss a response token over each job's validation pairs; ``None`` where there are none."""
        started = time.perf_counter()
        losses = self._packed.mean_losses([slot_job.validation_part() for slot_job in jobs])
        seconds = (time.perf_counter() - started) / max(1, len(jobs))
        for slot_job in jobs:
            slot_job.seconds += seconds
        return losses

    def _write(self, slot_job: SlotJob) -> None:
        if self._hooks.checkpoint_dir is not None:
            checkpoint = checkpoint_at(self._hooks.checkpoint_dir, slot_job.plan.job.job_id)
            checkpoint.write(slot_job.progress, slot_job.tensors())
