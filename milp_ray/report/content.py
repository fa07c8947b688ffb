"""What a report tells, in plain types: gathered from a run folder, without any text of a user.

A run that has only some of its stages behind it has a report of those.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milp_ray.report.study_figures import Trial

if TYPE_CHECKING:
    from milp_ray.config import Config
    from milp_ray.rundir import RunFolder
    from milp_ray.search.insight import Beliefs, FrontRow, Study, StudyStatus

_COSTS = (
    "seconds",
    "trial_seconds",
    "cpu_seconds",
    "gpu_seconds",
    "idle_share",
    "utilisation",
    "max_block_seconds",
    "n_batches",
    "proposal_seconds",
    "longest_proposal_seconds",
)


@dataclass(frozen=True)
class StudyContent:
    """A search: its completed trials, what they add up to, what they cost, and what its model believes."""

    trials: tuple[Trial, ...]  # completed ones, in order
    hypervolumes: tuple[float, ...]  # after each of them
    hypervolumes_by_time: tuple[
        tuple[float, float], ...
    ]  # (seconds, hypervolume), in the order of their ends
    n_initial: int  # of them
    status: StudyStatus
    front: tuple[FrontRow, ...]
    analysis: Beliefs | None = None
    no_analysis: str = ""  # why there is none
    chosen_trial: int | None = None

    @property
    def n_failed(self) -> int:
        """Trials that failed."""
        return self.status.trials["failed"]

    @property
    def n_stopped(self) -> int:
        """Trials that were stopped early."""
        return self.status.trials["stopped"]

    @property
    def n_ended(self) -> int:
        """Trials that are over."""
        return self.status.n_ended

    @property
    def chosen_mask(self) -> tuple[bool, ...] | None:
        """The layers of the chosen layout."""
        return next((trial.mask for trial in self.trials if trial.chosen), None)


@dataclass(frozen=True)
class ReportContent:
    """Everything that the page shows."""

    name: str
    study: StudyContent | None = None
    chosen: Mapping[str, Any] | None = None  # what chosen.yaml holds
    comparison: Mapping[str, Any] | None = None
    leakage: Mapping[str, Any] | None = None  # what leakage.json holds
    ability: Mapping[str, Any] | None = None  # as milp_ray.evaluation.ability gives it
    win_rates: Sequence[Mapping[str, Any]] = ()  # as milp_ray.evaluation.win_rate gives them
    layouts: Mapping[str, Any] | None = None  # of the last batch, where users need not have the same one
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_rss_mib: float | None = None
    failures: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # stage → reason → users
    versions: Mapping[str, Any] = field(default_factory=dict)
    config_yaml: str = ""

    @property
    def n_kept_versions(self) -> int:
        """Users scored with an adapter older than their data, because the guard refused its update."""
        return int((self.versions.get("evaluate") or {}).get("n_kept_versions", 0))


def read_content(run: RunFolder) -> ReportContent:
    """Gather a run's content from its files."""
    import yaml

    config = run.config()
    chosen = yaml.safe_load(run.chosen_file.read_text("utf-8")) if run.chosen_file.is_file() else None
    study = comparison = None
    if run.journal.is_file():
        from milp_ray.search.insight import analysis_of, load_study

        study = study_content(load_study(run), chosen, analysis_of)
    if run.scores_file.is_file():
        from milp_ray.evaluation.compare import compare
        from milp_ray.evaluation.scores import read_scores

        comparison = compare(read_scores(run.scores_file), config.evaluation, config.seed)
    ability = None
    if run.ability_file.is_file():
        from milp_ray.evaluation.ability import ability_of

        ability = ability_of(run.ability_file, config)
    win_rates = []
    if run.judgements_file.is_file():
        from milp_ray.evaluation.judgements import read_judgements
        from milp_ray.evaluation.win_rate import win_rates as rates_of

        win_rates = rates_of(read_judgements(run.judgements_file), _draws(config))
    from milp_ray.evaluation.stage import FAILED_FILE

    failed_files = {"personalize": run.failed_file, "evaluate": run.path / FAILED_FILE}
    failures = {stage: failed_reasons(path) for stage, path in failed_files.items()}
    versions = json.loads(run.versions_file.read_text("utf-8")) if run.versions_file.is_file() else {}
    return ReportContent(
        name=config.name,
        study=study,
        chosen=chosen,
        comparison=comparison,
        leakage=json.loads(run.leakage_file.read_text("utf-8")) if run.leakage_file.is_file() else None,
        ability=ability,
        win_rates=win_rates,
        layouts=(versions.get("personalize") or {}).get("layouts"),
        seconds=run.seconds(),
        peak_rss_mib=run.peak_memory() or None,
        failures={stage: reasons for stage, reasons in failures.items() if reasons},
        versions=versions,
        config_yaml=run.config_file.read_text("utf-8"),
    )


def _draws(config: Config) -> dict[str, Any]:
    section = config.evaluation
    return {"n_bootstrap": section.n_bootstrap, "confidence": section.confidence, "seed": config.seed}


