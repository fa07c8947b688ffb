"""Fills the object store of every node of a cluster and keeps it full: for the tests beside it.

    python store_hog.py MIB

The cluster is the one of RAY_ADDRESS. On each node an actor holds so many MiB of objects and goes on to put
more, which it drops again. Prints a line of JSON once all stores are full.
"""

from __future__ import annotations

import json
import sys
import threading
import time

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

MIB = 1 << 20
PIECE = 4  # MiB


class Hog:
    def __init__(self) -> None:
        self._held: list[ray.ObjectRef] = []

    def fill(self, mib: int) -> int:
        """Hold that much, and begin to put more."""
        self._held = [ray.put(np.zeros(PIECE * MIB, dtype=np.uint8)) for _ in range(mib // PIECE)]
        threading.Thread(target=self._go_on, daemon=True).start()
        return len(self._held) * PIECE

    def _go_on(self) -> None:
        while True:
            ray.put(np.zeros(PIECE * MIB, dtype=np.uint8))
            time.sleep(0.2)


def main() -> None:
    """Fill, and wait for the end."""
    ray.init(log_to_driver=False)
    actor = ray.remote(num_cpus=0)(Hog)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    hogs = [
        actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for node in nodes
    ]
    held = ray.get([hog.fill.remote(int(sys.argv[1])) for hog in hogs])
    print(json.dumps({"event": "full", "mib": min(held), "nodes": len(held)}), flush=True)
    time.sleep(3600)


if __name__ == "__main__":
    main()
