"""What is compared: our search and its peers, each behind :class:`comparison.simulation.Algorithm`.

Peers get the raw search space as one would declare it with them (bits, the number n, the place of the rank
among the ranks) and keep their own defaults, their initial trials included.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from comparison.problem import Problem
from comparison.simulation import Algorithm, EarlyStopping, Suggestion, Told

from milp_ray.config.search import EarlyStoppingSection, SearchSection, SurrogateSection
from milp_ray.errors import MilpError
from milp_ray.search.candidates import initial_points, random_new_point
from milp_ray.search.observations import Observation
from milp_ray.search.rungs import promoted
from milp_ray.search.suggest import Question, Suggester
from milp_ray.search.warm_start import EarlierStudy, portfolio

# Initial trials of ours, of the order of the peers' own defaults (Ax 5, TPE 10).
N_INITIAL = 8
SUBSET = 24  # of the trials, which "ours_map_subset" is fitted to


class Random:
    """New layouts at random, few and many layers alike."""

    def __init__(self, problem: Problem, seed: int) -> None:
        self._space = problem.space
        self._rng = np.random.default_rng(seed)
        self._seen: set[str] = set()

    def ask(self, n: int, pending: Sequence[Suggestion]) -> list[Suggestion]:
        """``n`` layouts that were not asked for before."""
        found: list[Suggestion] = []
        while len(found) < n:
            raw = random_new_point(self._space, self._seen, self._rng)
            if raw is None:
                break
            self._seen.add(self._space.layout(raw).canonical().key)
            found.append(Suggestion(raw))
        return found

    def tell(self, told: Told) -> None:
        """Nothing is learnt."""


class Ours:
    """The package's own suggester, asked as a study asks it: initial points, then the surrogate.

    ``earlier`` are the searches that it starts from, ``max_observations`` what the surrogate is fitted to.
    """

    def __init__(
        self,
        problem: Problem,
        seed: int,
        inference: Literal["map", "nuts"],
        earlier: Sequence[EarlierStudy] = (),
        n_initial: int = N_INITIAL,
        max_observations: int = SurrogateSection().max_observations,
    ) -> None:
        from milp_ray.search import surrogate

        self._problem = problem
        section = SearchSection(
            n_initial=n_initial,
            objectives=problem.objectives,
            surrogate=SurrogateSection(inference=inference, max_observations=max_observations),
        )
        surrogate.warm_up(section.surrogate)  # imports; a study's suggester starts before it is asked
        self._suggester = Suggester(problem.space, section, seed, tuple(e.observations for e in earlier))
        self._initial = portfolio(earlier, problem.space, n_initial)
        first = {problem.space.layout(raw).canonical().key for raw in self._initial}
        self._initial += [
            raw
            for raw in initial_points(problem.space, n_initial + len(first), seed)
            if problem.space.layout(raw).canonical().key not in first
        ][: n_initial - len(first)]
        self._n_asked = self._n_batches = 0
        self._told: dict[int, Told] = {}

    def ask(self, n: int, pending: Sequence[Suggestion]) -> list[Suggestion]:
        """The rest of the initial points, then proposals."""
        raws: list[Mapping[str, Any]] = list(self._initial[:n])
        del self._initial[:n]
        if not raws:
            raws = [proposal.raw for proposal in self._suggester.propose(self._question(n, pending))]
        first = self._n_asked
        self._n_asked += len(raws)
        return [Suggestion(raw, first + i) for i, raw in enumerate(raws)]

    def tell(self, told: Told) -> None:
        """Remember it for the next question."""
        self._told[told.suggestion.handle] = told

    def _question(self, n: int, pending: Sequence[Suggestion]) -> Question:
        self._n_batches += 1
        running = {s.handle: self._problem.space.layout(s.raw).canonical() for s in pending}
        observations = [
            Observation(index, told.suggestion.raw, told.layout, told.values, told.per_user, told.rungs)
            for index, told in sorted(self._told.items())
        ]
        waiting = tuple(layout for _, layout in sorted(running.items()))
        return Question(tuple(observations), self._n_batches, n, waiting)


def early_stopping(eta: int | None = None) -> EarlyStopping:
    """The package's own rule with its defaults, or another η."""
    section = EarlyStoppingSection()
    return EarlyStopping(
        promoted, eta or section.eta, section.first_rung, section.n_rungs, section.min_records
    )


