"""A search in simulated time: workers run trials for as long as their curves say, suggestions for as long as
they take.

One algorithm, one problem, a few workers. A trial costs its curve's seconds; a suggestion costs the CPU
seconds that the algorithm really needed, of one process, while the other workers' trials go on. The
algorithm makes one suggestion at a time and is asked as soon as a worker is free.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from comparison.problem import Curve, Problem

from milp_ray.memory.layout import CanonicalLayout
from milp_ray.objectives import ADAPTER_PARAMETERS
from milp_ray.search.front import hypervolume_history

# Names how a run without early stopping is simulated; to be raised where one would come out differently.
PROTOCOL = 1
# A suggestion that was measured before is answered at once and costs no trial, so that no algorithm loses
# trials for knowing nothing of canonical layouts. After so many in a row one is run again, at its full cost,
# or a run might never end.
MAX_REPEATS = 20


@dataclass(frozen=True)
class Suggestion:
    """A raw point to measure; ``handle`` is the algorithm's own name for it."""

    raw: Mapping[str, Any]
    handle: Any = None


@dataclass(frozen=True)
class Told:
    """What a suggestion was worth. ``values`` by objective, ``None`` for a trial that was stopped early.

    ``rungs`` are the objectives that were known at each rung that the trial reached, by the rung's epoch.
    """

    suggestion: Suggestion
    layout: CanonicalLayout
    values: Mapping[str, float] | None
    per_user: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    rungs: Mapping[int, Mapping[str, float]] = field(default_factory=dict)


class Algorithm(Protocol):
    """What is compared; ``pending`` are the suggestions that were asked for and not told of."""

    def ask(self, n: int, pending: Sequence[Suggestion]) -> list[Suggestion]:
        """At most ``n`` points to measure; fewer, or none, where it wants to hear of pending ones first."""

    def tell(self, told: Told) -> None:
        """Take the values of one suggestion."""


@dataclass(frozen=True)
class EarlyStopping:
    """Rungs at first · η^k epochs, k < n_rungs; from each goes on what ``promoted`` says.

    ``promoted(records, candidate, eta)`` gets the values at the rung of every trial that has reached it, all
    to be minimised, by the number of the trial.
    """

    promoted: Callable[[Mapping[int, Sequence[float]], int, float], bool]
    eta: int = 3
    first: int = 1
    n_rungs: int = 1
    min_records: int = 6

    def epochs(self, n_epochs: int) -> list[int]:
        """Where the rungs of a trial of ``n_epochs`` lie."""
        found = itertools.takewhile(
            lambda e: e < n_epochs, (self.first * self.eta**k for k in itertools.count())
        )
        return list(found)[: self.n_rungs]


@dataclass(frozen=True)
class EndedTrial:
    """One trial of a simulated search: seconds since its start, and its layout as it was measured."""

    started: float
    ended: float
    key: str
    was_stopped: bool
    epochs: int


@dataclass
class Run:
    """A finished simulation: trials in the order in which they ended, and hypervolume after each.

    Hypervolumes are of the layouts' true values, whatever noise the algorithm saw.
    """

    trials: list[EndedTrial]
    hypervolumes: list[float]
    suggestion_seconds: float
    n_repeats: int


def simulate(
    problem: Problem,
    algorithm: Algorithm,
    *,
    n_trials: int,
    n_workers: int = 4,
    early_stopping: EarlyStopping | None = None,
    clock: Callable[[], float] = time.process_time,
) -> Run:
    """Run a search of ``n_trials`` trials.

    Args:
        problem: answers the trials.
        algorithm: a fresh one.
        n_trials: trials to run; repeats of a measured layout are none (see :data:`MAX_REPEATS`).
        n_workers: trials at once.
        early_stopping: stops trials at rungs; ``None`` runs all to their end.
        clock: seconds; what a suggestion takes is read from it.

    Raises:
        RuntimeError: the algorithm suggests nothing although nothing is running.
    """
    return _Simulation(problem, algorithm, n_trials, n_workers, early_stopping, clock).run()


@dataclass
class _Running:
    number: int
    suggestion: Suggestion
    layout: CanonicalLayout
    curve: Curve
    started: float
    also: list[Suggestion] = field(default_factory=list)  # the same layout, suggested again meanwhile


