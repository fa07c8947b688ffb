"""Who trains and answers for a measurement: its own process, or the pack that it shares with other trials."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from milp_ray.config.prompt import PromptSection
    from milp_ray.config.training import TrainingSection
    from milp_ray.training.base import Base
    from milp_ray.training.generation import Questions
    from milp_ray.training.job import Job, JobResult, PausedJob

# What the name of a temporary folder of this process begins with; the process's id follows.
SCRATCH_PREFIX = "milp-ray-trial-"


class Trainer(Protocol):
    """What a measurement asks of whoever has the base.

    ``seconds`` are what was worked for it so far: of a process of its own all the time that it took, of one
    that it shares its part (:class:`milp_ray.training.shared_pack.PackCaller`).
    """

    seconds: float

    def train_until(self, jobs: Sequence[Job], epoch: int) -> list[PausedJob]:
        """As :func:`milp_ray.training.train.train_until`."""

    def train(self, jobs: Sequence[Job]) -> list[JobResult]:
        """As :func:`milp_ray.training.train.train`, from where :meth:`train_until` left the jobs."""

    def answers(self, asked: Sequence[Questions], *, max_new_tokens: int, batch_size: int) -> list[list[str]]:
        """As :func:`milp_ray.training.generation.generate`."""

    def close(self) -> None:
        """Remove what is kept of jobs that were not trained to their end."""


class OwnTrainer:
    """Has the base to itself; jobs that pause are kept in a temporary folder."""

    def __init__(self, base: Base, section: TrainingSection, prompt: PromptSection) -> None:
        self._base, self._section, self._prompt = base, section, prompt
        self._folder: TemporaryDirectory[str] | None = None
        self.seconds = 0.0

    def train_until(self, jobs: Sequence[Job], epoch: int) -> list[PausedJob]:
        """As :func:`milp_ray.training.train.train_until`."""
        from milp_ray.training.train import train_until

        if self._folder is None:
            self._folder = scratch_folder()
        with self._timed():
            return train_until(
                self._base,
                jobs,
                self._section,
                self._prompt,
                epoch=epoch,
                checkpoint_dir=Path(self._folder.name),
            )

    def train(self, jobs: Sequence[Job]) -> list[JobResult]:
        """As :func:`milp_ray.training.train.train`."""
        from milp_ray.training.train import train

        with self._timed():
            return train(
                self._base,
                jobs,
                self._section,
                self._prompt,
                checkpoint_dir=None if self._folder is None else Path(self._folder.name),
                checkpoint_every_epoch=False,
            )

    def answers(self, asked: Sequence[Questions], *, max_new_tokens: int, batch_size: int) -> list[list[str]]:
        """As :func:`milp_ray.training.generation.generate`."""
        from milp_ray.training.generation import generate

        with self._timed():
            return generate(self._base, asked, max_new_tokens=max_new_tokens, batch_size=batch_size)

    def close(self) -> None:
        """Remove the temporary folder."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started


def scratch_folder() -> TemporaryDirectory[str]:
    """A temporary folder that only this process's user may read."""
    return TemporaryDirectory(prefix=f"{SCRATCH_PREFIX}{os.getpid()}-")
