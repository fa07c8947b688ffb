"""What cannot work on a cluster, told before any work begins.

Every live node is asked for its versions and whether it sees a file that the driver has just written where
the run's files go; what is found is compared with what the configuration asks for.
"""

from __future__ import annotations

import platform
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milp_ray.buckets import Bucket, is_bucket_uri
from milp_ray.errors import MilpError

if TYPE_CHECKING:
    from milp_ray.config import Config

PACKAGES = ("milp_ray", "ray", "torch", "transformers", "peft", "deepspeed")
_SECONDS = 120.0  # that a node has to answer; it may have to start a process


@dataclass(frozen=True, slots=True)
class Node:
    """What a node says of itself; ``sees_storage`` is whether it has the driver's file."""

    name: str
    n_gpus: float
    versions: dict[str, str]
    sees_storage: bool


def preflight(config: Config) -> list[Node]:
    """Look at the cluster that this process has joined.

    Returns:
        The nodes, the driver's first.

    Raises:
        MilpError: the run cannot work there; every reason, each with what to do.
    """
    from milp_ray.training.base import model_config

    nodes = nodes_of(config)
    found = problems_of(config, nodes, own_versions())
    try:
        model_config(config.base)
    except (MilpError, OSError) as error:
        said = str(error) if isinstance(error, MilpError) else type(error).__name__
        found.append(f"the base {config.base.model!r} cannot be read on the driver's node: {said}")
    if found:
        raise MilpError("this run cannot work on the cluster:\n" + "\n".join(f"  - {line}" for line in found))
    return nodes


def problems_of(config: Config, nodes: Sequence[Node], own: dict[str, str]) -> list[str]:
    """Why the configuration cannot work on these nodes; none where it can."""
    search, batch = config.search, config.personalize
    found = []
    n_gpus = sum(node.n_gpus for node in nodes)
    wanted = {"search.gpus_per_trial": search.held_gpus, "personalize.gpus_per_worker": batch.gpus_per_worker}
    found += [
        f"{key} is {gpus:g}, but the cluster has {n_gpus:g} GPUs: add nodes with GPUs, or lower it"
        for key, gpus in wanted.items()
        if gpus > n_gpus
    ]
    for node in nodes:
        differing = [
            f"{name} {node.versions.get(name, 'not installed')} instead of {own[name]}"
            for name in own
            if node.versions.get(name) != own[name]
        ]
        if differing:
            found.append(f"node {node.name} has {', '.join(differing)}: install the same on all nodes")
    blind = [node.name for node in nodes if not node.sees_storage]
    if blind:
        found.append(
            f"{config.output_dir} is not shared: {', '.join(blind)} does not see what the driver writes; "
            "mount the same storage on all nodes and set output_dir to a folder on it, or to a bucket that "
            "all may read (s3://BUCKET/…, gs://BUCKET/…)"
        )
    return found


def nodes_of(config: Config) -> list[Node]:
    """Ask every live node of the cluster that this process has joined."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    name = f".preflight-{uuid.uuid4().hex}"
    root = config.output_dir if isinstance(config.output_dir, str) else str(config.output_dir.absolute())
    _leave(root, name)
    look = ray.remote(num_cpus=0, max_retries=1)(_look)
    own = ray.get_runtime_context().get_node_id()
    alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeID"] != own)
    try:
        asked = [
            look.options(
                name=f"preflight:{node['NodeManagerAddress']}",
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            ).remote(root, name)
            for node in alive
        ]
        try:
            answers: list[dict[str, Any]] = ray.get(asked, timeout=_SECONDS)
        except ray.exceptions.RayError as error:
            raise MilpError(
                f"not every one of {len(alive)} nodes answered within {_SECONDS:.0f} s "
                f"({type(error).__name__}); look at the cluster with `ray status`, and submit again"
            ) from None
    finally:
        _remove(root, name)
    return [
        Node(node["NodeManagerAddress"], node["Resources"].get("GPU", 0.0), **answer)
        for node, answer in zip(alive, answers, strict=True)
    ]


def own_versions() -> dict[str, str]:
    """Versions of what has to be the same everywhere, Python's first two numbers among them."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _look(root: str, name: str) -> dict[str, Any]:
    return {"versions": own_versions(), "sees_storage": _sees(root, name)}


def _leave(root: str, name: str) -> None:
    """Leave a file that the nodes look for, in a folder or a bucket."""
    if is_bucket_uri(root):
        bucket = Bucket(root)
        bucket.write(f"{bucket.root}/{name}", b"seen")
    else:
        Path(root).mkdir(parents=True, exist_ok=True)
        Path(root, name).touch()


def _sees(root: str, name: str) -> bool:
    if not is_bucket_uri(root):
        return Path(root, name).exists()
    bucket = Bucket(root)
    try:
        return bucket.read(f"{bucket.root}/{name}") == b"seen"
    except (MilpError, FileNotFoundError):
        return False  # what is wrong there is told with the node's name


def _remove(root: str, name: str) -> None:
    if is_bucket_uri(root):
        bucket = Bucket(root)
        bucket.delete_file(f"{bucket.root}/{name}")
    else:
        Path(root, name).unlink(missing_ok=True)
