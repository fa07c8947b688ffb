"""What a judge is asked, and what it gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Choice = Literal[-1, 0, 1]  # the second is better, a tie, the first is better


@dataclass(frozen=True, slots=True)
class Question:
    """Two answers to be compared.

    ``reference`` is the response that the user wanted, ``persona`` the content words of the user's history
    and profile (:func:`milp_ray.evaluation.scores.persona_words`).
    """

    query: str
    reference: str
    first: str
    second: str
    persona: frozenset[str] = frozenset()

    def swapped(self) -> Question:
        """The same with the answers in the other order."""
        return Question(self.query, self.reference, self.second, self.first, self.persona)


class Judge(Protocol):
    """Compares answers, a batch at a time."""

    @property
    def name(self) -> str:
        """Which judge it is, with its model where it has one; results of one name are comparable."""
        ...

    @property
    def margin(self) -> float:
        """Differences up to this one are ties, in the judge's own units."""
        ...

    def prefer(self, questions: Sequence[Question]) -> list[float]:
        """How much better the first answer is than the second, of each question; negative where it is worse.

        A judge is fair to places: swapping the answers turns the sign and changes nothing else.
        """
        ...


def named(judge: str, margin: float, usual: float) -> str:
    """A judge's name, which tells the margin where it is not the usual one: other ties, other results."""
    return judge if margin == usual else f"{judge} (margin {margin:g})"


def choice_of(difference: float, margin: float) -> Choice:
    """What a difference says."""
    if abs(difference) <= margin:
        return 0
    return 1 if difference > 0 else -1
