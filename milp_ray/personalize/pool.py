"""A pool of Ray actors that map a function over users, each actor holding one loaded base.

Plain actors rather than Ray Data, whose checkpoints are by block: here one user is one unit of retry and of
failure, though a worker is given many at a time, to work on together. Workers pull, the longest items first
and dealt out evenly, so that no worker ends long after the others. A pool serves any number of stages, which
then pay once for its workers' imports and base:

    with WorkerPool(partial(load_base, config.base), section=config.personalize) as pool:
        for outcome in pool.map(make_adapters, splits, key=…, size=…):
            …
        for outcome in pool.map(score_users, splits, key=…, size=…):
            …

The function is a :data:`~milp_ray.personalize.worker.PackFunction`: it is called as
``function(state, items, report)``, and ``state`` is what the factory returned in that worker.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from milp_ray.errors import MilpError
from milp_ray.personalize.worker import PackFunction, Reply, UserWorker
from milp_ray.telemetry import log_event, logger

if TYPE_CHECKING:
    from milp_ray.config import PersonalizeSection

Item = TypeVar("Item")

# Items looked at ahead of the workers when the longest is picked: bounds the memory of a long iterator.
LOOKAHEAD = 4096
# Items a worker is given at once: several packs of them, so that slots that become free are filled again.
MOST_AT_ONCE = 64
_numbers = itertools.count(1)  # of workers of this process, so that no two actors share a name
_PATIENCE = 60.0  # seconds without any worker, after which a warning says what is waited for
_LOST_WHILE_STARTING = 3  # workers lost in a row before one starts: the machine cannot hold them


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one item."""

    key: str  # the user's id
    status: Literal["done", "failed"]
    value: Any = None  # what the function returned; None for a failed item
    error: str | None = None  # class of the exception, "WorkerLost" for a lost worker
    reason: str | None = None  # never holds a user's text
    attempts: int = 1
    seconds: float = 0.0  # inside the function, of the last attempt
    worker: str = ""

    @property
    def failed(self) -> bool:
        """Whether the item has no result."""
        return self.status == "failed"


@dataclass(order=True, slots=True)
class _Task(Generic[Item]):
    """One item in the queue: the largest first, then in the order given."""

    rank: tuple[float, int]
    key: str = field(compare=False)
    item: Item = field(compare=False)
    attempts: int = field(default=0, compare=False)
    lost: int = field(default=0, compare=False)  # workers lost while they worked on it alone
    alone: bool = field(default=False, compare=False)  # something went wrong with it in company


@dataclass(frozen=True, slots=True)
class _Handle:
    """One actor and its name."""

    name: str
    actor: Any


