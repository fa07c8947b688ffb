"""Trials that share a process: it has one base, and trains the jobs of all of them in one pack.

The process is an actor, a *host*, that holds the CPUs and the GPU. A trial itself holds no resources and
computes nothing: it tells its host which layout to measure and waits. The study's own process makes the
hosts, says which of them a trial goes to, and ends them.

A host that is lost takes its trials along: each is retried as any trial whose process was lost, and Ray
starts the host anew. Nothing but plain values passes between a trial and its host.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.personalize.worker import safe_reason
from milp_ray.search.measure import Measurement, TrialTask
from milp_ray.search.trainers import scratch_folder
from milp_ray.telemetry import log_event, prepare_worker

if TYPE_CHECKING:
    from milp_ray.config.search import SearchSection
    from milp_ray.training.base import Base
    from milp_ray.training.shared_pack import SharedPack

_VALUES, _FAILED, _BROKEN = "values", "failed", "broken"  # what an answer holds
_SECONDS_TO_END = 20.0


class HostFailed(Exception):
    """The process that a trial shares cannot go on with it; the message holds no text of a user."""


@dataclass(frozen=True)
class HostSpec:
    """How many trials share a host, and what it holds."""

    n_trials: int
    cpus: float
    gpus: float

    @classmethod
    def of(cls, section: SearchSection) -> HostSpec | None:
        """What a search asks for; ``None`` where every trial has a process of its own."""
        if section.n_sharing == 1:
            return None
        return cls(section.n_sharing, section.cpus_per_trial, section.held_gpus)


class TrialHost:
    """The actor: a base, a pack, and the measurements of the trials that are here, each in its thread.

    It is given its task when it is asked whether it is ready, and not when it is made: Ray may start it anew,
    and warns that it cannot keep arguments for that.
    """

    def __init__(self) -> None:
        self._task: TrialTask | None = None
        self._folder = scratch_folder()
        self._loading = threading.Lock()
        self._base: Base | None = None
        self._pack: SharedPack | None = None
        self._measurements: dict[int, Measurement] = {}
        self._n_begun: Counter[int] = Counter()

    def ready(self, get_task: Callable[[], TrialTask]) -> None:
        """Whether trials can be sent here; where the pack is broken the process ends, to be started anew."""
        if self._pack is not None and self._pack.is_broken:
            self._folder.cleanup()
            os._exit(1)
        with self._loading:
            if self._task is None:
                self._task = get_task()
                prepare_worker(self._task.threads)

    def warm_up(self, get_task: Callable[[], TrialTask]) -> None:
        """Load the base while the trials' own processes start; where that fails, the first trial tells."""
        try:
            self.ready(get_task)
            self._loaded()
        except Exception as error:
            log_event("trial_host_not_loaded", error=type(error).__name__)

    def advance(self, trial: int, layout: dict[str, Any], is_begun: bool) -> dict[str, Any]:
        """Train a trial up to its next rung, or to the end, and measure it; no exception leaves.

        With ``is_begun`` the trial goes on from a rung; otherwise it begins, and whatever an earlier attempt
        at it left here is taken out.
        """
        try:
            if not is_begun:
                self.forget(trial)
                self._begin(trial, CanonicalLayout.from_dict(layout))
            measurement = self._measurements.get(trial)
            if measurement is None:
                return {_BROKEN: "the process that the trial shared was lost at a rung"}
            if measurement.has_rungs_left:
                return {_VALUES: measurement.next_rung()}
            values = measurement.finish()
        except MilpError as error:
            self.forget(trial)
            return {_FAILED: str(error)}
        except Exception as error:
            self.forget(trial)
            return {_BROKEN: safe_reason(error)}
        self.forget(trial)
        return {_VALUES: values}

    def forget(self, trial: int) -> None:
        """Take a trial's jobs out of the pack, and remove what is kept of it."""
        measurement = self._measurements.pop(trial, None)
        if measurement is not None:
            measurement.close()

    def close(self) -> None:
        """Remove what is kept; the process is about to end."""
        if self._pack is not None:
            self._pack.close()
        self._folder.cleanup()

    def _begin(self, trial: int, layout: CanonicalLayout) -> None:
        pack, base, task = self._loaded()
        self._n_begun[trial] += 1
        caller = pack.caller(f"{trial}/{self._n_begun[trial]}")
        self._measurements[trial] = Measurement(base, layout, task, trainer=caller)

    def _loaded(self) -> tuple[SharedPack, Base, TrialTask]:
        with self._loading:
            if self._task is None:
                raise HostFailed("the process that the trial shares was not told what to measure")
            if self._pack is None or self._base is None:
                from milp_ray.training.base import load_base
                from milp_ray.training.shared_pack import SharedPack

                self._base = load_base(self._task.base)
                self._pack = SharedPack(
                    self._base, self._task.training, self._task.prompt, Path(self._folder.name)
                )
            return self._pack, self._base, self._task


