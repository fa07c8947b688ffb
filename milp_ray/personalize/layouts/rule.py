"""What a user's layout is, or which ones race for it, and why: decided from the user's data alone.

A decision is a function of the rule and the user's data, so that whoever makes, updates or scores an adapter
comes to the same one, in whatever order and process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from milp_ray.config.personalize import LayoutMode
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.personalize.layouts.portfolio import Portfolio
from milp_ray.users.records import UserSplit
from milp_ray.users.traits import user_traits

# Reasons, as they stand in manifests and in the report; none says anything of a user's text.
FOR_ALL = "the chosen layout is everybody's"
NO_VALIDATION = "no validation examples to race on"
RACED = "lowest validation loss in the race"
SIMILAR_USERS = "similar probe users did better with it"
NOT_SURE = "no other layout's predicted gain exceeds its error"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout of the front and the parameters of one user's adapter."""

    layout: CanonicalLayout
    parameters: int


@dataclass(frozen=True, slots=True)
class Decision:
    """One candidate: it is taken. Several: they race, the chosen one first.

    ``chosen`` is the layout chosen for all, taken or not; ``reduction`` is the race's; ``facts`` are small
    numbers that a manifest holds beside the reason.
    """

    candidates: tuple[Candidate, ...]
    chosen: Candidate
    mode: LayoutMode
    reason: str
    reduction: int = 2
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def layouts(self) -> tuple[CanonicalLayout, ...]:
        """The candidates' layouts."""
        return tuple(candidate.layout for candidate in self.candidates)

    @property
    def is_race(self) -> bool:
        """Whether several layouts are trained."""
        return len(self.candidates) > 1


@dataclass(frozen=True, slots=True)
class LayoutRule:
    """How a run decides on users' layouts.

    Attributes:
        mode: a race or a portfolio; a run of one layout for all has no rule.
        chosen: the layout that was chosen for all.
        others: further candidates, in the order of preference.
        reduction: of a race.
        portfolio: predicts for ``others``, in their order; ``None`` in a race.
        refusal: why everybody gets the chosen layout; empty where they may not.
    """

    mode: Literal["race", "portfolio"]
    chosen: Candidate
    others: tuple[Candidate, ...] = ()
    reduction: int = 2
    portfolio: Portfolio | None = None
    refusal: str = ""

    def decide(self, split: UserSplit) -> Decision:
        """What a user is trained under."""
        if self.refusal:
            return self._chosen(self.refusal)
        if self.mode == "race":
            if not split.validation:
                return self._chosen(NO_VALIDATION)
            return Decision((self.chosen, *self.others), self.chosen, self.mode, RACED, self.reduction)
        if self.portfolio is None:
            raise RuntimeError("a portfolio without predictions has to say why")
        pick = self.portfolio.pick(user_traits(split))
        facts = {"predicted_gain": round(pick.gain, 5), "error": round(pick.error, 5)}
        if pick.layout is None:
            return self._chosen(NOT_SURE, facts)
        return Decision((self.others[pick.layout],), self.chosen, self.mode, SIMILAR_USERS, facts=facts)

    def _chosen(self, reason: str, facts: Mapping[str, Any] | None = None) -> Decision:
        return Decision((self.chosen,), self.chosen, self.mode, reason, facts=facts or {})