class WorkerPool:
    """Workers that stay open over several stages; use it as a context manager inside a Ray session.

    Args:
        factory: makes a worker's state, in the worker (``partial(load_base, section)``); picklable.
        section: how many workers, what each is given, how often an item is retried whose worker was lost.
        threads: torch threads a worker.
        name: beginning of the actors' names.
    """

    def __init__(
        self,
        factory: Callable[[], Any],
        *,
        section: PersonalizeSection,
        threads: int = 1,
        name: str = "personalize",
    ) -> None:
        self._factory = factory
        self._section = section
        self._threads = threads
        self._name = name
        self._lost_in_a_row = 0
        self._handles: dict[Any, _Handle] = {}  # pending reply → its worker
        self._idle: list[_Handle] = []
        self.max_workers = 0
        self.n_lost = 0

    def __enter__(self) -> WorkerPool:
        self.max_workers = self._section.n_workers or _room_for(self._section)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in [*self._handles.values(), *self._idle]:
            _kill(handle)
        self._handles.clear()
        self._idle.clear()

    @property
    def n_workers(self) -> int:
        """Workers that exist now, starting ones included."""
        return len(self._handles) + len(self._idle)

    def start(self, n_workers: int | None = None) -> None:
        """Begin to start workers without waiting for them, so that their imports overlap with other work."""
        wanted = min(n_workers or self.max_workers, self.max_workers)
        while self.n_workers < wanted:
            self._spawn()

    def map(
        self,
        function: PackFunction,
        items: Iterable[Item],
        *,
        key: Callable[[Item], str],
        size: Callable[[Item], float] = lambda item: 0.0,
        at_once: int = MOST_AT_ONCE,
    ) -> Iterator[Outcome]:
        """Apply ``function`` to every item; one outcome an item, in the order in which they end.

        Args:
            function: called as ``function(state, items, report)`` in a worker; picklable. Items that it
                reports an error for, or cannot do even alone, fail; the others do not.
            items: read as workers become free, at most :data:`LOOKAHEAD` ahead.
            key: the item's name in its outcome.
            size: larger items are begun first.
            at_once: most items of a call. An item whose worker was lost is tried again alone.

        Raises:
            MilpError: the factory failed, or workers die before their state is loaded.
        """
        import ray

        if not self.max_workers:
            raise RuntimeError("the pool is not open: use it in a `with` block")
        shared_function = ray.put(function)
        queue = _Queue(items, key, size)
        working: dict[Any, list[_Task[Item]]] = {}
        try:
            while queue or working:
                self.start(min(len(queue) + len(working), self.max_workers))
                while self._idle and queue:
                    handle, tasks = self._idle.pop(), queue.deal(self.max_workers, at_once)
                    for task in tasks:
                        task.attempts += 1
                    reply = handle.actor.run.remote(shared_function, [task.item for task in tasks])
                    self._handles[reply] = handle
                    working[reply] = tasks
                done, _ = ray.wait(list(self._handles), num_returns=1, timeout=None if working else _PATIENCE)
                if not done:
                    self._warn_of_waiting()
                    continue
                handle = self._handles.pop(done[0])
                finished = working.pop(done[0], None)
                if finished is None:
                    self._after_start(handle, done[0])
                else:
                    yield from self._after_run(handle, done[0], finished, queue)
        finally:
            # A consumer that stops early, or an interruption: what is still being worked on is given up.
            for reply in working:
                if reply in self._handles:
                    _kill(self._handles.pop(reply))

    # ---------------------------------------------------------------------------------------- internals

    def _warn_of_waiting(self) -> None:
        logger.warning(
            "no worker has started for %.0f s: each waits for %g CPUs and %g GPUs, which something else "
            "on the cluster holds, or its node is still being added",
            _PATIENCE,
            self._section.cpus_per_worker,
            self._section.gpus_per_worker,
        )

    def _spawn(self) -> None:
        import ray

        name = f"{self._name}-worker-{next(_numbers)}"
        actor_class: Any = ray.remote(UserWorker)
        actor = actor_class.options(
            name=name,
            num_cpus=self._section.cpus_per_worker,
            num_gpus=self._section.gpus_per_worker,
            max_restarts=0,  # the pool replaces a lost worker itself, and knows what it worked on
        ).remote(name)
        self._handles[actor.start.remote(self._factory, self._threads)] = _Handle(name, actor)

    def _after_start(self, handle: _Handle, reply: Any) -> None:
        """A worker has loaded its state, or has failed to."""
        import ray

        try:
            seconds = ray.get(reply)
        except ray.exceptions.RayTaskError as error:
            _kill(handle)
            cause = error.cause
            raise cause if isinstance(cause, Exception) else error from None
        except ray.exceptions.RayError as error:
            _kill(handle)
            self._lost_in_a_row += 1
            if self._lost_in_a_row >= _LOST_WHILE_STARTING:
                raise MilpError(
                    f"{self._lost_in_a_row} workers in a row died while they loaded the base "
                    f"({type(error).__name__}), most likely out of memory; lower personalize.n_workers "
                    "or use a smaller base"
                ) from error
            return
        self._lost_in_a_row = 0
        self._idle.append(handle)
        log_event("worker_started", worker=handle.name, seconds=round(seconds, 3))

    def _after_run(
        self, handle: _Handle, reply: Any, tasks: list[_Task[Item]], queue: _Queue[Item]
    ) -> list[Outcome]:
        """A worker has replied, or was lost; the outcomes of the items that are not to be tried again."""
        import ray

        try:
            answers: list[Reply] = ray.get(reply)
        except ray.exceptions.RayTaskError as error:
            # The function's own exceptions come as replies: this one is about sending items or values.
            self._idle.append(handle)
            cause = type(error.cause).__name__
            if len(tasks) > 1:
                return self._again(tasks, queue)
            return [_failed(tasks[0], handle, cause, f"{cause} while the user's data or result was sent")]
        except ray.exceptions.RayError:
            # Killed, out of memory, node gone, or not to be reached: in every case not to be relied on.
            _kill(handle)
            self.n_lost += 1
            log_event("worker_lost", worker=handle.name, n_users=len(tasks), attempt=tasks[0].attempts)
            if len(tasks) > 1:  # any of them may have been the cause, and most were not
                return self._again(tasks, queue)
            tasks[0].lost += 1
            if tasks[0].lost <= self._section.max_retries:
                return self._again(tasks, queue)
            reason = f"its worker was lost {tasks[0].lost} times (killed or out of memory)"
            return [_failed(tasks[0], handle, "WorkerLost", reason)]
        self._idle.append(handle)
        return [
            Outcome(
                task.key,
                "done" if answer.error is None else "failed",
                answer.value,
                answer.error,
                answer.reason,
                task.attempts,
                answer.seconds,
                handle.name,
            )
            for task, answer in zip(tasks, answers, strict=True)
        ]

    def _again(self, tasks: list[_Task[Item]], queue: _Queue[Item]) -> list[Outcome]:
        for task in tasks:
            task.alone = True
            queue.push_back(task)
        return []


