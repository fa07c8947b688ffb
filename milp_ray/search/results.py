"""What a study found: front, hypervolume, and a table of its trials, all of it rebuilt from the journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from milp_ray.atomic_files import replacing
from milp_ray.objectives import KNOWN_OBJECTIVES
from milp_ray.search.choice import FrontPoint
from milp_ray.search.front import Floats, hypervolume, hypervolume_history, pareto_front, reference_point
from milp_ray.search.journal import StudyState, TrialRecord, read_study


@dataclass(frozen=True)
class StudyResult:
    """A study, finished or not.

    ``reference`` is the corner of the hypervolume (:func:`milp_ray.search.front.reference_point` of the
    initial trials; the worst number of parameters is that of the space's largest adapter), ``history`` the
    hypervolume after each trial in the order of their index.
    """

    objectives: tuple[str, ...]
    trials: tuple[TrialRecord, ...]
    front: tuple[FrontPoint, ...]
    reference: tuple[float, ...] | None
    history: tuple[float, ...]
    finished: str | None  # why, once it is finished

    @property
    def n_failed(self) -> int:
        """Trials that failed for good."""
        return sum(trial.status == "failed" for trial in self.trials)

    @property
    def n_stopped(self) -> int:
        """Trials that were stopped early."""
        return sum(trial.status == "stopped" for trial in self.trials)

    @property
    def n_completed(self) -> int:
        """Trials with values."""
        return sum(trial.status == "completed" for trial in self.trials)

    @property
    def hypervolume(self) -> float | None:
        """Of the front; ``None`` before the first trial has ended."""
        return self.history[-1] if self.history and self.reference is not None else None

    @property
    def exhausted(self) -> bool:
        """Whether the study ended because no layout was left."""
        return self.finished is not None and "every layout" in self.finished


def study_result(state: StudyState) -> StudyResult:
    """Front and hypervolume of the trials so far.

    Raises:
        ValueError: the study has not begun (its journal has no header).
    """
    if state.header is None:
        raise ValueError("a study without a header has no objectives")
    objectives: list[str] = state.header["objectives"]
    signs = [KNOWN_OBJECTIVES[name].sign for name in objectives]
    completed = state.completed
    values = {trial.index: [float(trial.metrics[name]) for name in objectives] for trial in completed}
    reference = reference_corner(state.header, completed)
    indices = pareto_front(list(values.values()), signs) if values else []
    history = (
        hypervolume_history([values.get(trial.index) for trial in state.trials], signs, reference)
        if reference is not None
        else []
    )
    return StudyResult(
        objectives=tuple(objectives),
        trials=tuple(state.trials),
        front=tuple(_front_point(completed[index]) for index in indices),
        reference=reference,
        history=tuple(history),
        finished=state.finished,
    )


def reference_corner(header: Mapping[str, Any], trials: Sequence[TrialRecord]) -> tuple[float, ...] | None:
    """The corner of the hypervolume that ``trials`` set, in the units of the objectives.

    Only the initial ones count, so that it stays the same once they have ended, unless none of them has
    values. ``None``: no trial has values.
    """
    objectives: Sequence[str] = header["objectives"]
    completed = [trial for trial in trials if trial.status == "completed"]
    setting = [trial for trial in completed if trial.index < int(header["n_initial"])] or completed
    if not setting:
        return None
    values = [[float(trial.metrics[name]) for name in objectives] for trial in setting]
    worst = [header.get("worst", {}).get(name) for name in objectives]
    signs = [KNOWN_OBJECTIVES[name].sign for name in objectives]
    return tuple(float(x) for x in reference_point(values, signs, worst))


class RunningHypervolume:
    """The hypervolume of a study while its trials end, and the best value of each objective.

    Only the front is kept, each trial is looked at once, and only one that belongs to the front costs
    anything: measuring all of them anew at every end would hold up Tune's controller the longer the more
    trials there are.
    """

    def __init__(self) -> None:
        self._n_seen = 0  # of the trials that have ended, in the order of their ends
        self._front: list[Floats] = []  # values times signs
        self._corner: tuple[float, ...] | None = None
        self._is_set = False  # by initial trials: others do not move the corner any more
        self._volume: float | None = None

    def of(self, state: StudyState) -> float | None:
        """Of the trials so far; ``None`` before the first one has values.

        ``state`` is of the same study at every call.
        """
        new = [state.trials[index] for index in state.ended[self._n_seen :]]
        self._n_seen += len(new)
        completed = [trial for trial in new if trial.status == "completed"]
        if not completed or state.header is None:
            return self._volume
        names: Sequence[str] = state.header["objectives"]
        signs = _signs(names)
        is_same = True
        n_initial = int(state.header["n_initial"])
        if not self._is_set or any(trial.index < n_initial for trial in completed):
            corner = reference_corner(state.header, state.completed)
            is_same, self._corner = corner == self._corner, corner
            self._is_set |= any(trial.index < n_initial for trial in completed)
        for trial in completed:
            is_same &= not self._add(np.array([float(trial.metrics[name]) for name in names]) * signs)
        if not is_same and self._corner is not None:
            self._volume = hypervolume(np.stack(self._front) * signs, signs, self._corner)
        return self._volume

    def best(self, state: StudyState) -> dict[str, float]:
        """The best value of each objective, of the trials that :meth:`of` has seen; each is on the front."""
        if not self._front or state.header is None:
            return {}
        names: Sequence[str] = state.header["objectives"]
        values = np.stack(self._front).min(axis=0) * _signs(names)
        return dict(zip(names, values.tolist(), strict=True))

    def _add(self, values: Floats) -> bool:
        """Whether a point, to be minimised, is on the front; the points that it dominates no longer are."""
        if any((other <= values).all() for other in self._front):
            return False
        self._front = [other for other in self._front if not (values <= other).all()] + [values]
        return True


def _signs(objectives: Sequence[str]) -> Floats:
    return np.array([KNOWN_OBJECTIVES[name].sign for name in objectives], dtype=float)


def load_result(journal: Path) -> StudyResult:
    """The study whose journal is at ``journal``.

    Raises:
        MilpError: there is no study there, or the journal is damaged.
    """
    from milp_ray.errors import MilpError

    state = read_study(journal)
    if state.header is None:
        raise MilpError(f"{journal} holds no study: run `milp-ray search` first")
    return study_result(state)


def trial_rows(result: StudyResult) -> list[dict[str, Any]]:
    """One flat row a trial: index, layout, raw factors, values, SEMs and extras, hypervolume so far."""
    on_front = {point.index for point in result.front}
    rows = []
    for position, trial in enumerate(result.trials):
        raw = dict(trial.raw)
        bits = [bool(raw[name]) for name in sorted((n for n in raw if n.startswith("layer_")), key=_layer)]
        rows.append(
            {
                "index": trial.index,
                "batch": trial.batch,
                "generator": trial.generator,
                "status": trial.status,
                "reason": trial.reason,
                "key": trial.layout.key,
                "mask": "".join("1" if bit else "0" for bit in trial.layout.mask),
                "rank": trial.layout.rank,
                "n_loras": len(trial.layout.layers),
                "raw_layers": "".join("1" if bit else "0" for bit in bits) or None,
                "raw_n_loras": raw.get("n_loras"),
                "raw_rank": raw.get("rank"),
                **{name: trial.metrics.get(name) for name in METRICS},
                "hypervolume": result.history[position] if result.history else None,
                "on_front": trial.index in on_front,
                "ended": trial.time,
            }
        )
    return rows


def write_trials(result: StudyResult, path: Path) -> None:
    """Write :func:`trial_rows` as Parquet, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, getattr(pa, kind)()) for name, kind in COLUMNS.items()])
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(trial_rows(result), schema=schema), temporary)