@dataclass(frozen=True)
class Host:
    """A host as others see it: its actor, and how it gets the task."""

    actor: Any
    get_task: Callable[[], TrialTask]


class HostMeasurement:
    """A trial's measurement by a host; it has what :class:`milp_ray.search.measure.Measurement` has."""

    def __init__(self, host: Host, trial: int, layout: CanonicalLayout, n_rungs: int) -> None:
        self._host, self._trial, self._layout = host, trial, layout
        self._n_rungs_left = n_rungs
        self._is_begun = False

    @property
    def has_rungs_left(self) -> bool:
        """Whether :meth:`next_rung` comes next, and not yet :meth:`finish`."""
        return self._n_rungs_left > 0

    def next_rung(self) -> dict[str, Any]:
        """As :meth:`milp_ray.search.measure.Measurement.next_rung`."""
        values = self._advance()
        self._n_rungs_left -= 1
        return values

    def finish(self) -> dict[str, Any]:
        """As :meth:`milp_ray.search.measure.Measurement.finish`."""
        values = self._advance()
        self._is_begun = False  # nothing is kept any more
        return values

    def close(self) -> None:
        """Let the host forget a measurement that was begun."""
        import ray

        from milp_ray.search.lost import LOST

        if self._is_begun:
            self._is_begun = False
            with contextlib.suppress(*LOST):
                ray.get(self._host.actor.forget.remote(self._trial))

    def _advance(self) -> dict[str, Any]:
        import ray

        from milp_ray.search.lost import LOST

        is_begun, self._is_begun = self._is_begun, True
        try:
            if not is_begun:
                # Waits for a host that is starting, or starting again.
                ready = self._host.actor.ready.options(max_task_retries=-1)
                ray.get(ready.remote(self._host.get_task))
            values_or_why = self._host.actor.advance.remote(self._trial, self._layout.to_dict(), is_begun)
            answer = ray.get(values_or_why)
        except LOST:
            self._is_begun = False
            answer = {_BROKEN: "the process that the trial shared was lost"}
        if _VALUES in answer:
            values: dict[str, Any] = answer[_VALUES]
            return values
        self._is_begun = False
        if _FAILED in answer:
            raise MilpError(answer[_FAILED])
        raise HostFailed(answer[_BROKEN])


class Seats:
    """Which host each trial that runs is at: the one with the fewest, and the first of those."""

    def __init__(self, n_hosts: int) -> None:
        self._n_hosts = n_hosts
        self._taken: dict[int, int] = {}  # trial → host

    def take(self, trial: int) -> int:
        """A host for a trial that begins."""
        counts = Counter(self._taken.values())
        self._taken[trial] = min(range(self._n_hosts), key=lambda host: (counts[host], host))
        return self._taken[trial]

    def leave(self, trial: int) -> None:
        """The trial has ended."""
        self._taken.pop(trial, None)


@contextmanager
def trial_hosts(task: TrialTask, spec: HostSpec, n_hosts: int) -> Iterator[Sequence[Host]]:
    """Start hosts, and end them afterwards.

    Ray starts one that is lost anew, as often as that happens: how often a trial is tried is Tune's business.
    """
    import ray

    actor: Any = ray.remote(TrialHost)
    actor = actor.options(
        num_cpus=spec.cpus,
        num_gpus=spec.gpus,
        max_restarts=-1,
        # A thread for each trial that waits for its values, and some for everything else.
        max_concurrency=spec.n_trials + 4,
    )
    # The task holds users' texts: a reference to it is all that a record of the arguments can show.
    get_task: Callable[[], Any] = partial(ray.get, ray.put(task))
    hosts = [Host(actor.remote(), get_task) for _ in range(n_hosts)]
    for host in hosts:
        host.actor.warm_up.remote(get_task)
    log_event("trial_hosts_started", hosts=n_hosts, trials=spec.n_trials)
    try:
        yield hosts
    finally:
        closing = [host.actor.close.remote() for host in hosts]
        ray.wait(closing, num_returns=len(closing), timeout=_SECONDS_TO_END)
        for host in hosts:
            ray.kill(host.actor)