class _Simulation:
    def __init__(
        self,
        problem: Problem,
        algorithm: Algorithm,
        n_trials: int,
        n_workers: int,
        early_stopping: EarlyStopping | None,
        clock: Callable[[], float],
    ) -> None:
        self._problem, self._algorithm = problem, algorithm
        self._n_trials, self._n_workers = n_trials, n_workers
        self._early_stopping, self._clock = early_stopping, clock
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._is_suggesting = False
        self._telling_seconds = 0.0  # since the last suggestion, which waits for it
        self._n_started = 0
        self._n_repeats_in_row = 0
        self._running: dict[int, _Running] = {}
        self._known: dict[str, Curve | None] = {}  # ended layouts; None: stopped early
        self._rungs: dict[int, dict[int, tuple[float, ...]]] = {}
        self._at_rungs: dict[str, dict[int, dict[str, float]]] = {}  # layout → epoch → objectives
        self._truths: list[list[float] | None] = []  # of ended trials, in order
        self._result = Run([], [], 0.0, 0)

    def run(self) -> Run:
        self._ask()
        while self._events:
            self._now, _, happens = heapq.heappop(self._events)
            happens()
            self._ask()
        if self._n_started < self._n_trials:
            raise RuntimeError(
                f"{self._problem.name}: after {self._n_started} trials nothing runs and the algorithm "
                "suggests nothing"
            )
        self._result.hypervolumes = hypervolume_history(
            self._truths, self._problem.signs, self._problem.reference
        )
        return self._result

    # ------------------------------------------------------------------------------------- suggestions

    def _ask(self) -> None:
        """Ask for what the free workers can run, unless a suggestion is being made."""
        n = min(self._n_workers - len(self._running), self._n_trials - self._n_started)
        if self._is_suggesting or n < 1:
            return
        pending = [s for trial in self._running.values() for s in (trial.suggestion, *trial.also)]
        before = self._clock()
        suggestions = self._algorithm.ask(n, pending)
        seconds = self._clock() - before
        if suggestions:
            self._is_suggesting = True
            self._at(seconds + self._telling_seconds, lambda: self._take(suggestions))
            self._telling_seconds = 0.0
        self._result.suggestion_seconds += seconds

    def _take(self, suggestions: Sequence[Suggestion]) -> None:
        self._is_suggesting = False
        for suggestion in suggestions:
            layout = self._problem.measured(self._problem.space.layout(suggestion.raw).canonical())
            twin = next((trial for trial in self._running.values() if trial.layout == layout), None)
            is_repeat = twin is not None or layout.key in self._known
            if not is_repeat or self._n_repeats_in_row >= MAX_REPEATS:
                self._n_repeats_in_row = 0
                self._start(suggestion, layout)
                continue
            self._n_repeats_in_row += 1
            self._result.n_repeats += 1
            if twin is not None:
                twin.also.append(suggestion)
            else:
                self._tell(suggestion, layout)

    def _tell(self, suggestion: Suggestion, layout: CanonicalLayout) -> None:
        curve = self._known[layout.key]
        proposed = self._problem.space.layout(suggestion.raw).canonical()
        values = (
            None
            if curve is None
            else dict(zip(self._problem.objectives, curve.values[-1].tolist(), strict=True))
        )
        before = self._clock()
        rungs = self._at_rungs.get(layout.key, {})
        self._algorithm.tell(Told(suggestion, proposed, values, curve.per_user if curve else {}, rungs))
        seconds = self._clock() - before
        self._telling_seconds += seconds
        self._result.suggestion_seconds += seconds

    # ------------------------------------------------------------------------------------------ trials

    def _start(self, suggestion: Suggestion, layout: CanonicalLayout) -> None:
        curve = self._problem.evaluate(layout)
        trial = _Running(self._n_started, suggestion, layout, curve, self._now)
        self._running[trial.number] = trial
        self._n_started += 1
        rungs = self._early_stopping.epochs(len(curve.train_seconds)) if self._early_stopping else []
        self._go_on(trial, rungs, 0)

    def _go_on(self, trial: _Running, rungs: Sequence[int], n_reached: int) -> None:
        """To the next rung, or to the end."""
        if n_reached < len(rungs):
            until = trial.started + float(trial.curve.train_seconds[rungs[n_reached] - 1])
            self._at(until - self._now, lambda: self._reach(trial, rungs, n_reached))
        else:
            self._at(trial.started + trial.curve.seconds - self._now, lambda: self._end(trial, None))

    def _reach(self, trial: _Running, rungs: Sequence[int], index: int) -> None:
        assert self._early_stopping is not None
        records = self._rungs.setdefault(index, {})
        known = self._at_rung(trial.curve.values[rungs[index] - 1])
        signs = dict(zip(self._problem.objectives, self._problem.signs, strict=True))
        records[trial.number] = tuple(signs[name] * value for name, value in known.items())
        self._at_rungs.setdefault(trial.layout.key, {})[rungs[index]] = known
        enough = len(records) >= self._early_stopping.min_records
        if enough and not self._early_stopping.promoted(records, trial.number, self._early_stopping.eta):
            self._end(trial, rungs[index])
        else:
            self._go_on(trial, rungs, index + 1)

    def _at_rung(self, values: np.ndarray) -> dict[str, float]:
        """What is known at a rung: the first objective, and the adapter's size; answers are not generated."""
        known = (self._problem.objectives[0], ADAPTER_PARAMETERS.name)
        found = zip(self._problem.objectives, values.tolist(), strict=True)
        return {name: value for name, value in found if name in known}

    def _end(self, trial: _Running, stopped_after: int | None) -> None:
        del self._running[trial.number]
        curve = trial.curve if stopped_after is None else None
        self._known[trial.layout.key] = curve
        self._truths.append(None if curve is None else self._problem.truth(trial.layout).tolist())
        n_epochs = len(trial.curve.train_seconds)
        self._result.trials.append(
            EndedTrial(trial.started, self._now, trial.layout.key, curve is None, stopped_after or n_epochs)
        )
        for suggestion in (trial.suggestion, *trial.also):
            self._tell(suggestion, trial.layout)

    def _at(self, seconds: float, happens: Callable[[], None]) -> None:
        """Let something happen so many seconds from now; what was planned first comes first."""
        heapq.heappush(self._events, (self._now + seconds, next(self._order), happens))
