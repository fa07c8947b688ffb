"""Judges that need no model: formulas over words, which anybody can check.

They measure overlap and no quality beyond it: an answer that says the right thing in other words loses. They
are there so that a win rate can be had offline and again; a reward model or a large language model reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from milp_ray.evaluation.judges.protocol import Question, named
from milp_ray.evaluation.metrics import content_words, rouge_l, set_f1


@dataclass(frozen=True, slots=True)
class ReferenceJudge:
    """Compares with the wanted response: (ROUGE-L + F1 of the content words) / 2, each × 100.

    A difference of up to ``margin`` of these points is a tie.
    """

    margin: float = 1.0

    @property
    def name(self) -> str:
        """See :class:`~milp_ray.evaluation.judges.protocol.Judge`."""
        return named("embedded", self.margin, 1.0)

    def prefer(self, questions: Sequence[Question]) -> list[float]:
        """See :class:`~milp_ray.evaluation.judges.protocol.Judge`; between −100 and 100."""
        return [self._score(q.first, q) - self._score(q.second, q) for q in questions]

    def _score(self, answer: str, question: Question) -> float:
        wanted = question.reference
        return (rouge_l(answer, wanted) + set_f1(content_words(answer), content_words(wanted))) / 2


@dataclass(frozen=True, slots=True)
class PersonaJudge:
    """Knows no wanted response: Persona-F1 × 100 of the answer with the user's history and profile.

    A difference of up to ``margin`` of these points is a tie. It rewards speaking of what the user has spoken
    of, whether or not that answers the query.
    """

    margin: float = 0.1

    @property
    def name(self) -> str:
        """See :class:`~milp_ray.evaluation.judges.protocol.Judge`."""
        return named("embedded_free", self.margin, 0.1)

    def prefer(self, questions: Sequence[Question]) -> list[float]:
        """See :class:`~milp_ray.evaluation.judges.protocol.Judge`; between −100 and 100."""
        return [self._score(q.first, q) - self._score(q.second, q) for q in questions]

    def _score(self, answer: str, question: Question) -> float:
        return set_f1(content_words(answer), question.persona)
