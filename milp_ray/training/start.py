"""What a job's weights are before its first step: drawn anew, or those of an adapter that it continues."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from milp_ray.errors import MilpError
from milp_ray.memory.lora import lora_alpha
from milp_ray.training.adapters import check_shapes
from milp_ray.training.rack import Pair, initial_weights, pairs_of, tensor_shapes

if TYPE_CHECKING:
    from torch import Tensor

    from milp_ray.config.training import TrainingSection
    from milp_ray.training.adapters import Adapter
    from milp_ray.training.base import Base
    from milp_ray.training.job import Job


def first_weights(job: Job, pairs: tuple[Pair, ...]) -> dict[str, Tensor]:
    """A job's weights before its first step, by the names of PEFT's files."""
    return initial_weights(pairs, job.seed) if job.start is None else job.start.tensors


def check_start(job: Job, base: Base, section: TrainingSection) -> None:
    """Refuse weights to continue from that would mean something else in this job.

    Raises:
        MilpError: they are of another layout, shape or scale than the job's.
    """
    start = job.start
    if start is None:
        return
    if start.layout != job.layout or job.layout.is_empty:
        raise MilpError(
            f"a job of layout {job.layout.key} cannot continue an adapter of layout {start.layout.key}; give "
            "the job the adapter's layout, or train from the beginning"
        )
    check_shapes(start.tensors, tensor_shapes(pairs_of(job.layout, base.spec, base.shapes)))
    alpha = float(lora_alpha(job.layout.rank, section.lora_alpha))
    if float(start.config["lora_alpha"]) != alpha:
        raise MilpError(
            f"the adapter to continue was trained with lora_alpha {float(start.config['lora_alpha']):g}, "
            f"training.lora_alpha makes it {alpha:g}, which would rescale what it has learnt; train from the "
            "beginning, or set training.lora_alpha back"
        )


def weights_digest(adapter: Adapter) -> str:
    """SHA-256 over an adapter's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(adapter.tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