def _failed(task: _Task[Item], handle: _Handle, error: str, reason: str) -> Outcome:
    return Outcome(task.key, "failed", error=error, reason=reason, attempts=task.attempts, worker=handle.name)


class _Queue(Generic[Item]):
    """Items by size, the largest of those looked at first; reads its source only as it is emptied."""

    def __init__(
        self, items: Iterable[Item], key: Callable[[Item], str], size: Callable[[Item], float]
    ) -> None:
        self._source = iter(items)
        self._key = key
        self._size = size
        self._order = itertools.count()
        self._heap: list[_Task[Item]] = []
        self._fill()

    def __len__(self) -> int:
        return len(self._heap)

    def deal(self, n_hands: int, most: int) -> list[_Task[Item]]:
        """Take a hand: every ``n_hands``-th of the largest tasks, so that what is left makes equal hands.

        At most ``most`` tasks; one that has to be done alone makes a hand of its own.
        """
        first = heapq.heappop(self._heap)
        hand = [first]
        if not first.alone:
            n_each = min(most, math.ceil((len(self._heap) + 1) / n_hands))
            left: list[_Task[Item]] = []
            while self._heap and len(hand) < n_each:
                task = heapq.heappop(self._heap)
                goes_along = (len(left) + len(hand)) % n_hands == 0 and not task.alone
                (hand if goes_along else left).append(task)
            for task in left:
                heapq.heappush(self._heap, task)
        self._fill()
        return hand

    def push_back(self, task: _Task[Item]) -> None:
        """Return a task whose worker was lost; it is the next one again where it is the largest."""
        heapq.heappush(self._heap, task)

    def _fill(self) -> None:
        for item in itertools.islice(self._source, max(0, LOOKAHEAD - len(self._heap))):
            rank = (-self._size(item), next(self._order))
            heapq.heappush(self._heap, _Task(rank, self._key(item), item))


def _room_for(section: PersonalizeSection) -> int:
    """How many workers the cluster's nodes hold at once.

    Raises:
        MilpError: not a single one.
    """
    import ray

    started = time.perf_counter()
    room = 0
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        resources = node["Resources"]
        fits = resources.get("CPU", 0.0) / section.cpus_per_worker
        if section.gpus_per_worker:
            fits = min(fits, resources.get("GPU", 0.0) / section.gpus_per_worker)
        room += math.floor(fits + 1e-9)
    if not room:
        raise MilpError(
            f"no node has personalize.cpus_per_worker {section.cpus_per_worker:g} and gpus_per_worker "
            f"{section.gpus_per_worker:g} free for a worker (the cluster has {_resources()}); lower them, or "
            "set personalize.n_workers where nodes are added on demand"
        )
    log_event("workers_planned", workers=room, seconds=round(time.perf_counter() - started, 3))
    return room


def _resources() -> str:
    import ray

    total = ray.cluster_resources()
    return f"{total.get('CPU', 0.0):g} CPUs and {total.get('GPU', 0.0):g} GPUs in all"


def _kill(handle: _Handle) -> None:
    """End an actor of this pool; no matter if it is gone already."""
    import ray

    ray.kill(handle.actor, no_restart=True)
