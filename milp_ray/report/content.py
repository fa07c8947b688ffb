"""What a report tells, in plain types: gathered from a run folder, without any text of a user.

A run that has only some of its stages behind it has a report of those.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milp_ray.objectives import KNOWN_OBJECTIVES
from milp_ray.report.study_figures import Trial

if TYPE_CHECKING:
    from milp_ray.rundir import RunFolder
    from milp_ray.search.results import StudyResult


@dataclass(frozen=True)
class StudyContent:
    """A search: its finished trials, and what they add up to."""

    objectives: tuple[str, ...]
    trials: tuple[Trial, ...]  # completed ones, in order
    hypervolumes: tuple[float, ...]  # after each of them
    n_initial: int  # of them
    n_failed: int
    hypervolume: float | None
    front: tuple[Mapping[str, Any], ...]  # {trial, layout, key, <objective>: value, …}


@dataclass(frozen=True)
class ReportContent:
    """Everything that the page shows."""

    name: str
    study: StudyContent | None = None
    chosen: Mapping[str, Any] | None = None  # what chosen.yaml holds
    comparison: Mapping[str, Any] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_rss_mib: float | None = None
    failures: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # stage → reason → users
    versions: Mapping[str, Any] = field(default_factory=dict)
    config_yaml: str = ""


def read_content(run: RunFolder) -> ReportContent:
    """Gather a run's content from its files."""
    import yaml

    config = run.config()
    chosen = yaml.safe_load(run.chosen_file.read_text("utf-8")) if run.chosen_file.is_file() else None
    study = comparison = None
    if run.journal.is_file():
        from milp_ray.search.results import load_result

        study = study_content(load_result(run.journal), config.search.n_initial, chosen)
    if run.scores_file.is_file():
        from milp_ray.evaluation.compare import compare
        from milp_ray.evaluation.scores import read_scores

        comparison = compare(read_scores(run.scores_file), config.evaluation, config.seed)
    from milp_ray.evaluation.stage import FAILED_FILE

    failed_files = {"personalize": run.failed_file, "evaluate": run.path / FAILED_FILE}
    failures = {stage: failed_reasons(path) for stage, path in failed_files.items()}
    return ReportContent(
        name=config.name,
        study=study,
        chosen=chosen,
        comparison=comparison,
        seconds=run.seconds(),
        peak_rss_mib=run.peak_memory() or None,
        failures={stage: reasons for stage, reasons in failures.items() if reasons},
        versions=json.loads(run.versions_file.read_text("utf-8")) if run.versions_file.is_file() else {},
        config_yaml=run.config_file.read_text("utf-8"),
    )


def study_content(result: StudyResult, n_initial: int, chosen: Mapping[str, Any] | None) -> StudyContent:
    """A study as figures and tables want it; trials without values are counted and left out."""
    on_front = {point.index for point in result.front}
    chosen_trial = chosen.get("trial") if chosen else None
    trials, hypervolumes, n_early = [], [], 0
    for position, record in enumerate(result.trials):
        if record.status != "completed":
            continue
        trials.append(
            Trial(
                index=record.index,
                generator=record.generator,
                mask=record.layout.mask,
                rank=record.layout.rank,
                values={n: float(record.metrics[n]) for n in KNOWN_OBJECTIVES if n in record.metrics},
                on_front=record.index in on_front,
                chosen=record.index == chosen_trial,
            )
        )
        if result.history:
            hypervolumes.append(result.history[position])
        n_early += record.index < n_initial
    return StudyContent(
        objectives=result.objectives,
        trials=tuple(trials),
        hypervolumes=tuple(hypervolumes),
        n_initial=n_early,
        n_failed=result.n_failed,
        hypervolume=result.hypervolume,
        front=tuple(
            {"trial": p.index, "key": p.layout.key, "layout": p.layout.to_dict(), **dict(p.values)}
            for p in result.front
        ),
    )


def failed_reasons(path: Path) -> dict[str, int]:
    """How many users failed for each reason, the most frequent first; none where there is no file."""
    if not path.is_file():
        return {}
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    return dict(Counter(str(line.get("reason")) for line in lines).most_common())


def summary_of(content: ReportContent) -> dict[str, Any]:
    """The content of ``summary.json``: a run's results for programs.

    Stages that were not run have ``null``. ``scores`` and ``differences`` are as
    :func:`milp_ray.evaluation.compare.compare` gives them.
    """
    study, comparison = content.study, content.comparison
    return {
        "name": content.name,
        "n_trials": len(study.trials) + study.n_failed if study else None,
        "n_failed_trials": study.n_failed if study else None,
        "objectives": list(study.objectives) if study else None,
        "hypervolume": study.hypervolume if study else None,
        "front": [dict(point) for point in study.front] if study else None,
        "chosen": dict(content.chosen) if content.chosen else None,
        "n_users": comparison["n_users"] if comparison else None,
        "n_users_history_fits": comparison["n_users_fits"] if comparison else None,
        "n_users_history_long": comparison["n_users_long"] if comparison else None,
        "scores": comparison["scores"] if comparison else None,
        "differences": comparison["differences"] if comparison else None,
        "confidence": comparison["confidence"] if comparison else None,
        "failed_users": {stage: sum(reasons.values()) for stage, reasons in content.failures.items()},
        "seconds": dict(content.seconds),
        "peak_rss_mib": content.peak_rss_mib,
    }
