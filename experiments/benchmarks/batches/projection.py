"""How long 50,000 users of a large base would take, from its estimate and from overheads measured here.

A worker's time a user is what ``milp-ray estimate`` expects of training, and the time that the store takes to
publish: as measured for a small adapter, and a large one's bytes at the measured rate. The driver serves all
workers one after the other, so that no number of them is faster than its CPU time a user allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from milp_ray.config_loader import load_config
from milp_ray.estimate.inputs import Numbers
from milp_ray.estimate.result import Options, make_estimate

# Assumed: what a worker reads its base's weights with, from a disk of its node.
BASE_BYTES_PER_SECOND = 2e9


@dataclass(frozen=True, slots=True)
class Overheads:
    """Measured: seconds, and bytes a second."""

    start: float  # from the command to the first worker that is ready
    publish: float  # of a small adapter
    write_rate: float
    driver: float  # CPU seconds of the driver a user


@dataclass(frozen=True, slots=True)
class Projection:
    """A batch on ``n_gpus``; seconds unless it says otherwise."""

    n_users: int
    n_gpus: int
    training: float  # of one user, on one GPU
    publishing: float  # of one user
    start: float
    driver_users_per_second: float  # most that the driver can serve
    wall: float

    @property
    def users_per_second(self) -> float:
        """Over the whole batch."""
        return self.n_users / self.wall

    @property
    def overhead_share(self) -> float:
        """Part of the GPUs' time that is not training."""
        return 1.0 - self.n_users * self.training / (self.n_gpus * self.wall)


def project(
    config: Path, overheads: Overheads, *, n_users: int, n_gpus: Sequence[int], device: str
) -> list[Projection]:
    """Project a configuration's batch onto so many GPUs, all in packs of the size that the estimate finds."""
    found = []
    for n in n_gpus:
        options = Options(numbers=Numbers(n_users), device=device, n_devices=n)
        estimate = make_estimate(load_config(config, []), options)
        training = estimate.batch.one.seconds
        publishing = overheads.publish + estimate.adapter_bytes / overheads.write_rate
        weights = estimate.base.shape.n_parameters * estimate.base.shape.dtype_bytes
        start = overheads.start + weights / BASE_BYTES_PER_SECOND
        working = max(n_users * (training + publishing) / n, n_users * overheads.driver)
        most = 1.0 / overheads.driver
        found.append(Projection(n_users, n, training, publishing, start, most, start + working))
    return found
