"""The stages of users without Ray: workers' functions run in this process, one item after the other."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import yaml

from milp_ray import telemetry
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.personalize import batch
from milp_ray.personalize.pool import Outcome
from milp_ray.personalize.store import AdapterStore, shown
from milp_ray.personalize.store.faults import AdapterDamagedError
from milp_ray.personalize.worker import UserWorker
from milp_ray.rundir import RunFolder


class InlinePool:
    """The pool's contract in this process; ``keys`` are the items that reached a worker."""

    def __init__(self, base: Any) -> None:
        self._worker = UserWorker("inline")
        self._worker._state = base
        self.keys: list[str] = []

    def start(self, n_workers: int) -> None:
        pass

    def map(
        self, function: Callable[..., Any], items: Iterable[Any], *, key: Any, size: Any, at_once: int
    ) -> Iterator[Outcome]:
        pickle.dumps(function)  # workers are other processes
        # All together: what a function measures across its items is measured across all of them.
        given = list(items)
        self.keys += map(key, given)
        for item, reply in zip(given, self._worker.run(function, given) if given else [], strict=True):
            status: Any = "done" if reply.error is None else "failed"
            yield Outcome(key(item), status, reply.value, reply.error, reply.reason)


def use_inline_pool(monkeypatch: pytest.MonkeyPatch, base: Any) -> InlinePool:
    """Give every stage of users one pool in this process, and no Ray session."""
    pool = InlinePool(base)
    for module in (telemetry, batch):
        monkeypatch.setattr(module, "ray_session", lambda *_: nullcontext())
    monkeypatch.setattr(batch, "worker_pool", lambda *_: nullcontext(pool))
    return pool


def write_chosen(run: RunFolder) -> None:
    """A layout of a base of four layers, as if it had been searched for and chosen."""
    layout = CanonicalLayout((False, True, False, True), rank=4)
    chosen = {
        "layout": {**layout.to_dict(), "key": layout.key},
        "rule": "knee",
        "reason": "",
        "objectives": {},
    }
    run.chosen_file.write_text(yaml.safe_dump({**chosen, "adapter_parameters": 1, "trial": 0}))


def damage(monkeypatch: pytest.MonkeyPatch, *user_ids: str) -> None:
    """Have the store find the adapters of some users damaged, with a message that says whose."""
    load = AdapterStore.load

    def loaded(store: AdapterStore, user_id: str, **how: Any) -> Any:
        if user_id in user_ids:
            raise AdapterDamagedError(f"the adapter of user {shown(user_id)}, version 3 is damaged")
        return load(store, user_id, **how)

    monkeypatch.setattr(AdapterStore, "load", loaded)
