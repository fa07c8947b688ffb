"""``ray``: the cluster."""

from __future__ import annotations

from pydantic import PositiveInt

from milp_ray.config.section import NonNegativeInt, Section


class RaySection(Section):
    """The cluster."""

    address: str | None = None  # None: start Ray in this process; "auto" or ray://… joins a cluster
    num_cpus: PositiveInt | None = None  # None: what the machine has
    num_gpus: NonNegativeInt | None = None
    object_store_mib: PositiveInt = 256
    include_dashboard: bool = False
    threads_per_worker: PositiveInt = 1  # torch, OpenMP and BLAS threads
