"""Which node of a cluster computes what needs no GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def node_without_gpu(nodes: Sequence[Mapping[str, Any]], own: str) -> str:
    """The id of a node that has no GPU, whose cores no trial keeps busy with feeding one.

    Args:
        nodes: of the cluster, as ``ray.nodes()`` tells of them.
        own: this process's node, which is taken where it has no GPU, or where every node has one.
    """
    without = [node["NodeID"] for node in nodes if node["Alive"] and not node["Resources"].get("GPU")]
    return own if own in without or not without else str(min(without))