def study_content(
    study: Study, chosen: Mapping[str, Any] | None, analyse: Callable[[Study], Beliefs]
) -> StudyContent:
    """A study as figures and tables want it; trials without values are counted and left out.

    Args:
        study: what the journal tells.
        chosen: what ``chosen.yaml`` holds.
        analyse: as :func:`milp_ray.search.insight.analysis_of`; where it refuses, the content says why.
    """
    from milp_ray.search.insight import NoAnalysis, front_rows, hypervolume_over_time, study_status
    from milp_ray.search.results import known_values

    result, analysis, no_analysis = study.result, None, ""
    try:
        analysis = analyse(study)
    except NoAnalysis as error:
        no_analysis = str(error)
    front = {row.trial: row for row in front_rows(study, analysis)}
    chosen_trial = chosen.get("trial") if chosen else None
    trials, hypervolumes = [], []
    for position, record in enumerate(result.trials):
        if record.status != "completed":
            continue
        trials.append(
            Trial(
                index=record.index,
                generator=record.generator,
                mask=record.layout.mask,
                rank=record.layout.rank,
                values=known_values(record),
                on_front=record.index in front,
                chosen=record.index == chosen_trial,
                model=_believed(front.get(record.index)),
            )
        )
        if result.history:
            hypervolumes.append(result.history[position])
    return StudyContent(
        trials=tuple(trials),
        hypervolumes=tuple(hypervolumes),
        hypervolumes_by_time=tuple(hypervolume_over_time(study)),
        n_initial=sum(trial.index < study.section.n_initial for trial in trials),
        status=study_status(study),
        front=tuple(front.values()),
        analysis=analysis,
        no_analysis=no_analysis,
        chosen_trial=chosen_trial,
    )


def _point(row: FrontRow) -> dict[str, Any]:
    values = {name: estimate.value for name, estimate in row.estimates.items()}
    return {"trial": row.trial, "key": row.layout.key, "layout": row.layout.to_dict(), **values}


def _importance(analysis: Beliefs) -> dict[str, dict[str, list[float]]]:
    """By objective and factor: total Sobol' index (mean, low, high)."""
    return {
        name: {factor: list(values) for factor, values in analysis.importance[name].items()}
        for name in analysis.objectives
    }


def _believed(row: FrontRow | None) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of the model by objective."""
    estimates = row.estimates if row else {}
    return {
        name: (estimate.model_mean, estimate.model_sd)
        for name, estimate in estimates.items()
        if estimate.model_mean is not None and estimate.model_sd is not None
    }


def failed_reasons(path: Path) -> dict[str, int]:
    """How many users failed for each reason, the most frequent first; none where there is no file.

    Reasons are without what differs by user: the report goes to more people than the run's own files.
    """
    if not path.is_file():
        return {}
    from milp_ray.personalize.tally import count_reason

    reasons: Counter[str] = Counter()
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                count_reason(reasons, str(json.loads(line).get("reason")))
    return dict(reasons.most_common())


def summary_of(content: ReportContent) -> dict[str, Any]:
    """The content of ``summary.json``: a run's results for programs.

    Stages that were not run have ``null``. ``scores`` and ``differences`` are as
    :func:`milp_ray.evaluation.compare.compare` gives them.
    """
    study, comparison = content.study, content.comparison
    return {
        "name": content.name,
        "n_trials": study.n_ended if study else None,
        "n_failed_trials": study.n_failed if study else None,
        "n_stopped_trials": study.n_stopped if study else None,
        "objectives": list(study.status.objectives) if study else None,
        "hypervolume": study.status.hypervolume if study else None,
        "front": [_point(row) for row in study.front] if study else None,
        "importance": _importance(study.analysis) if study and study.analysis else None,
        "unexplained": {name: list(values) for name, values in study.analysis.unexplained.items()}
        if study and study.analysis
        else None,
        "search_cost": {name: getattr(study.status, name) for name in _COSTS} if study else None,
        "chosen": dict(content.chosen) if content.chosen else None,
        "n_users": comparison["n_users"] if comparison else None,
        "n_users_history_fits": comparison["n_users_fits"] if comparison else None,
        "n_users_history_long": comparison["n_users_long"] if comparison else None,
        "scores": comparison["scores"] if comparison else None,
        "differences": comparison["differences"] if comparison else None,
        "together": comparison["together"] if comparison else None,
        "confidence": comparison["confidence"] if comparison else None,
        "personalize": content.versions.get("personalize"),
        "leakage": dict(content.leakage) if content.leakage else None,
        "ability": dict(content.ability) if content.ability else None,
        "win_rates": [dict(rate) for rate in content.win_rates] or None,
        "n_kept_versions": content.n_kept_versions if comparison else None,
        "failed_users": {stage: sum(reasons.values()) for stage, reasons in content.failures.items()},
        "seconds": dict(content.seconds),
        "peak_rss_mib": content.peak_rss_mib,
    }
