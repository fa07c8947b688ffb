"""What a study has learnt and what it costs, running or finished, read from its journal and nothing else.

Reading takes no lock and changes nothing: the journal of a search at work is read up to its last whole line.
What the surrogate model adds (which factors of the layout matter, what it believes of a layout) comes as an
:class:`Beliefs`, which :func:`analysis_of` makes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from milp_ray.errors import MilpError
from milp_ray.memory.space import SearchSpace
from milp_ray.objectives import KNOWN_OBJECTIVES
from milp_ray.search.front import hypervolume_history
from milp_ray.search.journal import StudyState, read_events, replay
from milp_ray.search.observations import observations, standard_errors
from milp_ray.search.results import StudyResult, known_values, study_result
from milp_ray.search.timeline import (
    TrialLife,
    event_times,
    idle_share,
    most_at_once,
    proposals,
    sessions,
    trial_lives,
    trial_seconds,
    utilisation,
    working_seconds,
)

if TYPE_CHECKING:
    from milp_ray.config.search import SearchSection
    from milp_ray.memory.layout import CanonicalLayout
    from milp_ray.rundir import RunFolder

# A model of fewer measured trials says more of its prior than of the layouts.
MIN_TRIALS = 8
_LAYER = "layer "  # a layer's factor is this and its index


@dataclass(frozen=True)
class Beliefs:
    """What a surrogate of the study's own trials believes, by objective (:mod:`milp_ray.search.analysis`).

    ``importance[objective][factor]`` is (mean, low, high) of the factor's total Sobol' index over the samples
    of the hyperparameters; factors are "layer 0" …, "n" and "rank". ``unexplained[objective]``, likewise, is
    the share of the variance between layouts that no factor tells. ``mean`` and ``sd``, by objective, are of
    the layouts asked for, in their order and the objective's own unit, without measurement noise.
    """

    objectives: tuple[str, ...]
    factors: tuple[str, ...]
    importance: Mapping[str, Mapping[str, tuple[float, float, float]]]
    unexplained: Mapping[str, tuple[float, float, float]]
    mean: Mapping[str, Sequence[float]]
    sd: Mapping[str, Sequence[float]]


class NoAnalysis(MilpError):
    """The model has nothing to say (yet); the message says why."""


@dataclass(frozen=True)
class Study:
    """A search as its journal tells it, and the section of the configuration that it runs by."""

    events: tuple[Mapping[str, Any], ...]
    state: StudyState
    result: StudyResult
    section: SearchSection
    space: SearchSpace

    @property
    def n_trials(self) -> int:
        """How many trials there will be: as configured, or as many as the space has layouts."""
        repeated = len(self.state.trials) - len(self.state.keys)
        return max(len(self.state.trials), min(self.section.n_trials, self.space.n_canonical + repeated))


@dataclass(frozen=True)
class BestValue:
    """The best value of one objective, and the trial that measured it."""

    value: float
    trial: int
    key: str


@dataclass(frozen=True)
class StudyStatus:
    """How far a study is and what it has cost; all times in seconds.

    ``trials`` counts by status: completed, stopped, failed, running, waiting. ``seconds_left`` is an
    estimate, ``None`` before a trial has ended. ``trial_seconds`` is the trials' own work and ``cpu_seconds``
    and ``gpu_seconds`` that times what each holds; trials that share a process share out its time.
    ``idle_share``, ``utilisation``, ``n_slots`` and ``n_processes`` are
    ``None`` before Tune has started, ``max_block_seconds`` before a session has ended.
    """

    objectives: tuple[str, ...]
    trials: Mapping[str, int]
    n_trials: int  # that there will be
    finished: str | None
    last_event: str
    hypervolume: float | None
    n_front: int
    best: Mapping[str, BestValue]
    n_sessions: int
    n_slots: int | None  # of the last session
    n_processes: int | None  # that those slots are in
    seconds: float  # of all sessions
    seconds_left: float | None
    trial_seconds: float
    cpu_seconds: float
    gpu_seconds: float
    idle_share: float | None
    utilisation: float | None
    max_block_seconds: float | None
    n_batches: int
    proposal_seconds: float | None
    longest_proposal_seconds: float | None
    startup_seconds: float | None  # of a trial, the mean: until its process and the base were there
    longest_startup_seconds: float | None

    @property
    def n_ended(self) -> int:
        """Trials that are over, for good or ill."""
        return sum(self.trials[name] for name in ("completed", "stopped", "failed"))

    @property
    def n_to_come(self) -> int:
        """Trials that run, wait or are still to be proposed."""
        return 0 if self.finished else self.n_trials - self.n_ended


@dataclass(frozen=True)
class Estimate:
    """One objective of a layout: as measured, and as the model believes; ``None`` where it cannot be told."""

    value: float
    standard_error: float | None
    model_mean: float | None = None
    model_sd: float | None = None


@dataclass(frozen=True)
class FrontRow:
    """A layout on the front; ``estimates`` of every known objective, the searched ones with a model."""

    trial: int
    layout: CanonicalLayout
    estimates: Mapping[str, Estimate]


def load_study(run: RunFolder) -> Study:
    """The run's study as its journal stands now.

    Raises:
        MilpError: there is no study in the run, or its journal is damaged.
    """
    events = read_events(run.journal)
    state = replay(events, run.journal)
    if state.header is None:
        raise MilpError(f"{run.journal} holds no study: run `milp-ray search` first")
    space = dict(state.header["space"])
    for name in ("ranks", "factors", "fixed_layers"):
        space[name] = None if space[name] is None else tuple(space[name])
    return Study(tuple(events), state, study_result(state), run.config().search, SearchSpace(**space))


def study_status(study: Study) -> StudyStatus:
    """How far the study is and what it has cost, as of its last event."""
    lives, parts = trial_lives(study.events), sessions(study.events)
    counts = dict.fromkeys(("completed", "stopped", "failed", "running", "waiting"), 0)
    for life in lives:
        counts[life.status] += 1
    work, proposed = trial_seconds(lives), proposals(study.events)
    blocks = [part.max_block_seconds for part in parts if part.max_block_seconds is not None]
    idle = idle_share(study.events, study.n_trials)
    told = (trial.metrics.get("startup_seconds") for trial in study.state.completed)
    startups = [seconds for seconds in told if seconds is not None]
    return StudyStatus(
        objectives=study.result.objectives,
        trials=counts,
        n_trials=study.n_trials,
        finished=study.result.finished,
        last_event=str(study.events[-1]["time"]),
        hypervolume=study.result.hypervolume,
        n_front=len(study.result.front),
        best=_best(study),
        n_sessions=len(parts),
        n_slots=parts[-1].n_slots if parts else None,
        n_processes=parts[-1].n_processes if parts else None,
        seconds=working_seconds(study.events, event_times(study.events)[-1:])[0],
        seconds_left=_seconds_left(study, lives, idle or 0.0),
        trial_seconds=work,
        cpu_seconds=work * study.section.cpus_per_trial,
        gpu_seconds=work * study.section.held_gpus,
        idle_share=idle,
        utilisation=utilisation(study.events),
        max_block_seconds=max(blocks) if blocks else None,
        n_batches=proposed.n_batches if proposed else 0,
        proposal_seconds=proposed.seconds if proposed else None,
        longest_proposal_seconds=proposed.longest_seconds if proposed else None,
        startup_seconds=fmean(startups) if startups else None,
        longest_startup_seconds=max(startups, default=None),
    )


def front_rows(study: Study, analysis: Beliefs | None = None) -> list[FrontRow]:
    """The front, the first objective's best on top.

    Standard errors are those that tell layouts apart on the same users
    (:func:`milp_ray.search.observations.standard_errors`).

    Args:
        study: whose front.
        analysis: of the study's front, its layouts in the order of ``study.result.front``.
    """
    objectives, completed = study.result.objectives, study.state.completed
    if not completed:
        return []
    names = [name for name in KNOWN_OBJECTIVES if all(name in known_values(trial) for trial in completed)]
    errors = standard_errors(observations(completed, names), names) or {}
    rows = []
    for place, point in enumerate(study.result.front):
        estimates = {
            name: Estimate(
                point.values[name],
                errors.get(name),
                analysis.mean[name][place] if analysis and name in objectives else None,
                analysis.sd[name][place] if analysis and name in objectives else None,
            )
            for name in names
        }
        rows.append(FrontRow(point.index, point.layout, estimates))
    first = KNOWN_OBJECTIVES[objectives[0]]
    return sorted(rows, key=lambda row: first.sign * row.estimates[first.name].value)


def hypervolume_over_time(study: Study) -> list[tuple[float, float]]:
    """(Seconds that the study had worked, hypervolume) after each completed trial, as they ended."""
    result = study.result
    if result.reference is None:
        return []
    signs = [KNOWN_OBJECTIVES[name].sign for name in result.objectives]
    ended = sorted(
        (life.ended, life.index)
        for life in trial_lives(study.events)
        if life.status == "completed" and life.ended is not None
    )
    trials = [study.state.trials[index] for _, index in ended]
    values = [[float(trial.metrics[name]) for name in result.objectives] for trial in trials]
    seconds = working_seconds(study.events, [time for time, _ in ended])
    return list(zip(seconds, hypervolume_history(values, signs, result.reference), strict=True))


def layer_importance(analysis: Beliefs, objective: str) -> list[float]:
    """The importance of each layer for an objective, from the input to the output."""
    found = analysis.importance[objective]
    names = [name for name in analysis.factors if name.startswith(_LAYER)]
    return [found[name][0] for name in sorted(names, key=lambda name: int(name.removeprefix(_LAYER)))]


def analysis_of(study: Study) -> Beliefs:
    """What the surrogate makes of the study; its layouts are those of ``study.result.front``, in that order.

    Raises:
        NoAnalysis: there are too few measured trials, or the model cannot be fitted to them.
    """
    if study.result.n_completed < MIN_TRIALS:
        raise NoAnalysis(
            f"{study.result.n_completed} trials have values: the model says which layers matter from "
            f"{MIN_TRIALS} of them on"
        )
    from milp_ray.search.analysis import analyse
    from milp_ray.search.saas import LinAlgError

    try:
        found = analyse(
            study.space,
            study.result.objectives,
            study.section.surrogate,
            observations(study.state.trials, study.result.objectives, study.state.rungs),
            [point.layout for point in study.result.front],
            int((study.state.header or {})["seed"]),
        )
    except LinAlgError as error:
        raise NoAnalysis(f"the model could not be fitted ({type(error).__name__})") from error
    return Beliefs(
        objectives=tuple(one.objective for one in found.objectives),
        factors=tuple(importance.factor for importance in found.objectives[0].importances),
        importance={
            one.objective: {i.factor: (i.total, i.low, i.high) for i in one.importances}
            for one in found.objectives
        },
        unexplained={one.objective: one.unexplained for one in found.objectives},
        mean={one.objective: [p.mean for p in one.predictions] for one in found.objectives},
        sd={one.objective: [p.sd for p in one.predictions] for one in found.objectives},
    )


def _best(study: Study) -> dict[str, BestValue]:
    best: dict[str, BestValue] = {}
    for name in study.result.objectives:
        sign = KNOWN_OBJECTIVES[name].sign
        ranked = sorted(study.state.completed, key=lambda trial: (sign * trial.metrics[name], trial.index))
        if ranked:
            best[name] = BestValue(float(ranked[0].metrics[name]), ranked[0].index, ranked[0].layout.key)
    return best


def _seconds_left(study: Study, lives: Sequence[TrialLife], idle: float) -> float | None:
    """The mean time from a trial's start to its end, for every trial to come, over slots that are not idle.

    A running trial needs what is left of the mean, and the search at least as long as the longest of those.
    """
    if study.result.finished is not None:
        return 0.0
    spans = [
        life.ended - life.started for life in lives if life.ended is not None and life.started is not None
    ]
    if not spans:
        return None
    now = max(life.ended or life.started or life.suggested for life in lives)
    mean = sum(spans) / len(spans)
    running = [
        max(0.0, mean - (now - life.started))
        for life in lives
        if life.status == "running" and life.started is not None
    ]
    n_ended = sum(life.ended is not None for life in lives)
    work = mean * (study.n_trials - n_ended - len(running)) + sum(running)
    parts = sessions(study.events)
    n_slots = parts[-1].n_slots if parts else most_at_once(lives, now)
    return max([work / (n_slots * max(1.0 - idle, 0.1)), *running])
