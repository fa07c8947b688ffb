"""What earlier searches hand to a new one: their fronts as a portfolio to try first, and their observations.

An earlier search is another run folder, with other users perhaps, or another base with as many layers. Its
best layouts are measured among the new study's initial trials, where a bad piece of advice costs no more than
the trials that it takes; how far its values are believed is :mod:`milp_ray.search.earlier`'s matter.

What is used of it is kept with the new study: an earlier search may go on, or be removed, and the new one is
still resumed from what it began with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from milp_ray.atomic_files import write_json
from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.objectives import KNOWN_OBJECTIVES
from milp_ray.search.front import pareto_front
from milp_ray.search.journal import read_study
from milp_ray.search.observations import Observation
from milp_ray.search.rungs import epsilon_net

if TYPE_CHECKING:
    from milp_ray.memory.space import SearchSpace

# The share of the initial trials that a portfolio may take: the others explore, whatever it says.
PORTFOLIO_SHARE = 0.5
EARLIER_FILE = "earlier.json"  # in a study's folder: what it uses of earlier searches
_JOURNAL = Path("study") / "journal.jsonl"


@dataclass(frozen=True)
class EarlierStudy:
    """One earlier search, as far as it can be used in the new one's space.

    ``observations`` are its completed trials with the new study's objectives, ``front`` the layouts of those
    on the front, most spread out first (:func:`milp_ray.search.rungs.epsilon_net`).
    """

    run: str
    observations: tuple[Observation, ...]
    front: tuple[CanonicalLayout, ...]


def load_earlier(runs: Sequence[Path], space: SearchSpace, objectives: Sequence[str]) -> list[EarlierStudy]:
    """The earlier searches in the run folders ``runs``; trials whose layout is not in ``space`` are left out.

    Raises:
        MilpError: a folder holds no search, its journal is damaged, its base has another number of layers, or
            no trial of it has values for all objectives and a layout in the space.
    """
    return [_load(run, space, objectives) for run in runs]


def portfolio(earlier: Sequence[EarlierStudy], space: SearchSpace, n_initial: int) -> list[dict[str, Any]]:
    """Raw points of the earlier fronts, all different, at most half of ``n_initial`` of them.

    The fronts take turns, so that no search crowds out the others.
    """
    n_most = int(n_initial * PORTFOLIO_SHARE)
    found: dict[str, dict[str, Any]] = {}
    for place in range(max((len(study.front) for study in earlier), default=0)):
        for study in earlier:
            if place < len(study.front) and len(found) < n_most:
                layout = study.front[place]
                found.setdefault(layout.key, dict(space.raw(layout)))
    return list(found.values())


def fingerprint(earlier: Sequence[EarlierStudy]) -> str | None:
    """A hash of all that is used of the earlier searches; ``None`` where there are none."""
    if not earlier:
        return None
    used = [[[o.key, o.values] for o in study.observations] for study in earlier]
    return hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()


def keep(path: Path, earlier: Sequence[EarlierStudy]) -> None:
    """Write what is used of earlier searches to a study's own file, where it does not say so already."""
    kept = [
        {
            "run": study.run,
            "trials": [
                {"index": o.index, "layout": o.layout.to_dict(), "values": o.values}
                for o in study.observations
            ],
        }
        for study in earlier
    ]
    if _read(path) != kept:
        write_json(path, kept)


def kept_earlier(
    path: Path, runs: Sequence[Path], space: SearchSpace, objectives: Sequence[str]
) -> list[EarlierStudy] | None:
    """The earlier searches ``runs`` as :func:`keep` wrote them; ``None`` where it was not these.

    Raises:
        MilpError: the file is damaged, or says nothing of use in ``space`` with ``objectives``.
    """
    kept = _read(path)
    try:
        if kept is None or [study["run"] for study in kept] != [str(run) for run in runs]:
            return None
        trials = [
            [(t["index"], CanonicalLayout.from_dict(t["layout"]), dict(t["values"])) for t in study["trials"]]
            for study in kept
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path) from error
    return [_usable(run, own, space, objectives) for run, own in zip(runs, trials, strict=True)]


def _load(run: Path, space: SearchSpace, objectives: Sequence[str]) -> EarlierStudy:
    state = read_study(run / _JOURNAL)
    if state.header is None:
        raise MilpError(
            f"search.warm_start: {run} holds no search ({_JOURNAL} is missing); name run folders in which "
            "`milp-ray search` or `milp-ray run` has measured trials"
        )
    n_layers = state.header["space"]["n_layers"]
    if n_layers != space.n_layers:
        raise MilpError(
            f"search.warm_start: the base of {run} has {n_layers} layers and this one has {space.n_layers}, "
            "so its layouts mean nothing here; leave it out"
        )
    trials = [(trial.index, trial.layout, trial.metrics) for trial in state.completed]
    return _usable(run, trials, space, objectives)


def _usable(
    run: Path,
    trials: Sequence[tuple[int, CanonicalLayout, Mapping[str, Any]]],
    space: SearchSpace,
    objectives: Sequence[str],
) -> EarlierStudy:
    """Of the completed trials (index, layout, metrics) of a run those that say something in ``space``."""
    known = [
        (index, layout, metrics)
        for index, layout, metrics in trials
        if all(metrics.get(name) is not None for name in objectives) and _is_in(space, layout)
    ]
    if not known:
        raise MilpError(
            f"search.warm_start: no trial of {run} has values for {', '.join(objectives)} and a layout of "
            "this search's space; leave it out"
        )
    observations = tuple(
        Observation(index, space.raw(layout), layout, {name: float(metrics[name]) for name in objectives})
        for index, layout, metrics in known
    )
    return EarlierStudy(str(run), observations, spread_front(observations, objectives))


def _read(path: Path) -> Any:
    """What a file of :func:`keep` holds; ``None`` where there is none."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> MilpError:
    return MilpError(
        f"{path} is damaged: it holds what this search knows of those that search.warm_start names. Restore "
        "the file from a copy; or remove it, which is as good while those searches are as they were"
    )


def spread_front(
    observations: Sequence[Observation], objectives: Sequence[str]
) -> tuple[CanonicalLayout, ...]:
    """Layouts on the front of observations that all have values, most spread out first.

    The empty layout, which is the base alone, is left out.
    """
    signs = np.array([KNOWN_OBJECTIVES[name].sign for name in objectives], dtype=float)
    values = np.array([[(o.values or {})[name] for name in objectives] for o in observations])
    front = [i for i in pareto_front(values, signs) if not observations[i].layout.is_empty]
    return tuple(observations[front[i]].layout for i in epsilon_net(values[front] * signs))


def _is_in(space: SearchSpace, layout: CanonicalLayout) -> bool:
    try:
        space.raw(layout)
    except MilpError:
        return False
    return True
