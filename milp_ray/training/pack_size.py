"""How many jobs are trained at once: as many as the device's memory holds, by the memory model.

On a CPU more than a few jobs win nothing: a pass of some thousand tokens already fills the cores, and
beyond that its activations leave the caches.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

from milp_ray.training.job import plan_job
from milp_ray.training.memory_model import JobLoad, largest_pack
from milp_ray.training.model_shape import shape_of_model

if TYPE_CHECKING:
    from milp_ray.config.prompt import PromptSection
    from milp_ray.config.training import TrainingSection
    from milp_ray.training.base import Base
    from milp_ray.training.job import Job

ON_CPU = 16
_LOOKED_AT = 4  # of the largest jobs


def pack_size(
    base: Base,
    jobs: SequenceOf[Job],
    section: TrainingSection,
    prompt: PromptSection,
    *,
    free_bytes: int | None = None,
) -> int:
    """Slots for ``jobs`` (at least one): ``section.pack_size``, or as many as memory allows.

    What does not fit after all is found out and mended while training (:mod:`milp_ray.training.pack`).

    Args:
        base: the base that they are trained over.
        jobs: all jobs that may have slots at the same time.
        section: the recipe.
        prompt: the fixed phrases.
        free_bytes: :func:`free_beside` the base before any of the jobs was begun; ``None``: now.
    """
    wanted = section.pack_size
    if wanted is None and base.device.type == "cpu":
        wanted = ON_CPU
    if wanted is None:
        free = free_beside(base) if free_bytes is None else free_bytes
        wanted = slots_that_fit(base, jobs, section, prompt, free_bytes=free)
    return max(1, min(wanted, len(jobs)))


def free_beside(base: Base) -> int:
    """Bytes of the device's memory that this process may still take; 0 on a CPU, where nobody asks.

    They are free now, and within the process's share: others that share a GPU may not have begun yet.
    """
    if base.device.type == "cpu":
        return 0
    import torch

    free, total = torch.cuda.mem_get_info(base.device)
    allocated = torch.cuda.memory_allocated(base.device)
    unused = free + torch.cuda.memory_reserved(base.device) - allocated
    return max(0, int(min(unused, base.device_share * total - allocated)))


def slots_that_fit(
    base: Base, jobs: SequenceOf[Job], section: TrainingSection, prompt: PromptSection, *, free_bytes: int
) -> int:
    """Slots for the largest of ``jobs`` in what is free beside the base; 0 where not even one fits."""
    shape = shape_of_model(base.model, base.spec, dtype_bytes=base.dtype.itemsize)
    plans = [plan_job(job, base, section, prompt) for job in sorted(jobs, key=_size)[-_LOOKED_AT:]]
    texts = [[*(s for stage in p.stages for s in stage.sequences), *p.validation] for p in plans]
    longest = max((len(sequence.ids) for own in texts for sequence in own), default=1)
    lowest = min(job.layout.layers[0] for job in jobs)
    widest = max(jobs, key=lambda job: job.layout.rank * len(job.layout.layers))
    load = JobLoad(
        rank=widest.layout.rank,
        n_lora_layers=len(widest.layout.layers),
        lowest_layer=lowest,
        tokens_per_step=section.batch_size * section.gradient_accumulation * longest,
        targets_per_step=0,  # the loss keeps no logits
        longest_row=longest,
        kept_tokens=max(sum(len(s.ids) for s in own) for own in texts),
    )
    return largest_pack(shape, load, free_bytes + shape.n_parameters * shape.dtype_bytes)


def _size(job: Job) -> int:
    turns = sum(len(turn.text) for turn in job.split.history)
    return turns + sum(len(example.query) + len(example.response) for example in job.split.train)
