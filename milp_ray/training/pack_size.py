"""How many jobs are trained at once: as many as the device's memory holds, by the memory model.

On a CPU more than :data:`ON_CPU` jobs win nothing: a pass of some thousand tokens already fills the cores,
and beyond that its activations leave the caches.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from milp_ray.errors import MilpError
from milp_ray.training.host_memory import process_memory
from milp_ray.training.job import plan_job
from milp_ray.training.memory_model import JobLoad, largest_pack
from milp_ray.training.model_shape import ModelShape, shape_of_model

if TYPE_CHECKING:
    from milp_ray.config.prompt import PromptSection
    from milp_ray.config.training import TrainingSection
    from milp_ray.training.base import Base
    from milp_ray.training.job import Job, JobPlan, Stage

ON_CPU = 16
_LOOKED_AT = 4  # of the largest jobs


def pack_size(
    base: Base,
    jobs: SequenceOf[Job],
    section: TrainingSection,
    prompt: PromptSection,
    *,
    room: Room | None = None,
) -> int:
    """Slots for ``jobs`` (at least one): ``section.pack_size``, or as many as memory allows.

    What does not fit after all is found out and mended while training (:mod:`milp_ray.training.pack`).

    Args:
        base: the base that they are trained over.
        jobs: all jobs that may have slots at the same time.
        section: the recipe.
        prompt: the fixed phrases.
        room: :func:`room_beside` the base before any of the jobs was begun; ``None``: now.
    """
    most = len(jobs)
    if section.pack_size is not None:
        return min(section.pack_size, most)
    if base.device.type == "cpu":
        most = min(most, ON_CPU)
    if most > 1:
        most = min(most, slots_that_fit(base, jobs, section, prompt, room or room_beside(base)))
    return max(1, most)


@dataclass(frozen=True, slots=True)
class Room:
    """The sizes of a base, and the bytes of its device's memory that are free beside it."""

    shape: ModelShape
    free_bytes: int


def room_beside(base: Base) -> Room:
    """Looked at while no pack has hold of the base: its maps are then not its own."""
    return Room(
        shape_of_model(base.model, base.spec, dtype_bytes=base.dtype.itemsize), free_bytes=free_beside(base)
    )


def free_beside(base: Base) -> int:
    """Bytes of the device's memory that this process may still take.

    They are free now, and within the process's share: others that share the device may not have begun yet.
    """
    import torch

    if base.device.type == "cpu":
        weights = sum(p.numel() * p.element_size() for p in base.model.parameters())
        return max(0, process_memory(torch.get_num_threads()) - weights)
    free, total = torch.cuda.mem_get_info(base.device)
    allocated = torch.cuda.memory_allocated(base.device)
    unused = free + torch.cuda.memory_reserved(base.device) - allocated
    return max(0, int(min(unused, base.device_share * total - allocated)))


def slots_that_fit(
    base: Base, jobs: SequenceOf[Job], section: TrainingSection, prompt: PromptSection, room: Room
) -> int:
    """Slots for the largest of ``jobs`` in the room beside the base; 0 where not even one fits."""
    shape = room.shape
    plans: list[JobPlan] = []
    for job in sorted(jobs, key=_size)[-_LOOKED_AT:]:
        with suppress(MilpError):  # of that job alone, which is told when it should get its slot
            plans.append(plan_job(job, base, section, prompt))
    if not plans:
        return 1
    texts = [[*(s for stage in p.stages for s in stage.sequences), *p.validation] for p in plans]
    longest = max((len(sequence.ids) for own in texts for sequence in own), default=1)
    lowest = min(job.layout.layers[0] for job in jobs)
    widest = max(jobs, key=lambda job: job.layout.rank * len(job.layout.layers))
    load = JobLoad(
        rank=widest.layout.rank,
        n_lora_layers=len(widest.layout.layers),
        lowest_layer=lowest,
        tokens_per_step=max((_largest_step(stage, section) for p in plans for stage in p.stages), default=0),
        targets_per_step=0,  # the loss keeps no logits
        longest_row=longest,
        kept_tokens=max(sum(len(s.ids) for s in own) for own in texts),
    )
    return largest_pack(shape, load, room.free_bytes + shape.n_parameters * shape.dtype_bytes)


def _largest_step(stage: Stage, section: TrainingSection) -> int:
    """Most tokens of a step: of its longest sequences."""
    lengths = sorted((len(sequence.ids) for sequence in stage.sequences), reverse=True)
    return sum(lengths[: section.batch_size * section.gradient_accumulation])


def _size(job: Job) -> int:
    turns = sum(len(turn.text) for turn in job.split.history)
    return turns + sum(len(example.query) + len(example.response) for example in job.split.train)
