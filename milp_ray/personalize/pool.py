"""A pool of Ray actors that map a function over users, each actor holding one loaded base.

Plain actors rather than Ray Data, whose checkpoints are by block: here one user is one unit of retry and of
failure, though a worker is given many at a time, to work on together. Workers pull, the longest items first
and dealt out evenly, so that no worker ends long after the others. What one of them is far too slow with is
begun again by those that have nothing left to do; whoever is first counts. A pool serves any number of
stages, which then pay once for its workers' imports and base:

    with WorkerPool(partial(load_base, config.base), section=config.personalize) as pool:
        for outcome in pool.map(make_adapters, splits, key=…, size=…):
            …
        for outcome in pool.map(score_users, splits, key=…, size=…):
            …

The function is a :data:`~milp_ray.personalize.worker.PackFunction`: it is called as
``function(state, items, report)``, and ``state`` is what the factory returned in that worker.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from milp_ray.errors import MilpError
from milp_ray.personalize.calls import Call, Pace
from milp_ray.personalize.cluster import alive_nodes, no_room, room_for, this_node
from milp_ray.personalize.hands import MOST_AT_ONCE, Item, Outcome, Queue, Task
from milp_ray.personalize.worker import PackFunction, Reply, UserWorker
from milp_ray.telemetry import log_event, logger

if TYPE_CHECKING:
    from milp_ray.config.personalize import PersonalizeSection

__all__ = ["MOST_AT_ONCE", "Outcome", "WorkerPool"]

_numbers = itertools.count(1)  # of workers of this process, so that no two actors share a name
_LOOK_AGAIN = 5.0  # seconds between two looks at the cluster, for nodes that came or went
_PATIENCE = 60.0  # seconds without any worker, after which a warning says what is waited for
_LOST_WHILE_STARTING = 3  # workers lost in a row before one starts: the machine cannot hold them
# Losses with a node blame nobody, but an item may be what fells its nodes (out of memory, say): after five
# attempts it is tried alone, and after twenty it has failed.
_MOST_IN_COMPANY, _MOST_ATTEMPTS = 5, 20


@dataclass(slots=True)
class _Handle:
    """One actor, its name, and where it is."""

    name: str
    actor: Any
    nodes: frozenset[str]  # that were alive when it was made
    node: str = ""  # its own, once it has started


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
        self._looked = 0.0  # when the cluster was looked at
        self.max_workers = 0
        self.n_lost = 0

    def __enter__(self) -> WorkerPool:
        self.max_workers = self._section.n_workers or room_for(self._section)
        if not self.max_workers:
            raise no_room(self._section)
        self._looked = time.monotonic()
        log_event("workers_planned", workers=self.max_workers)
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
            items: read as workers become free, and not far ahead of them
                (:data:`~milp_ray.personalize.hands.LOOKAHEAD`).
            key: the item's name in its outcome.
            size: larger items are begun first; in characters, or what costs about as much memory.
            at_once: most items of a call. An item whose worker was lost is tried again alone, or in company
                as before where the worker's node went with it.

        An item may be worked on in two places at once, where one of them is slow: ``function`` must bear it.
        Workers are started as nodes join the cluster, unless ``section.n_workers`` says how many.

        Raises:
            MilpError: the factory failed, workers die before their state is loaded, a function found that no
                item can be done, or the Ray node of this process has died.
        """
        import ray

        if not self.max_workers:
            raise RuntimeError("the pool is not open: use it in a `with` block")
        shared_function = ray.put(function)
        queue = Queue(items, key, size)
        working: dict[Any, Call[Item]] = {}
        pace = Pace()
        waiting_since = time.monotonic()
        try:
            while queue or any(call.unfinished for call in working.values()):
                self._look_around()
                self._end_hung(working, pace)
                if not queue:
                    self._begin_again(working, pace, queue)
                self.start(min(len(queue) + len(working), self.max_workers))
                while self._idle and queue:
                    dealt = queue.deal(self.max_workers, at_once)
                    tasks = [task for task in dealt if not task.is_done]
                    if not tasks:
                        continue
                    handle = self._idle.pop()
                    for task in tasks:
                        task.attempts += 1
                    reply = handle.actor.run.remote(shared_function, [task.item for task in tasks])
                    self._handles[reply] = handle
                    working[reply] = Call(tasks)
                done, _ = ray.wait(list(self._handles), num_returns=1, timeout=_LOOK_AGAIN)
                if done or working:
                    waiting_since = time.monotonic()
                elif time.monotonic() - waiting_since > _PATIENCE:
                    waiting_since = time.monotonic()
                    self._warn_of_waiting()
                if not done:
                    continue
                handle = self._handles.pop(done[0])
                finished = working.pop(done[0], None)
                if finished is None:
                    self._after_start(handle, done[0])
                    continue
                yield from self._after_run(handle, done[0], finished, queue, pace)
        finally:
            # A consumer that stops early, an interruption, or others were faster: what is still being worked
            # on is given up.
            for reply in working:
                if reply in self._handles:
                    _kill(self._handles.pop(reply))

    # ---------------------------------------------------------------------------------------- internals

    @cached_property
    def _own_node(self) -> str:
        return this_node()

    def _look_around(self) -> None:
        """Every few seconds: has the room for workers changed, and is there a way to reach them?"""
        if time.monotonic() - self._looked < _LOOK_AGAIN:
            return
        self._looked = time.monotonic()
        if self._own_node not in alive_nodes():
            raise MilpError(
                "the Ray node of this process has died (its raylet was killed, or the machine is out of "
                "memory). What was done is kept; the same command goes on from there"
            )
        if self._section.n_workers is not None:
            return
        room = max(1, room_for(self._section))
        if room != self.max_workers:
            log_event("workers_planned", workers=room, before=self.max_workers)
            self.max_workers = room

    def _begin_again(self, working: dict[Any, Call[Item]], pace: Pace, queue: Queue[Item]) -> None:
        """Put what a slow worker has not done yet back into the queue, where there is a worker for it."""
        if not self._idle and self.n_workers >= self.max_workers:
            return
        for reply, call in working.items():
            if not call.is_begun_again and pace.is_slow(call):
                call.is_begun_again = True
                tasks = call.unfinished
                worker = self._handles[reply].name
                seconds = round(call.seconds, 1)
                log_event("worker_slow", worker=worker, n_users=len(tasks), seconds=seconds)
                for task in tasks:
                    queue.push_back(task)

    def _end_hung(self, working: dict[Any, Call[Item]], pace: Pace) -> None:
        """End workers that will not end by themselves: what they worked on is tried again as after a loss."""
        if self._section.patience is None:
            return
        for reply, call in working.items():
            if pace.has_hung(call, self._section.patience):
                call.since = time.monotonic()  # the worker's end is to come
                handle = self._handles[reply]
                log_event("worker_hung", worker=handle.name, n_users=len(call.tasks))
                _kill(handle)

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
        started = actor.start.remote(self._factory, self._threads, this_node)
        self._handles[started] = _Handle(name, actor, alive_nodes())

    def _after_start(self, handle: _Handle, reply: Any) -> None:
        """A worker has loaded its state, or has failed to."""
        import ray

        try:
            seconds, handle.node = ray.get(reply)
        except ray.exceptions.RayTaskError as error:
            _kill(handle)
            cause = error.cause
            raise cause if isinstance(cause, Exception) else error from None
        except ray.exceptions.RayError as error:
            _kill(handle)
            if not handle.nodes <= alive_nodes():
                return  # it may have gone with a node
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
        self, handle: _Handle, reply: Any, call: Call[Item], queue: Queue[Item], pace: Pace
    ) -> Iterator[Outcome]:
        """A worker has replied, or was lost; the outcomes of the items that are not to be tried again."""
        import ray

        # What another worker has begun as well is its business from then on, unless this one was faster.
        tasks = [] if call.is_begun_again else call.unfinished
        try:
            answers: list[Reply] = ray.get(reply)
        except ray.exceptions.RayTaskError as error:
            # The function's own exceptions come as replies: this one is about sending items or values.
            self._idle.append(handle)
            cause = type(error.cause).__name__
            if len(call.tasks) > 1:
                _again(tasks, queue, alone=True)
            elif tasks:
                tasks[0].is_done = True
                reason = f"{cause} while the user's data or result was sent"
                yield _failed(tasks[0], handle, cause, reason)
            return
        except ray.exceptions.RayError as error:
            # Killed, out of memory, node gone, or not to be reached: in every case not to be relied on.
            _kill(handle)
            self.n_lost += 1
            if tasks:
                yield from self._after_loss(handle, error, tasks, queue)
            return
        self._idle.append(handle)
        pace.ended(call)
        for task, answer in zip(call.tasks, answers, strict=True):
            if not answer.ends_all and not task.is_done:
                task.is_done = True
                status: Any = "done" if answer.error is None else "failed"
                about = (answer.value, answer.error, answer.reason)
                yield Outcome(task.key, status, *about, task.attempts, answer.seconds, handle.name)
        if ending := next((answer for answer in answers if answer.ends_all), None):
            raise MilpError(str(ending.reason))

    def _after_loss(
        self, handle: _Handle, error: Exception, tasks: list[Task[Item]], queue: Queue[Item]
    ) -> Iterator[Outcome]:
        """Who is to blame for a lost worker: one item that was alone with it, unless its node was lost, too.

        A node that is preempted may take its workers with it some seconds before the cluster knows of it, so
        an item's earlier losses are judged anew with each later one.
        """
        import ray

        alive = alive_nodes()
        elsewhere = (ray.exceptions.NodeDiedError, ray.exceptions.ActorUnavailableError)
        preempted = isinstance(error, ray.exceptions.RayActorError) and error.preempted
        with_node = preempted or isinstance(error, elsewhere) or handle.node not in alive
        log_event(
            "worker_lost",
            worker=handle.name,
            n_users=len(tasks),
            attempt=tasks[0].attempts,
            with_node=with_node,
        )
        if len(tasks) > 1:
            # Any of them may have been the cause, and most were not.
            _again(tasks, queue, alone=not with_node)
            return
        [task] = tasks
        if not with_node:
            task.lost_on = [node for node in [*task.lost_on, handle.node] if node in alive]
        if len(task.lost_on) <= self._section.max_retries and task.attempts < _MOST_ATTEMPTS:
            _again(tasks, queue, alone=task.alone or not with_node)
            return
        n_lost = len(task.lost_on) if not with_node else task.attempts
        task.is_done = True
        reason = f"its worker was lost {n_lost} times while it worked on this user alone"
        yield _failed(task, handle, "WorkerLost", f"{reason} (killed or out of memory)")


def _again(tasks: list[Task[Item]], queue: Queue[Item], *, alone: bool) -> None:
    for task in tasks:
        task.alone = alone or task.attempts >= _MOST_IN_COMPANY
        queue.push_back(task)


def _failed(task: Task[Item], handle: _Handle, error: str, reason: str) -> Outcome:
    return Outcome(task.key, "failed", error=error, reason=reason, attempts=task.attempts, worker=handle.name)


def _kill(handle: _Handle) -> None:
    """End an actor of this pool; no matter if it is gone already."""
    import ray

    ray.kill(handle.actor, no_restart=True)
