"""What operations of a store cost, with few and with many users in it."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from milp_ray.personalize.store import AdapterStore
from milp_ray.training.adapters import Adapter

_N_TIMED = 50


def milliseconds(do: Callable[[str], object], users: list[str]) -> float:
    """The median over ``users`` of one call."""
    seconds = []
    for user in users:
        started = time.perf_counter()
        do(user)
        seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds)


def operations(store: AdapterStore, n_users: int, scratch: Path) -> dict[str, float]:
    """Median milliseconds of reading, looking up and publishing among ``n_users``, and with ten."""
    rng = random.Random(0)
    some = rng.sample(list(store.users()), min(_N_TIMED, n_users))
    few = AdapterStore(scratch / "few")
    adapters = {user: store.load(user) for user in some}
    for user in some[:10]:
        few.publish(user, adapters[user], {})
    found = {
        "load_ms": milliseconds(store.load, some),
        "load_of_10_ms": milliseconds(few.load, [rng.choice(some[:10]) for _ in some]),
        "has_ms": milliseconds(lambda user: store.has(user, ""), some),
        "publish_ms": milliseconds(lambda user: few.publish(user, adapters[user], {}), some),
    }
    return {name: round(value, 2) for name, value in found.items()}


def write_rate(like: Adapter, scratch: Path, n_bytes: int = 2**26) -> float:
    """Bytes a second at which a large adapter is published: hashed, written and synced to the disk."""
    store = AdapterStore(scratch / "large")
    adapter = replace(like, tensors={"weight": torch.randn(n_bytes // 4)})
    seconds = 1e-3 * milliseconds(lambda user: store.publish(user, adapter, {}), ["a", "b", "c"])
    return n_bytes / seconds
