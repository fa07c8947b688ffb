"""What cannot work on a cluster, told before any work begins.

Every live node is asked for its versions and whether it sees files that the driver has just written where
the run's files and its adapters go; what is found is compared with what the configuration asks for.
"""

from __future__ import annotations

import platform
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from milp_ray.buckets import Bucket, is_bucket_uri
from milp_ray.errors import MilpError

if TYPE_CHECKING:
    from milp_ray.config import Config

PACKAGES = ("milp_ray", "ray", "torch", "transformers", "peft", "deepspeed")
_SECONDS = 120.0  # that a node has to answer; it may have to start a process


@dataclass(frozen=True, slots=True)
class Node:
    """What a node says of itself; ``unseen`` are the places at which it does not see the driver's file."""

    name: str
    n_gpus: float
    versions: dict[str, str]
    unseen: tuple[str, ...] = ()


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
    for setting, place in _places(config).items():
        if blind := [node.name for node in nodes if place in node.unseen]:
            found.append(
                f"{setting}={place} is not shared: {', '.join(blind)} does not see what the driver writes; "
                f"mount the same storage on all nodes and set {setting} to a folder on it, or to a bucket "
                "that all may read (s3://BUCKET/…, gs://BUCKET/…)"
            )
    return found


def nodes_of(config: Config) -> list[Node]:
    """Ask every live node of the cluster that this process has joined."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    name = f".preflight-{uuid.uuid4().hex}"
    roots = list(dict.fromkeys(_places(config).values()))
    look = ray.remote(num_cpus=0, max_retries=1)(_look)
    own = ray.get_runtime_context().get_node_id()
    alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeID"] != own)
    try:
        for root in roots:
            _leave(root, name)
        asked = [
            look.options(
                name=f"preflight:{node['NodeManagerAddress']}",
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            ).remote(roots, name)
            for node in alive
        ]
        try:
            answers: list[tuple[dict[str, str], tuple[str, ...]]] = ray.get(asked, timeout=_SECONDS)
        except ray.exceptions.RayError as error:
            raise MilpError(
                f"not every one of {len(alive)} nodes answered within {_SECONDS:.0f} s "
                f"({type(error).__name__}); look at the cluster with `ray status`, and submit again"
            ) from None
    finally:
        for root in roots:
            _remove(root, name)
    return [
        Node(node["NodeManagerAddress"], node["Resources"].get("GPU", 0.0), *answer)
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


def _places(config: Config) -> dict[str, str]:
    """Where the run's files and its adapters go, by the setting that says so."""
    from milp_ray.personalize.store.backend import local_path

    root, store = config.output_dir, config.personalize.store
    places = {"output_dir": root if isinstance(root, str) else str(root.absolute())}
    if store is not None:
        folder = local_path(store)
        places["personalize.store"] = store if folder is None else str(folder.absolute())
    return places


def _look(roots: Sequence[str], name: str) -> tuple[dict[str, str], tuple[str, ...]]:
    return own_versions(), tuple(root for root in roots if not _sees(root, name))


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