class Optuna:
    """A sampler of Optuna, its defaults as they are; a trial that was stopped early is told as failed."""

    def __init__(self, problem: Problem, seed: int, sampler: Literal["tpe", "gp", "nsga2"]) -> None:
        optuna = _imported("optuna")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        make = {
            "tpe": optuna.samplers.TPESampler,
            "gp": optuna.samplers.GPSampler,
            "nsga2": optuna.samplers.NSGAIISampler,
        }
        self._problem = problem
        directions = ["minimize" if sign > 0 else "maximize" for sign in problem.signs]
        with _quiet():
            self._study = optuna.create_study(directions=directions, sampler=make[sampler](seed=seed))
        self._failed = optuna.trial.TrialState.FAIL
        self._distributions = {
            parameter.name: optuna.distributions.CategoricalDistribution([False, True])
            if parameter.kind == "bool"
            else optuna.distributions.IntDistribution(0, len(parameter.values) - 1)
            for parameter in problem.space.parameters()
        }

    def ask(self, n: int, pending: Sequence[Suggestion]) -> list[Suggestion]:
        """``n`` trials of the study; those that run are known to it."""
        with _quiet():
            trials = [self._study.ask(self._distributions) for _ in range(n)]
        return [Suggestion(_raw(self._problem, trial.params), trial.number) for trial in trials]

    def tell(self, told: Told) -> None:
        """Tell the study."""
        with _quiet():
            if told.values is None:
                self._study.tell(told.suggestion.handle, state=self._failed)
            else:
                self._study.tell(told.suggestion.handle, list(told.values.values()))


class StockAx:
    """Ax's client as it comes: ``fast`` is its default, ``quality`` its SAAS model sampled with NUTS."""

    def __init__(self, problem: Problem, seed: int, method: Literal["fast", "quality"]) -> None:
        import torch
        from ax.api.client import Client
        from ax.api.configs import ChoiceParameterConfig, RangeParameterConfig
        from ax.utils.common.logger import set_ax_logger_levels

        set_ax_logger_levels(logging.ERROR)
        torch.set_num_threads(1)
        self._problem = problem
        self._client = Client(random_seed=seed)
        with _quiet():
            self._client.configure_experiment(
                [
                    ChoiceParameterConfig(parameter.name, [False, True], "bool")
                    if parameter.kind == "bool"
                    else RangeParameterConfig(parameter.name, (0, len(parameter.values) - 1), "int")
                    for parameter in problem.space.parameters()
                ]
            )
            self._client.configure_optimization(
                ", ".join(
                    ("-" if sign > 0 else "") + name
                    for name, sign in zip(problem.objectives, problem.signs, strict=True)
                )
            )
            self._client.configure_generation_strategy(method, initialization_random_seed=seed)

    def ask(self, n: int, pending: Sequence[Suggestion]) -> list[Suggestion]:
        """As many trials as Ax gives now; it waits for initial ones to end."""
        with _quiet():
            trials = self._client.get_next_trials(n)
        return [Suggestion(_raw(self._problem, point), index) for index, point in sorted(trials.items())]

    def tell(self, told: Told) -> None:
        """Complete the trial, or mark it as failed."""
        with _quiet():
            if told.values is None:
                self._client.mark_trial_failed(told.suggestion.handle)
            else:
                self._client.complete_trial(told.suggestion.handle, raw_data=dict(told.values))


@dataclass(frozen=True)
class Entry:
    """One line of the comparison.

    ``is_ours`` says whose it is; ``stops_early`` whether its trials are stopped at rungs; ``most_trials`` how
    many a search has where its suggestions take so long that fewer, and fewer seeds, have to do.
    """

    make: Callable[[Problem, int], Algorithm]
    is_ours: bool = False
    stops_early: bool = False
    most_trials: int | None = None


ENTRIES: dict[str, Entry] = {
    "random": Entry(Random),
    "optuna_nsga2": Entry(lambda problem, seed: Optuna(problem, seed, "nsga2")),
    "optuna_motpe": Entry(lambda problem, seed: Optuna(problem, seed, "tpe")),
    "optuna_gp": Entry(lambda problem, seed: Optuna(problem, seed, "gp")),
    "ax_default": Entry(lambda problem, seed: StockAx(problem, seed, "fast"), most_trials=32),
    "ax_saasbo": Entry(lambda problem, seed: StockAx(problem, seed, "quality"), most_trials=12),
    "ours_map": Entry(lambda problem, seed: Ours(problem, seed, "map"), is_ours=True),
    "ours_nuts": Entry(lambda problem, seed: Ours(problem, seed, "nuts"), is_ours=True, most_trials=32),
    "ours_map_stopping": Entry(
        lambda problem, seed: Ours(problem, seed, "map"), is_ours=True, stops_early=True
    ),
    "ours_nuts_stopping": Entry(
        lambda problem, seed: Ours(problem, seed, "nuts"), is_ours=True, stops_early=True, most_trials=32
    ),
    # As a search of thousands of trials is.
    "ours_map_subset": Entry(
        lambda problem, seed: Ours(problem, seed, "map", max_observations=SUBSET), is_ours=True
    ),
}


def _raw(problem: Problem, point: Mapping[str, Any]) -> dict[str, Any]:
    """A raw point from a peer's: bits as they are, elsewhere the place among the parameter's values."""
    return {
        parameter.name: bool(point[parameter.name])
        if parameter.kind == "bool"
        else parameter.values[int(point[parameter.name])]
        for parameter in problem.space.parameters()
    }


def _imported(name: str) -> Any:
    """A peer that is no dependency of the package.

    Raises:
        MilpError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MilpError(
            f"this comparison needs {name}: pip install {name}, or name other --algorithms"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
