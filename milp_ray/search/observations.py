"""Ended trials as the surrogate is told of them. Pure NumPy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from milp_ray.memory.layout import CanonicalLayout
    from milp_ray.search.journal import TrialRecord
    from milp_ray.search.rungs import RungRecord


@dataclass(frozen=True)
class Observation:
    """One ended trial: ``values`` by objective, ``None`` where it failed or was stopped early.

    ``per_user`` are in the users' order. ``rungs`` are the objectives that were known at each rung that the
    trial reached, by the rung's epoch: values of partial training.
    """

    index: int
    raw: Mapping[str, Any]
    layout: CanonicalLayout
    values: Mapping[str, float] | None
    per_user: Mapping[str, Sequence[float]] = field(default_factory=dict)
    rungs: Mapping[int, Mapping[str, float]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The canonical key of the layout."""
        return self.layout.key


def observations(
    trials: Sequence[TrialRecord], objectives: Sequence[str], rungs: Iterable[RungRecord] = ()
) -> list[Observation]:
    """The ended ones of ``trials``, in the order of their index, with what they were worth at ``rungs``."""
    at_rungs: dict[int, dict[int, Mapping[str, float]]] = defaultdict(dict)
    for record in rungs:
        at_rungs[record.trial][record.epoch] = record.by_objective(objectives)
    return [
        Observation(
            index=trial.index,
            raw=trial.raw,
            layout=trial.layout,
            values={name: float(trial.metrics[name]) for name in objectives}
            if trial.status == "completed"
            else None,
            per_user=trial.metrics.get("per_user", {}),
            rungs=at_rungs.get(trial.index, {}),
        )
        for trial in sorted(trials, key=lambda trial: trial.index)
        if trial.has_ended
    ]


def standard_errors(measured: Sequence[Observation], objectives: Sequence[str]) -> dict[str, float] | None:
    """Standard error of a trial's mean over the probe users, by objective; the same for every trial.

    All trials measure the same users, so that one user being harder than another moves all trials alike and
    is no noise between layouts. What is left once every user's and every trial's mean are taken out is the
    interaction of user and layout, training noise included; pooled over trials, as a handful of users say
    too little about a single one. An objective without values by user (adapter parameters) is exact: 0.

    ``None``, for every objective, where it cannot be told: one probe user, or a single trial. The surrogate
    then infers the noise.
    """
    errors: dict[str, float] = {}
    for name in objectives:
        if any(name not in trial.per_user for trial in measured):
            errors[name] = 0.0
            continue
        table = np.asarray([trial.per_user[name] for trial in measured], dtype=float)
        table = table[:, ~np.isnan(table).all(axis=0)]  # a user who was forgotten has no values any more
        n_trials, n_users = table.shape
        if n_trials < 2 or n_users < 2:
            return None
        rest = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
        variance = float((rest**2).sum()) / ((n_trials - 1) * (n_users - 1))
        errors[name] = float(np.sqrt(variance / n_users))
    return errors
