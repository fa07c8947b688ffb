"""Nodes that come and go under a pool: test_personalize_cluster.py runs it, in a process of its own.

    python cluster_driver.py joins|removed|killed

Prints one JSON object as its last line.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import ray
from ray.cluster_utils import Cluster

from milp_ray.config.personalize import PersonalizeSection
from milp_ray.personalize.pool import WorkerPool

STORE = 80 << 20
SECONDS = 0.3  # an item


def nap(state: Any, items: Any, report: Callable[[int, Any], None]) -> None:
    """Every item takes a while."""
    for place, item in enumerate(items):
        time.sleep(SECONDS)
        report(place, item)


def joins(cluster: Cluster, pool: WorkerPool) -> dict[str, Any]:
    """Two nodes join when a fifth of the items is done."""
    workers: Counter[str] = Counter()
    times: list[float] = []
    nodes_added = 0.0
    for n, outcome in enumerate(pool.map(nap, range(200), key=str, at_once=2), start=1):
        times.append(time.monotonic())
        workers[outcome.worker] += 1
        if n == 40:
            for _ in range(2):
                cluster.add_node(num_cpus=1, object_store_memory=STORE)
            nodes_added = time.monotonic()
    before, after = times[39] - times[0], [t for t in times if t > nodes_added]
    return {
        "n_outcomes": len(times),
        "n_workers": len(workers),
        "max_workers": pool.max_workers,
        "rate_before": 39 / before,
        "rate_at_the_end": 60 / (after[-1] - after[-61]),
    }


def loses(cluster: Cluster, pool: WorkerPool, *, kill: bool) -> dict[str, Any]:
    """The node of the only worker goes while it works on one item, and another one comes."""
    node = next(iter(cluster.worker_nodes))
    stream = pool.map(nap, range(8), key=str, at_once=1)
    outcomes = [next(stream)]
    if kill:
        node.all_processes["raylet"][0].process.kill()
    else:
        cluster.remove_node(node)
    cluster.add_node(num_cpus=1, object_store_memory=STORE)
    outcomes += list(stream)
    return {
        "n_outcomes": len(outcomes),
        "n_failed": sum(outcome.failed for outcome in outcomes),
        "attempts": max(outcome.attempts for outcome in outcomes),
        "n_lost": pool.n_lost,
    }


def main() -> None:
    """Bring the cluster up, play, and take it down."""
    what = sys.argv[1]
    head = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=1, object_store_memory=STORE)
        ray.init(address=cluster.address, log_to_driver=False)
        # No retry: a lost worker that counted against its item would fail it at once.
        section = PersonalizeSection(cpus_per_worker=1, max_retries=0)
        with WorkerPool(dict, section=section) as pool:
            found = joins(cluster, pool) if what == "joins" else loses(cluster, pool, kill=what == "killed")
        print(json.dumps(found), flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