# What a trial reports beside the values by user, in the order of the table.
METRICS: dict[str, str] = {
    "validation_loss": "float64",
    "validation_loss_sem": "float64",
    "rouge_l": "float64",
    "rouge_l_sem": "float64",
    "adapter_parameters": "int64",
    "rouge_1": "float64",
    "rouge_1_sem": "float64",
    "persona_f1": "float64",
    "persona_f1_sem": "float64",
    "seconds": "float64",
    "tokens": "int64",
    "steps": "int64",
    "peak_rss_mib": "float64",
    "peak_gpu_mib": "float64",
    "startup_seconds": "float64",
}

# The table's columns and their Arrow types.
COLUMNS: dict[str, str] = {
    "index": "int64",
    "batch": "int64",
    "generator": "string",
    "status": "string",
    "reason": "string",
    "key": "string",
    "mask": "string",
    "rank": "int64",
    "n_loras": "int64",
    "raw_layers": "string",
    "raw_n_loras": "int64",
    "raw_rank": "int64",
    **METRICS,
    "hypervolume": "float64",
    "on_front": "bool_",
    "ended": "string",
}


def _layer(name: str) -> int:
    return int(name.removeprefix("layer_"))


def known_values(trial: TrialRecord) -> dict[str, float]:
    """What a trial was worth by objective, searched for or not; one that was no number is left out."""
    found = {name: trial.metrics.get(name) for name in KNOWN_OBJECTIVES}
    return {name: float(value) for name, value in found.items() if value is not None}


def _front_point(trial: TrialRecord) -> FrontPoint:
    return FrontPoint(trial.index, trial.layout, known_values(trial))
