"""Where layouts are proposed: on a node without a GPU, if there is one."""

from __future__ import annotations

from typing import Any

import pytest

from milp_ray.search.placement import node_without_gpu


def node(name: str, gpus: float = 0.0, *, is_alive: bool = True) -> dict[str, Any]:
    return {"NodeID": name, "Alive": is_alive, "Resources": {"CPU": 4.0, **({"GPU": gpus} if gpus else {})}}


@pytest.mark.parametrize(
    ("nodes", "own", "expected"),
    [
        (
            [node("head"), node("a", 4), node("b")],
            "head",
            "head",
        ),  # the driver's own
        ([node("a", 4), node("c"), node("b")], "a", "b"),
        ([node("a", 4), node("b", is_alive=False)], "a", "a"),
        ([node("a", 4), node("b", 4)], "b", "b"),
    ],
)
def test_a_node_without_a_gpu_is_taken(nodes: list[dict[str, Any]], own: str, expected: str) -> None:
    assert node_without_gpu(nodes, own) == expected
