"""The rule by which a run decides on users' layouts, from what its study has measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.objectives import VALIDATION_LOSS
from milp_ray.personalize.layouts.portfolio import MIN_USERS, Portfolio
from milp_ray.personalize.layouts.rule import Candidate, LayoutRule
from milp_ray.users.traits import TRAITS

if TYPE_CHECKING:
    from milp_ray.config.personalize import PersonalizeSection
    from milp_ray.search.choice import FrontPoint
    from milp_ray.search.journal import StudyState, TrialRecord

ALONE = "the front has no other layout within personalize.max_growth"
NOT_MEASURED = "the search has no values by user of the chosen layout"
NO_TRAITS = "the search has recorded nothing to know similar users by; `milp-ray search` on the run adds it"
TOO_FEW = f"the search has fewer than {MIN_USERS} probe users with values"


def layout_rule(journal: Path, chosen: Candidate, section: PersonalizeSection) -> LayoutRule:
    """The rule of ``section.layout``, which is a race or a portfolio.

    A portfolio that the study has too little for gives everybody the chosen layout, and says why in
    :attr:`LayoutRule.refusal`; so does either where the front has no other layout.

    Args:
        journal: of the run's study.
        chosen: the layout chosen for all.
        section: says which mode, and its options.

    Raises:
        MilpError: the run has no study with a front.
    """
    from milp_ray.search.journal import read_study
    from milp_ray.search.results import study_result

    state = read_study(journal)
    front = study_result(state).front if state.header is not None else ()
    if not front:
        raise MilpError(
            f"personalize.layout is {section.layout!r}, which takes layouts of the search's front, and "
            f"{journal} holds none: run `milp-ray search` on this run, or set personalize.layout to 'chosen'"
        )
    return rule_of(state, front, chosen, section)


def rule_of(
    state: StudyState, front: Sequence[FrontPoint], chosen: Candidate, section: PersonalizeSection
) -> LayoutRule:
    """As :func:`layout_rule`, of a study that has been read."""
    others = candidates(front, chosen, section.max_growth)
    if section.layout == "race":
        others = others[: section.race.max_layouts - 1]
        refusal = "" if others else ALONE
        return LayoutRule("race", chosen, others, reduction=section.race.reduction, refusal=refusal)
    if not others:
        return LayoutRule("portfolio", chosen, refusal=ALONE)
    found = portfolio_of(state, chosen.layout, [other.layout for other in others], section)
    if isinstance(found, str):
        return LayoutRule("portfolio", chosen, refusal=found)
    known, portfolio = found
    return LayoutRule("portfolio", chosen, tuple(others[place] for place in known), portfolio=portfolio)


def candidates(
    front: Sequence[FrontPoint], chosen: Candidate, max_growth: float | None
) -> tuple[Candidate, ...]:
    """The front's other layouts with an adapter, the lowest validation loss first, the smaller of equals.

    Means over the probe users alone decide, which outlive a probe user who is forgotten.
    """
    limit = math.inf if max_growth is None else max_growth * chosen.parameters
    points = [
        point
        for point in front
        if not point.layout.is_empty
        and point.layout != chosen.layout
        and point.adapter_parameters <= limit
        and VALIDATION_LOSS.name in point.values
    ]
    points.sort(key=lambda point: (point.values[VALIDATION_LOSS.name], point.adapter_parameters, point.index))
    return tuple(Candidate(point.layout, point.adapter_parameters) for point in points)


def portfolio_of(
    state: StudyState,
    chosen: CanonicalLayout,
    others: Sequence[CanonicalLayout],
    section: PersonalizeSection,
) -> tuple[list[int], Portfolio] | str:
    """Predictions for those of ``others`` that have values by user, with their places; or why there are none.

    Probe users without all of the values (who were forgotten) are left out.
    """
    losses = {trial.layout.key: found for trial in state.completed if (found := _by_user(trial)) is not None}
    if chosen.key not in losses:
        return NOT_MEASURED
    traits = _traits(state.probe_traits, len(losses[chosen.key]))
    if traits is None:
        return NO_TRAITS
    known = [place for place, layout in enumerate(others) if layout.key in losses]
    if not known:
        return NOT_MEASURED
    own = losses[chosen.key]
    table = np.column_stack([losses[others[place].key] for place in known])
    whole = np.isfinite(traits).all(axis=1) & np.isfinite(table).all(axis=1) & np.isfinite(own) & (own > 0)
    if int(whole.sum()) < MIN_USERS:
        return TOO_FEW
    shrinkage = section.portfolio.shrinkage
    return known, Portfolio.of(traits[whole], table[whole], own[whole], shrinkage=shrinkage)


def _by_user(trial: TrialRecord) -> Any:
    """A trial's validation losses, (n_probe_users,), NaN for a user without; ``None``: it has none."""
    values = trial.metrics.get("per_user", {}).get(VALIDATION_LOSS.name)
    return np.array(values, dtype=float) if values else None


def _traits(by_name: Mapping[str, Sequence[float | None]], n_users: int) -> Any:
    """(n_probe_users, n_traits), NaN for a user without; ``None`` where a trait was not recorded."""
    columns = [by_name.get(name, ()) for name in TRAITS]
    if any(len(column) != n_users for column in columns):
        return None
    return np.array(columns, dtype=float).T
