"""What training is asked to do beside training, and what it hands out: the same for packs and single jobs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from milp_ray.training.checkpoint import KeptJobs, Progress, Tensors
from milp_ray.training.job import Job


@dataclass(frozen=True)
class Ended:
    """A job that has ended or paused: how far it is, its validation loss (mean nats a token) and weights."""

    job: Job
    progress: Progress
    validation_loss: float | None
    tensors: Tensors
    seconds: float


@dataclass(frozen=True)
class Hooks:
    """What :func:`milp_ray.training.train.train` was asked to do beside training."""

    checkpoint_dir: Path | KeptJobs | None = None
    on_progress: Callable[[str, int, int], None] | None = None
    on_epoch: Callable[[str, int, Tensors], None] | None = None
    validate_every_epoch: bool = False
    checkpoint_every_epoch: bool = True
    until_epoch: int | None = None
