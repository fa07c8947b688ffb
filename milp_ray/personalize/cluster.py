"""What the pool asks about the cluster: how many workers it holds, and which of its nodes are alive."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from milp_ray.errors import MilpError

if TYPE_CHECKING:
    from milp_ray.config.personalize import PersonalizeSection


def room_for(section: PersonalizeSection) -> int:
    """How many workers the nodes that are alive hold at once; 0 where not a single one fits."""
    return sum(_room_on(node["Resources"], section) for node in _alive_nodes())


def no_room(section: PersonalizeSection) -> MilpError:
    """What to say where the cluster holds no worker at all."""
    import ray

    total = ray.cluster_resources()
    return MilpError(
        f"no node has personalize.cpus_per_worker {section.cpus_per_worker:g} and gpus_per_worker "
        f"{section.gpus_per_worker:g} free for a worker (the cluster has {total.get('CPU', 0.0):g} CPUs and "
        f"{total.get('GPU', 0.0):g} GPUs in all); lower them, or set personalize.n_workers where nodes are "
        "added on demand"
    )


def alive_nodes() -> frozenset[str]:
    """Ids of the nodes that are alive, as the cluster knows it: a node's end may show only after seconds."""
    return frozenset(node["NodeID"] for node in _alive_nodes())


def this_node() -> str:
    """Id of the node that the calling process is on; to be called inside the cluster."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def _alive_nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _room_on(resources: dict[str, float], section: PersonalizeSection) -> int:
    fits = resources.get("CPU", 0.0) / section.cpus_per_worker
    if section.gpus_per_worker:
        fits = min(fits, resources.get("GPU", 0.0) / section.gpus_per_worker)
    return math.floor(fits + 1e-9)
