"""Which layout of the front is used for everybody, and why, in plain words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.objectives import ADAPTER_PARAMETERS, KNOWN_OBJECTIVES, ROUGE_L, VALIDATION_LOSS
from milp_ray.search.front import knee

if TYPE_CHECKING:
    from milp_ray.config.search import ChoiceSection
    from milp_ray.objectives import Objective


@dataclass(frozen=True)
class FrontPoint:
    """One measured layout on the front.

    ``values`` holds every known objective, searched for or not; of the latter those that were numbers.
    """

    index: int  # of the trial
    layout: CanonicalLayout
    values: Mapping[str, float]

    @property
    def adapter_parameters(self) -> int:
        """Parameters of one user's adapter."""
        return int(self.values[ADAPTER_PARAMETERS.name])


@dataclass(frozen=True)
class Choice:
    """The chosen point, by which rule, and the reason as a sentence."""

    point: FrontPoint
    rule: str
    reason: str
    objectives: tuple[str, ...]

    @property
    def layout(self) -> CanonicalLayout:
        """The layout that every user's adapter gets."""
        return self.point.layout

    def to_dict(self) -> dict[str, Any]:
        """What ``chosen.yaml`` holds; :func:`chosen_layout` reads the layout back."""
        return {
            "layout": {**self.layout.to_dict(), "key": self.layout.key},
            "rule": self.rule,
            "reason": self.reason,
            "objectives": {name: float(self.point.values[name]) for name in self.objectives},
            "adapter_parameters": self.point.adapter_parameters,
            "trial": self.point.index,
        }


def chosen_layout(values: Mapping[str, Any]) -> CanonicalLayout:
    """The layout in the content of ``chosen.yaml``.

    Raises:
        MilpError: the content is not what :meth:`Choice.to_dict` makes.
    """
    layout = values.get("layout")
    if not isinstance(layout, Mapping):
        raise MilpError("chosen.yaml has no layout: write it again with `milp-ray choose`")
    return CanonicalLayout.from_dict({name: value for name, value in layout.items() if name != "key"})


def choose(front: Sequence[FrontPoint], objectives: Sequence[str], section: ChoiceSection) -> Choice:
    """The point of ``front`` that the rule picks.

    The empty layout is a fair member of a front (it has no parameters) but no personalisation, so it is
    chosen only where it is all there is. Ties go to fewer parameters, then to the earlier trial.

    Args:
        front: the non-dominated points.
        objectives: names of what the study optimises, in order.

    Raises:
        MilpError: the front is empty, or no layout of it has a value that the rule goes by.
    """
    if not front:
        raise MilpError("there is no layout to choose: no trial of the search was completed")
    candidates = sorted(
        (point for point in front if not point.layout.is_empty),
        key=lambda point: (point.adapter_parameters, point.index),
    )
    if not candidates:
        reason = (
            "No adapter was on the front: no layout measured better than the base alone in any objective."
        )
        return Choice(front[0], section.rule, reason, tuple(objectives))
    point, reason = _RULES[section.rule](candidates, objectives, section)
    if len(candidates) == 1:
        reason = "It is the only layout with an adapter on the front."
    return Choice(point, section.rule, reason, tuple(objectives))


_ON_FRONT = "layouts with an adapter on the front"  # the empty layout is not chosen


def _knee(
    points: Sequence[FrontPoint], objectives: Sequence[str], section: ChoiceSection
) -> tuple[FrontPoint, str]:
    signs = [KNOWN_OBJECTIVES[name].sign for name in objectives]
    point = points[knee([[point.values[name] for name in objectives] for point in points], signs)]
    labels = _listed([KNOWN_OBJECTIVES[name].label for name in objectives])
    return point, (
        f"Of {len(points)} {_ON_FRONT} it is the knee: beyond it, a little more of one of {labels} "
        "costs much of another."
    )


def _best_loss(
    points: Sequence[FrontPoint], objectives: Sequence[str], section: ChoiceSection
) -> tuple[FrontPoint, str]:
    points = _with(VALIDATION_LOSS, points)
    point = min(points, key=lambda point: point.values[VALIDATION_LOSS.name])
    value = f"{point.values[VALIDATION_LOSS.name]:.4f}"
    return point, f"Its validation loss, {value}, is the lowest of {len(points)} {_ON_FRONT}."


def _best_rouge_l(
    points: Sequence[FrontPoint], objectives: Sequence[str], section: ChoiceSection
) -> tuple[FrontPoint, str]:
    points = _with(ROUGE_L, points)
    point = max(points, key=lambda point: point.values[ROUGE_L.name])
    value = f"{point.values[ROUGE_L.name]:.2f}"
    return point, f"Its ROUGE-L, {value}, is the highest of {len(points)} {_ON_FRONT}."


def _smallest_within(
    points: Sequence[FrontPoint], objectives: Sequence[str], section: ChoiceSection
) -> tuple[FrontPoint, str]:
    points = _with(VALIDATION_LOSS, points)
    best = min(point.values[VALIDATION_LOSS.name] for point in points)
    limit = best + section.tolerance * abs(best)
    point = next(point for point in points if point.values[VALIDATION_LOSS.name] <= limit)
    return point, (
        f"With {point.adapter_parameters:,} parameters it is the smallest adapter on the front whose "
        f"validation loss, {point.values[VALIDATION_LOSS.name]:.4f}, is within {section.tolerance:.1%} of "
        f"the best, {best:.4f}."
    )


_RULES: dict[str, Callable[[Sequence[FrontPoint], Sequence[str], ChoiceSection], tuple[FrontPoint, str]]] = {
    "knee": _knee,
    "best_loss": _best_loss,
    "best_rouge_l": _best_rouge_l,
    "smallest_within": _smallest_within,
}


def _with(objective: Objective, points: Sequence[FrontPoint]) -> Sequence[FrontPoint]:
    """The points that have a value of the objective, which may be none of the search's own."""
    known = [point for point in points if objective.name in point.values]
    if not known:
        raise MilpError(
            f"no layout on the front has a value of {objective.name}, as training diverged: choose by "
            "another choice.rule, or lower training.learning_rate and search again"
        )
    return known


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
