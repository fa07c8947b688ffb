"""Rungs: the epochs at which trials are compared, and the rule that says which of them go on. Pure NumPy.

Asynchronous successive halving for several objectives (MO-ASHA: Schmucker, Donini, Zafar, Salinas and
Archambeau 2021, "Multi-objective Asynchronous Successive Halving", arXiv:2106.12639). A trial that reaches a
rung is ranked among all that have reached it so far, by non-dominated sorting and, inside a front, by an
epsilon-net; it goes on when it is in the best 1/η of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from milp_ray.errors import MilpError
from milp_ray.objectives import ADAPTER_PARAMETERS, VALIDATION_LOSS
from milp_ray.search.front import Floats, fronts

if TYPE_CHECKING:
    from milp_ray.config.search import EarlyStoppingSection

RUNG = "rung"  # the key of a result that is a rung's and not a trial's


def rung_epochs(section: EarlyStoppingSection, n_epochs: int) -> tuple[int, ...]:
    """The epochs after which a trial of ``n_epochs`` epochs is compared: the first ones of first · η^k.

    ``n_epochs`` are those of all its stages (:func:`milp_ray.training.train.planned_epochs`). Empty where
    early stopping is off.

    Raises:
        MilpError: not even the first rung is below the trial's end.
    """
    if not section.enabled:
        return ()
    if section.first_rung >= n_epochs:
        raise MilpError(
            f"search.early_stopping.first_rung is {section.first_rung}, but a trial trains for {n_epochs} "
            f"epoch{'s' if n_epochs != 1 else ''} in all and rungs lie below that: lower it, raise "
            "search.trial_epochs, or set search.early_stopping.enabled to false"
        )
    epochs = [section.first_rung]
    while len(epochs) < section.n_rungs and epochs[-1] * section.eta < n_epochs:
        epochs.append(epochs[-1] * section.eta)
    return tuple(epochs)


@dataclass(frozen=True)
class RungRecord:
    """What a trial was worth at a rung, while its training went on or ended there.

    ``rung`` counts from 0; ``epoch`` is where the rung lies. The names of all values of partial training end
    in ``_at_rung``, so that none is taken for a final one: ``validation_loss_at_rung`` is the mean over the
    probe users, ``…_sem`` its standard error (``None`` for one user), ``…_by_user`` the users' own; seconds,
    tokens and steps are those of all users since the trial's beginning.
    """

    trial: int
    rung: int
    epoch: int
    adapter_parameters: int
    validation_loss_at_rung: float
    validation_loss_at_rung_sem: float | None
    validation_loss_at_rung_by_user: tuple[float, ...]
    seconds_at_rung: float
    tokens_at_rung: int
    steps_at_rung: int

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **more: Any) -> RungRecord:
        """From what :meth:`to_dict` gave, or from a trial's result and ``trial=…``; other keys are ignored.

        Raises:
            KeyError: a value is missing.
        """
        merged = {**values, **more}
        chosen = {field.name: merged[field.name] for field in fields(cls)}
        by_user = tuple(chosen.pop("validation_loss_at_rung_by_user"))
        return cls(**chosen, validation_loss_at_rung_by_user=by_user)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "validation_loss_at_rung_by_user": list(self.validation_loss_at_rung_by_user)}

    def objectives(self, names: Sequence[str]) -> tuple[float, ...]:
        """What is known at a rung of a study's objectives ``names``, all to be minimised.

        The validation loss comes first and stands for everything that only a finished adapter shows (ROUGE-L
        needs answers, which take longer than the training up to here); the adapter's parameters follow where
        they are an objective.
        """
        values = [self.validation_loss_at_rung]
        if ADAPTER_PARAMETERS.name in names:
            values.append(float(self.adapter_parameters))
        return tuple(values)

    def by_objective(self, names: Sequence[str]) -> dict[str, float]:
        """Those of a study's objectives ``names`` that are known at a rung, as they are there."""
        known = {
            VALIDATION_LOSS.name: self.validation_loss_at_rung,
            ADAPTER_PARAMETERS.name: float(self.adapter_parameters),
        }
        return {name: value for name, value in known.items() if name in names}


def promoted(records: Mapping[int, Sequence[float]], candidate: int, eta: float) -> bool:
    """Whether ``candidate`` is among the best ⌈n/η⌉ of the n ``records``, itself included.

    Args:
        records: trial index → values, all to be minimised, finite, the same number of them for each.
        candidate: one of the trial indices.
        eta: at least 1; with 1 everything is promoted.

    Raises:
        ValueError: a value is not finite, ``candidate`` has no record, or ``eta`` is below 1.
    """
    if not eta >= 1.0:
        raise ValueError(f"eta {eta}: a rung keeps one in eta trials, so it is at least 1")
    if candidate not in records:
        raise ValueError(f"trial {candidate} has no record among those of {sorted(records)}")
    n_kept = math.ceil(len(records) / eta)
    return candidate in itertools.islice(ranking(records), n_kept)


def ranking(records: Mapping[int, Sequence[float]]) -> Iterator[int]:
    """Trial indices, best first: front after front, each in the order of its epsilon-net.

    The order of ``records`` does not matter: ties go to the lower trial index.

    Args:
        records: as in :func:`promoted`.
    """
    if not records:
        return
    trials = sorted(records)
    values = np.array([records[index] for index in trials], dtype=float)
    for front in fronts(values, np.ones(values.shape[1])):
        yield from (trials[front[i]] for i in epsilon_net(values[front]))


def epsilon_net(values: Floats) -> list[int]:
    """An order of mutually non-dominated points whose every beginning is spread over all of them.

    It starts with the best point of the first objective and always takes the point that is furthest from
    those taken (greedy k-centres, Gonzalez 1985). Distances are Euclidean after scaling each objective to
    [0, 1] over the points. Ties go to the earlier point.

    Args:
        values: shape (n, m), to be minimised.

    Returns:
        A permutation of range(n).
    """
    n_points = len(values)
    if n_points == 0:
        return []
    span = np.ptp(values, axis=0)
    scaled = (values - values.min(axis=0)) / np.where(span > 0, span, 1.0)
    first = min(range(n_points), key=lambda i: tuple(values[i]))
    order = [first]
    distance = np.full(n_points, np.inf)
    distance[first] = -1.0  # below every distance: never taken again
    while len(order) < n_points:
        newest = scaled[order[-1]]
        distance = np.where(distance < 0, -1.0, np.minimum(distance, ((scaled - newest) ** 2).sum(axis=1)))
        order.append(int(distance.argmax()))
        distance[order[-1]] = -1.0
    return order
